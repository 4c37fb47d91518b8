import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastppt_kernels import joint_attention, joint_attention_map_sum
from fastppt_kernels.joint_attention import flash, op
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


SHAPES = {
    "small": (2, 3, 40, 8),
    "least": (1, 1, 8, 1),
    "blocks": (1, 2, 700, 16),
    "odd": (2, 3, 101, 13),
    "no room for columns": (1, 2, 63, 64),
    "SD1.5's": (1, 2, 33, 40),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    "weights",
    [{}, {"output_weight": 0.0}, {"loss_weight": 0.0}],
    ids=["both", "loss alone", "output alone"],
)
def test_output_loss_and_gradients_equal_the_materialised_ones(shape, weights):
    check(make(shape=shape), 1e-9, **weights)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_logits_of_eighty_leave_everything_finite(dtype, tolerance):
    arguments = make(dtype)
    logits = arguments["query"].detach() @ arguments["key"].detach().mT * 8**-0.5
    arguments["query"] = (arguments["query"].detach() * 80 / logits.abs().max()).requires_grad_()
    check(arguments, tolerance)


def test_strided_inputs_are_read_as_they_are():
    arguments = make(shape=(2, 3, 40, 16))
    for name in NAMES:
        tensor = arguments[name].detach()
        # Rows, and elements of a row, that do not follow one another.
        wide = torch.zeros((*tensor.shape[:3], 40), dtype=tensor.dtype)
        wide[..., 3:35:2] = tensor
        arguments[name] = wide[..., 3:35:2].requires_grad_()
    check(arguments, 1e-9)


def test_heads_of_one_fused_projection_are_read_in_place():
    fused = torch.randn((1, 40, 3 * 2 * 16), dtype=torch.float64)
    query, key, value = fused.view(1, 40, 3, 2, 16).permute(2, 0, 3, 1, 4)
    for tensor in (query, key, value):
        assert flash._readable(tensor) is tensor
    arguments = {"num_text_tokens": NUM_TEXT, "base_map_sum": make()["base_map_sum"][:1]}
    arguments |= {n: t.requires_grad_() for n, t in zip(NAMES, (query, key, value), strict=True)}
    check(arguments, 1e-9)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e-6, 100.0])
def test_the_gradient_of_the_logsumexp_keeps_its_digits(dtype, size):
    shift = size * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    narrow, rest = flash.split_shift(shift, dtype)
    assert narrow.dtype == rest.dtype == dtype
    back = narrow.double() + rest.double() / flash.REST_FACTOR
    # 16 bits; of float16 below its normal numbers, what its finest step in the rest is worth.
    assert ((back - shift).abs() <= 2.0**-16 * shift.abs() + 2.0**-36).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 5, 254])
def test_a_gpus_operations_take_what_they_are_given(dtype, head_dim):
    # On no device: shapes alone. What is not the CPU takes the way of a GPU.
    query, key, value = torch.empty((3, 2, 45, 3, head_dim), dtype=dtype, device="meta").transpose(
        2, 3
    )
    assert flash._readable(query).shape[3] % flash.STEP == 0
    output, logsumexp = flash.attend(query, key, value, 0.3)
    assert (output.shape, output.dtype) == (query.shape, dtype)
    assert (logsumexp.shape, logsumexp.dtype) == (query.shape[:3], torch.float32)
    saved = (query, key, value, output, logsumexp)
    for grad in flash.backpropagate_attention(output, logsumexp, *saved, 0.3):
        assert (grad.shape, grad.dtype) == (query.shape, dtype)


def peak_bytes(call):
    """Return the most bytes of the CPU's memory that the call had at once."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


def test_no_map_of_all_tokens_is_made():
    arguments = make(torch.float32, (1, 2, 1500, 16))
    maps = 4 * 2 * 1500 * 1500
    assert peak_bytes(lambda: run(arguments)) <= maps / 4
    assert peak_bytes(lambda: arguments["query"] @ arguments["key"].mT) >= maps


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


def test_autocast_is_off_where_the_attention_runs(monkeypatch):
    # The CPU's operation is on no list of autocast, a GPU's is.
    seen = []

    def attend(*inputs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return flash.attend(*inputs)

    monkeypatch.setattr(op, "attend", attend)
    with torch.autocast("cpu", torch.bfloat16):
        run(make(torch.float32))
    assert seen == [False]


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
    "delta not shifted": ("select(3, head_dim).copy_(shift)", "select(3, head_dim).zero_()"),
    "delta shifted the other way": ("split_shift(-grad", "split_shift(grad"),
    "dO without its column": ("select(3, head_dim).fill_(1.0)", "select(3, head_dim).zero_()"),
    "columns of dO reach V": ("tensor.new_zeros(size)", "tensor.new_ones(size)"),
    "scale of the wider head": ("0.0, False, scale=scale", "0.0, False"),
    "gradients of the last columns": ("grad.narrow(3, 0, ", "grad.narrow(3, 1, "),
    "logsumexp of unscaled": ("query, key, value, scale=scale", "query, key, value, scale=1.0"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_turns_the_comparison_red(fault, tmp_path, monkeypatch):
    arguments = make()
    check(arguments, 1e-9)
    mutant = load_mutant(flash.__file__, [fault], tmp_path)
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


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float64, 64, "query: got dtype torch.float64"),
        (torch.bfloat16, 255, "query: got head dim 255 .* at most 254"),
    ],
)
def test_what_a_gpu_cannot_do_is_named(dtype, head_dim, message):
    with FakeTensorMode():
        query = torch.empty((1, 2, 40, head_dim), dtype=dtype, device="cuda")
        with pytest.raises(ValueError, match=message):
            joint_attention(query, query, query, num_text_tokens=7, base_map_sum=query)


# SD3-M's heads at 256 px.
SD3 = {"shape": (1, 24, 256 + 154, 64), "device": "cuda", "num_text": 154}
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 40, 13, 128])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-2), (torch.float32, 1e-5)]
)
def test_a_gpus_results_equal_the_reference(dtype, tolerance, head_dim):
    check(make(dtype, **SD3 | {"shape": (1, 24, 256 + 154, head_dim)}), tolerance)
    check(make(dtype, (2, 3, 101, head_dim), device="cuda"), tolerance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_a_gpu_pulls_at_image_keys(dtype, tolerance):
    arguments = make(dtype, **SD3)
    exact = {
        name: t.detach().double().requires_grad_(t.requires_grad)
        if isinstance(t, torch.Tensor)
        else t
        for name, t in arguments.items()
    }
    grads = key_gradients(arguments, joint_attention, 154)
    wanted = key_gradients(exact | {"scale": 0.125}, joint_attention_reference, 154)
    for grad, exact_grad in zip(grads, wanted, strict=True):
        assert overall_error([grad], [exact_grad]) <= tolerance


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_base_equal_to_the_map_gives_no_loss_on_a_gpu(dtype):
    arguments = make(dtype, **SD3)
    del arguments["base_map_sum"]
    with torch.no_grad():
        _, base = joint_attention_map_sum(**arguments)
    results = run(arguments | {"base_map_sum": base}, output_weight=0.0)
    assert not any(result.any() for result in results[1:])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 13])
def test_the_op_passes_opcheck_on_a_gpu(dtype, head_dim):
    arguments = make(dtype, (2, 3, 101, head_dim), device="cuda")
    inputs = [arguments[name] for name in NAMES]
    # Strides as they are announced; a GPU's gradients differ by their rounding from run to run.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastppt_kernels.attention, (*inputs, 0.3), test_utils=tests)
    output, logsumexp = (t.detach() for t in torch.ops.fastppt_kernels.attention(*inputs, 0.3))
    inputs = [t.detach() for t in inputs]
    backward = (output, logsumexp, *inputs, output, logsumexp, 0.3)
    op_backward = torch.ops.fastppt_kernels.attention_backward
    torch.library.opcheck(op_backward, backward, test_utils=tests)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_to_another_dtype_does_not_reach_a_gpus_products(dtype):
    arguments = make(dtype, **SD3)
    with torch.autocast("cuda", torch.float16):
        inside = run(arguments)
    # The gradients differ by their rounding from run to run.
    for result, wanted in zip(inside, run(arguments), strict=True):
        assert result.dtype == wanted.dtype
        assert overall_error([result], [wanted]) <= 1e-2
    assert torch.equal(inside[0], joint_attention(**arguments)[0])


@pytest.mark.gpu
@needs_gpu
def test_compiled_whole_equals_the_reference_on_a_gpu():
    compiled = torch.compile(joint_attention, fullgraph=True)
    check(make(torch.bfloat16, **SD3), 1e-2, compiled)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_captured_call_equals_the_reference(dtype):
    arguments = make(dtype, **SD3)
    inputs = [arguments[name] for name in NAMES]
    # Drawn before: a captured call takes nothing from the host.
    direction = draw_like(arguments["query"], 3)

    def call():
        output, loss = joint_attention(**arguments)
        return output, loss, *torch.autograd.grad((output * direction).sum() + loss, inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    for result, wanted in zip(results, run_reference(arguments), strict=True):
        assert overall_error([result], [wanted]) <= 1e-2


@pytest.mark.gpu
@needs_gpu
def test_gradients_are_equal_bit_by_bit_where_they_are_asked_to_be():
    arguments = make(torch.bfloat16, **SD3)
    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, run(arguments), run(arguments)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@needs_gpu
def test_no_map_of_all_tokens_is_made_on_a_gpu():
    arguments = make(torch.bfloat16, (1, 24, 2048 + 154, 64), device="cuda", num_text=154)
    run(arguments)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    run(arguments)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert peak <= 2 * 24 * 2202 * 2202
