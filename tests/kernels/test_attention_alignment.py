import itertools

import pytest
import torch

from fastppt_kernels import attention_alignment_loss, attention_map_sum
from fastppt_kernels.attention_alignment import op, plain
from fastppt_kernels.attention_alignment.reference import (
    attention_alignment_reference,
    attention_map_sum_reference,
)
from fastppt_kernels.testing import ForbidHostReads, load_mutant, overall_error

# (batch, heads, queries, keys, head dim)
SHAPES = {
    "one": (1, 1, 1, 1, 1),
    "seven": (2, 7, 7, 7, 7),
    "63": (1, 3, 63, 77, 40),
    "over one chunk": (1, 2, 1000, 154, 8),
}


def make(shape, dtype=torch.float64, *, given=False, columns=False, logit_size=1.0, device="cpu"):
    """Return the loss's arguments; query and key as an attention processor makes them."""
    num_batches, num_heads, num_queries, num_keys, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tokens = draw(num_batches, num_queries, num_heads * head_dim) * logit_size
    text = draw(num_batches, num_keys, num_heads * head_dim)
    query, key = (
        t.to(device, dtype).view(num_batches, -1, num_heads, head_dim).transpose(1, 2)
        for t in (tokens, text)
    )
    arguments = {"query": query.requires_grad_(), "key": key.requires_grad_()}
    num_columns = num_keys + 2 if columns else num_keys
    base = num_heads * draw(num_batches, num_queries, num_columns).softmax(-1)
    arguments["base_map_sum"] = base.to(device, wide)
    if given:
        # Of keys that are not all there: somewhat larger than theirs alone.
        logits = query.detach().double() @ key.detach().double().mT * head_dim**-0.5
        more = 0.5 + draw(num_batches, num_heads, num_queries).abs().to(device)
        arguments["logsumexp"] = (logits.logsumexp(-1) + more).to(wide).requires_grad_()
    if columns:
        drawn = torch.randint(-1, num_columns, (num_batches, num_keys), generator=generator)
        arguments["columns"] = drawn.to(device)
    return arguments


def leaves_of(arguments):
    return [arguments[n] for n in ("query", "key", "logsumexp") if n in arguments]


def run(arguments, loss=attention_alignment_loss):
    """Return the loss and the gradients."""
    value = loss(**arguments)
    return [value, *torch.autograd.grad(value, leaves_of(arguments))]


def run_reference(arguments, reference=attention_alignment_reference):
    """Return the same in float64, materialised."""
    exact = {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in arguments.items()
    }
    return run(exact | {"scale": arguments["query"].shape[-1] ** -0.5}, reference)


def check(arguments, tolerances, loss=attention_alignment_loss):
    """Compare the loss and each gradient, by its norm; tolerances of the loss and the gradients."""
    given, wanted = run(arguments, loss), run_reference(arguments)
    for index, (got, exact) in enumerate(zip(given, wanted, strict=True)):
        error = overall_error([got], [exact])
        # Of one key the maps are constant: all gradients vanish but for rounding.
        vanishes = exact.norm() <= 1e-14
        assert error <= tolerances[index > 0] or vanishes, f"{index}: off by {error:.1e}"
    return given


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("given", [False, True], ids=["softmax", "logsumexp given"])
@pytest.mark.parametrize("columns", [False, True], ids=["all columns", "columns"])
def test_loss_and_gradients_equal_the_reference_in_float64(shape, given, columns):
    check(make(shape, given=given, columns=columns), (1e-9, 1e-9))


@pytest.mark.parametrize("given", [False, True])
def test_map_sum_and_its_gradients_equal_the_reference(given):
    arguments = make(SHAPES["63"], given=given)
    base = arguments.pop("base_map_sum")

    def weighted(function):
        return lambda **tensors: (function(**tensors) * base).sum()

    wanted = run_reference(arguments, weighted(attention_map_sum_reference))
    for got, exact in zip(run(arguments, weighted(attention_map_sum)), wanted, strict=True):
        assert overall_error([got], [exact]) <= 1e-9


@pytest.mark.parametrize(
    ("dtype", "tolerances"),
    [
        (torch.float32, (1e-5, 1e-5)),
        (torch.bfloat16, (1e-5, 1e-2)),
        (torch.float16, (1e-5, 1e-2)),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_narrow_inputs_are_right_to_their_rounding(dtype, tolerances, given):
    results = check(make(SHAPES["63"], dtype, given=given), tolerances)
    assert [t.dtype for t in results[:3]] == [torch.float32, dtype, dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("given", [False, True])
def test_a_base_equal_to_the_map_gives_zeros(dtype, given):
    arguments = make(SHAPES["63"], dtype, given=given)
    maps = {k: v for k, v in arguments.items() if k != "base_map_sum"}
    with torch.no_grad():
        arguments["base_map_sum"] = attention_map_sum(**maps)
    assert not any(result.any() for result in run(arguments))


def test_extreme_logits_are_finite():
    arguments = make((1, 2, 9, 5, 4), torch.float32, logit_size=80.0)
    logits = arguments["query"] @ arguments["key"].mT / 2
    assert logits.abs().max() > 80
    assert all(result.isfinite().all() for result in check(arguments, (1e-4, 1e-3)))


def test_columns_of_one_row_are_those_of_every_batch():
    arguments = make(SHAPES["seven"], columns=True)
    row = arguments["columns"][0]
    one = run(arguments | {"columns": row.to(torch.int32)})
    every = run(arguments | {"columns": row.expand(2, -1)})
    assert all(map(torch.equal, one, every))


@pytest.mark.parametrize("column", [9, -2])
def test_a_column_that_is_not_there_makes_the_loss_nan(column):
    arguments = make(SHAPES["seven"], columns=True)
    arguments["columns"][0, 3] = column
    assert attention_alignment_loss(**arguments).isnan()


def test_no_column_compared_is_no_loss():
    arguments = make(SHAPES["seven"], columns=True)
    arguments["columns"].fill_(-1)
    assert not any(result.any() for result in run(arguments))


def test_strides_do_not_matter():
    arguments = make(SHAPES["63"])
    assert not arguments["query"].is_contiguous()
    twin = dict(arguments)
    for name in ("query", "key"):
        apart = arguments[name].detach().repeat_interleave(2, -1)[..., ::2]
        twin[name] = apart.requires_grad_()
    for one, other in zip(run(arguments), run(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_autocast_does_not_reach_the_products():
    arguments = make(SHAPES["63"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(arguments)
    assert all(map(torch.equal, inside, run(arguments)))


def test_two_runs_are_equal():
    arguments = make(SHAPES["over one chunk"], torch.float32)
    assert all(map(torch.equal, run(arguments), run(arguments)))


def test_nothing_is_read_on_the_host():
    arguments = make(SHAPES["63"], columns=True)
    with ForbidHostReads():
        run(arguments)


@pytest.mark.parametrize("given", [False, True])
def test_the_ops_pass_opcheck(given):
    arguments = make(SHAPES["seven"], given=given, columns=True)
    query, key, base = (arguments[n] for n in ("query", "key", "base_map_sum"))
    logsumexp, columns = arguments.get("logsumexp"), arguments["columns"]
    ops = torch.ops.fastppt_kernels
    torch.library.opcheck(ops.attention_map_sum, (query, key, 0.3, logsumexp))
    torch.library.opcheck(ops.attention_alignment, (query, key, base, 0.3, logsumexp, columns))


def test_compiled_whole_equals_eager():
    arguments = make(SHAPES["63"], torch.float32)

    def doubled(**tensors):
        return 2 * attention_alignment_loss(**tensors)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(arguments, compiled), run(arguments, doubled)))


def test_a_second_derivative_is_refused():
    arguments = make(SHAPES["seven"])
    loss = attention_alignment_loss(**arguments)
    (grad,) = torch.autograd.grad(loss, arguments["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        grad.sum().backward()


def peak_bytes(call):
    """Return the most bytes of the CPU's memory that the call had at once."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_a_quarter_of_the_maps(dtype):
    # SDXL's 64x64 layer.
    arguments = make((1, 10, 4096, 77, 64), dtype)
    maps = 4 * 10 * 4096 * 77
    returned = sum(t.nbytes for t in leaves_of(arguments))
    assert peak_bytes(lambda: run(arguments)) - returned <= maps / 4
    # And a materialised softmax, so that it is seen that the memory is counted.
    assert peak_bytes(lambda: arguments["query"].float() @ arguments["key"].float().mT) >= maps


FAULTS = {
    "not the same for every head": (
        "maps_hqk * (factor * grad_sum_qk)",
        "maps_hqk * (factor * grad_sum_qk) / num_heads",
    ),
    "row sums left out": ("grad_hqk.addcmul_(maps_hqk, sums_hq1, value=-1)", "pass"),
    "sign of the row sums": ("sums_hq1, value=-1", "sums_hq1, value=1"),
    "sign of the logsumexp's": (
        "torch.neg(sums_hq1, out=grad_shift_hq1)",
        "grad_shift_hq1.copy_(sums_hq1)",
    ),
    "key not scaled": (
        "torch.mul(sum_hkd, scale, out=grad_key_hkd)",
        "grad_key_hkd.copy_(sum_hkd)",
    ),
    "last chunk only": (
        "part_hkd if sum_hkd is None else sum_hkd.add_(part_hkd)",
        "part_hkd",
    ),
    "columns shifted": (
        "column_k.clamp(0, num_columns - 1)",
        "column_k.clamp(1, num_columns - 1) - 1",
    ),
    "column -1 compared": ("difference_qk.masked_fill_(absent_k, 0.0)", "pass"),
    "heads not counted": ("/ (len(map_sum) * num_heads)", "/ len(map_sum)"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_turns_the_comparison_red(fault, tmp_path, monkeypatch):
    cases = [make(SHAPES["over one chunk"], given=given, columns=True) for given in (False, True)]
    for arguments in cases:
        check(arguments, (1e-9, 1e-9))
    mutant = load_mutant(plain.__file__, [fault], tmp_path)
    for name in ("sum_maps", "compare_with_base_", "backpropagate_maps"):
        monkeypatch.setattr(op, name, getattr(mutant, name))
    reds = 0
    for arguments in cases:
        try:
            check(arguments, (1e-9, 1e-9))
        except AssertionError:
            reds += 1
    assert reds


def replace(**changes):
    return lambda arguments: arguments | {k: f(arguments[k]) for k, f in changes.items()}


WRONG = {
    "query shape": (replace(query=lambda t: t[0]), "query: got shape .* want .batch, heads"),
    "no queries": (replace(query=lambda t: t[:, :, :0]), "query: got shape .* none of them 0"),
    "integers": (replace(query=lambda t: t.long()), "query: got dtype torch.int64"),
    "key heads": (replace(key=lambda t: t[:, :1]), "key: got shape .* head dim of query"),
    "key dtype": (replace(key=lambda t: t.float()), "key: got dtype torch.float32"),
    "device": (replace(key=lambda t: t.to("meta")), "key: is on meta, want cpu"),
    "logsumexp": (replace(logsumexp=lambda t: t[:, :, 1:]), "logsumexp: got shape"),
    "logsumexp dtype": (replace(logsumexp=lambda t: t.float()), "logsumexp: got dtype"),
    "base shape": (replace(base_map_sum=lambda t: t[:, 1:]), "base_map_sum: got shape"),
    "base dtype": (replace(base_map_sum=lambda t: t.bfloat16()), "base_map_sum: got dtype"),
    "base gradient": (replace(base_map_sum=lambda t: t.requires_grad_()), "torch.no_grad"),
    "columns dtype": (replace(columns=lambda t: t.double()), "columns: got dtype"),
    "columns shape": (replace(columns=lambda t: t[:, 1:]), "columns: got shape"),
    "columns device": (replace(columns=lambda t: t.to("meta")), "columns: is on meta"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_named(change, message):
    arguments = make(SHAPES["seven"], given=True, columns=True)
    with pytest.raises(ValueError, match=message):
        attention_alignment_loss(**change(arguments))


def test_a_base_of_other_columns_needs_columns():
    arguments = make(SHAPES["seven"])
    arguments["base_map_sum"] = arguments["base_map_sum"][:, :, :5]
    with pytest.raises(ValueError, match=r"base_map_sum: got shape \(2, 7, 5\), want \(2, 7, 7\)"):
        attention_alignment_loss(**arguments)
