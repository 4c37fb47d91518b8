import pytest
import torch

from fastppt_kernels import joint_attention, joint_attention_map_sum
from fastppt_kernels.joint_attention import op, plain
from fastppt_kernels.joint_attention.reference import joint_attention_reference
from fastppt_kernels.testing import HAS_GPU, ForbidHostReads, load_mutant, overall_error

NUM_TEXT = 7
NAMES = ("query", "key", "value")


def make(dtype=torch.float64, shape=(2, 3, 40, 8), *, device="cpu", num_text=NUM_TEXT):
    """Return the arguments; heads as an attention processor splits them."""
    num_batches, num_heads, num_tokens, head_dim = shape
    generator = torch.Generator().manual_seed(5)
    arguments = {"num_text_tokens": num_text}
    for name in NAMES:
        size = (num_batches, num_tokens, num_heads * head_dim)
        tokens = torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
        heads = tokens.view(num_batches, num_tokens, num_heads, head_dim).transpose(1, 2)
        arguments[name] = heads.requires_grad_()
    base = torch.rand(
        (num_batches, num_tokens - num_text, num_text), generator=generator, dtype=torch.float64
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments["base_map_sum"] = base.to(device, wide)
    return arguments


def draw_like(tensor, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


def run(arguments, attention=joint_attention, *, output_weight=1.0, loss_weight=1.0):
    """Return output, loss, and gradients of a weighted sum of the output plus the loss."""
    output, loss = attention(**arguments)
    total = output_weight * (output * draw_like(output, 3)).sum() + loss_weight * loss
    return [output, loss, *torch.autograd.grad(total, [arguments[name] for name in NAMES])]


def run_reference(arguments, **weights):
    exact = {
        name: t.detach().double().requires_grad_(t.requires_grad)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
        for name, t in arguments.items()
    }
    scale = arguments["query"].shape[-1] ** -0.5
    return run(exact | {"scale": scale}, joint_attention_reference, **weights)


def check(arguments, tolerance, attention=joint_attention, **weights):
    wanted = run_reference(arguments, **weights)
    for index, (got, exact) in enumerate(
        zip(run(arguments, attention, **weights), wanted, strict=True)
    ):
        error = overall_error([got], [exact])
        assert error <= tolerance, f"{index}: off by {error:.1e}"


@pytest.mark.parametrize(
    "shape", [(2, 3, 40, 8), (1, 1, 8, 1), (1, 2, 700, 16)], ids=["small", "least", "chunks"]
)
@pytest.mark.parametrize(
    "weights",
    [{}, {"output_weight": 0.0}, {"loss_weight": 0.0}],
    ids=["both", "loss alone", "output alone"],
)
def test_output_loss_and_gradients_equal_the_materialised_ones(shape, weights):
    check(make(shape=shape), 1e-9, **weights)


def key_gradients(arguments, attention, num_text=NUM_TEXT):
    """Return the loss's gradient of the image keys and of the text keys."""
    _, loss = attention(**arguments)
    (grad,) = torch.autograd.grad(loss, arguments["key"])
    return grad[:, :, :-num_text], grad[:, :, -num_text:]


def test_the_gradient_through_image_keys_is_the_materialised_one():
    arguments = make()
    image, text = key_gradients(arguments, joint_attention)
    wanted_image, wanted_text = key_gradients(
        arguments | {"scale": 8**-0.5}, joint_attention_reference
    )
    assert overall_error([image], [wanted_image]) <= 1e-9
    assert overall_error([text], [wanted_text]) <= 1e-9
    # It is no small part.
    assert image.norm() > 0.2 * text.norm()


def test_columns_choose_what_is_compared():
    arguments = make()
    arguments["columns"] = torch.tensor([[0, 2, -1, 6, 5, 1, -1], [6, 5, 4, 3, 2, 1, 0]])
    check(arguments, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_base_equal_to_the_map_gives_no_loss_and_no_gradient(dtype):
    arguments = make(dtype)
    del arguments["base_map_sum"]
    with torch.no_grad():
        output, base = joint_attention_map_sum(**arguments)
    results = run(arguments | {"base_map_sum": base}, output_weight=0.0)
    assert torch.equal(results[0], output)
    assert not any(result.any() for result in results[1:])


def test_map_sum_is_the_block_of_image_queries_and_text_keys():
    arguments = make()
    base = arguments.pop("base_map_sum")
    _, map_sum = joint_attention_map_sum(**arguments)
    assert map_sum.shape == base.shape
    _, loss = joint_attention_reference(**arguments, base_map_sum=map_sum, scale=8**-0.5)
    assert loss <= 1e-24


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)]
)
def test_narrow_inputs_are_right_to_their_rounding(dtype, tolerance):
    check(make(dtype), tolerance)


def test_nothing_is_read_on_the_host():
    arguments = make()
    with ForbidHostReads():
        run(arguments)


def test_two_runs_are_equal():
    arguments = make(torch.float32)
    assert all(map(torch.equal, run(arguments), run(arguments)))


def test_autocast_does_not_reach_the_products():
    arguments = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(arguments)
    assert all(map(torch.equal, inside, run(arguments)))


def test_the_op_passes_opcheck():
    query, key, value = (make()[name] for name in NAMES)
    torch.library.opcheck(torch.ops.fastppt_kernels.attention, (query, key, value, 0.3))


def test_compiled_whole_equals_eager():
    arguments = make(torch.float32)
    compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(arguments, compiled), run(arguments)))


def test_a_second_derivative_is_refused():
    arguments = make()
    output, _ = joint_attention(**arguments)
    (grad,) = torch.autograd.grad(output.sum(), arguments["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        grad.sum().backward()


FAULTS = {
    "delta not shifted": ("delta_hn -= grad_logsumexp[batch, :, rows]", "pass"),
    "delta shifted the other way": ("delta_hn -= grad", "delta_hn += grad"),
    "delta left out": ("grad_hnm.sub_(delta_hn[..., None]).mul_", "grad_hnm.mul_"),
    "last chunk of values": (
        "grad_value[batch].baddbmm_(maps_hnm.mT, grad_hnd)",
        "grad_value[batch] = torch.bmm(maps_hnm.mT, grad_hnd)",
    ),
    "key not scaled": ("query_hnd, alpha=scale)", "query_hnd)"),
    "logsumexp of unscaled": ("logits_hnm.logsumexp(-1)", "(logits_hnm / scale).logsumexp(-1)"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_turns_the_comparison_red(fault, tmp_path, monkeypatch):
    arguments = make(shape=(1, 2, 700, 16))
    check(arguments, 1e-9)
    mutant = load_mutant(plain.__file__, [fault], tmp_path)
    for name in ("attend", "backpropagate_attention"):
        monkeypatch.setattr(op, name, getattr(mutant, name))
    with pytest.raises(AssertionError, match="off by"):
        check(arguments, 1e-9)


def replace(**changes):
    return lambda arguments: arguments | {k: f(arguments[k]) for k, f in changes.items()}


WRONG = {
    "query shape": (replace(query=lambda t: t[0]), "query: got shape"),
    "integers": (replace(query=lambda t: t.long()), "query: got dtype torch.int64"),
    "key shape": (replace(key=lambda t: t[:, :, 1:]), "key: got shape .* the shape of query"),
    "value dtype": (replace(value=lambda t: t.float()), "value: got torch.float32 on cpu"),
    "device": (replace(key=lambda t: t.to("meta")), "key: got torch.float64 on meta"),
    "no text": (replace(num_text_tokens=lambda _: 0), "num_text_tokens: got 0, want 1 to 39"),
    "text alone": (replace(num_text_tokens=lambda _: 40), "num_text_tokens: got 40"),
    "base": (replace(base_map_sum=lambda t: t[:, 1:]), "base_map_sum: got shape"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        joint_attention(**change(make()))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flex_attention_with_its_logsumexp_equals_the_reference(dtype):
    # SD3-M's heads at 256 px.
    check(make(dtype, (1, 24, 256 + 154, 64), device="cuda", num_text=154), 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_flex_attention_pulls_at_image_keys():
    arguments = make(torch.bfloat16, (1, 24, 256 + 154, 64), device="cuda", num_text=154)
    image, _ = key_gradients(arguments, joint_attention, 154)
    exact = {k: t.detach().double() for k, t in arguments.items() if k != "num_text_tokens"}
    exact["key"].requires_grad_()
    exact |= {"scale": 0.125, "num_text_tokens": 154}
    wanted, _ = key_gradients(exact, joint_attention_reference, 154)
    assert overall_error([image], [wanted]) <= 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_a_base_equal_to_the_map_gives_no_loss_on_a_gpu():
    arguments = make(torch.bfloat16, (1, 24, 256 + 154, 64), device="cuda", num_text=154)
    del arguments["base_map_sum"]
    with torch.no_grad():
        _, base = joint_attention_map_sum(**arguments)
    _, loss = joint_attention(**arguments, base_map_sum=base)
    assert loss == 0
