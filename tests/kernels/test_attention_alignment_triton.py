"""The kernels of the attention maps: on a GPU, or in Triton's interpreter, a process apart."""

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from fastppt_kernels import attention_alignment_loss, attention_map_sum
from fastppt_kernels.attention_alignment import (
    launch,
    plan,
    triton_backward_key_kernel,
    triton_backward_query_kernel,
    triton_kernel,
    triton_tiles,
)
from fastppt_kernels.attention_alignment.reference import (
    attention_alignment_reference,
    attention_map_sum_reference,
)
from fastppt_kernels.testing import (
    HAS_GPU,
    INTERPRETED,
    ForbidHostReads,
    load_mutant,
    overall_error,
    run_in_interpreter,
)

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

# (batch, heads, queries, keys, head dim)
SHAPES = {
    "one": (1, 1, 1, 1, 1),
    "seven": (2, 2, 7, 7, 7),
    "two groups of heads": (2, 6, 9, 77, 40),
    "over one block": (1, 2, 63, 20, 80),
    "several tiles": (1, 1, 20, 154, 64),
    "widest head": (1, 1, 17, 70, 160),
}
# Loss and gradients.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-5, 1e-2),
    torch.float16: (1e-5, 1e-2),
}


@pytest.fixture(
    params=[pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=needs_gpu)]
)
def device(request):
    return request.param


@pytest.fixture
def _poisoned_scratch():
    """Fill every torch.empty with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_the_kernels_pass_in_the_interpreter():
    run_in_interpreter(__file__, "not gpu and not slow")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_the_kernels_pass_the_slow_tests_in_the_interpreter():
    run_in_interpreter(__file__, "not gpu and slow")


def make(device, shape, dtype=torch.float32, *, given=False, columns=False, logit_size=1.0):
    """Return the loss's arguments; query and key as an attention processor makes them."""
    num_batches, num_heads, num_queries, num_keys, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))

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
    arguments["base_map_sum"] = base.to(device, torch.float32)
    if given:
        logits = query.detach().double() @ key.detach().double().mT * head_dim**-0.5
        more = 0.5 + draw(num_batches, num_heads, num_queries).abs().to(device)
        arguments["logsumexp"] = (logits.logsumexp(-1) + more).float().requires_grad_()
    if columns:
        drawn = torch.randint(-1, num_columns, (num_batches, num_keys), generator=generator)
        arguments["columns"] = drawn.to(device)
    return arguments


def run(arguments, loss=attention_alignment_loss):
    """Return the loss and the gradients."""
    value = loss(**arguments)
    names = [name for name in ("query", "key", "logsumexp") if name in arguments]
    return [value, *torch.autograd.grad(value, [arguments[name] for name in names])]


def run_reference(arguments, reference=attention_alignment_reference):
    exact = {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in arguments.items()
    }
    return run(exact | {"scale": arguments["query"].shape[-1] ** -0.5}, reference)


def check(arguments, tolerances=None):
    """Compare the loss and each gradient, by its norm, with float64."""
    tolerances = tolerances or TOLERANCES[arguments["query"].dtype]
    given, wanted = run(arguments), run_reference(arguments)
    for index, (got, exact) in enumerate(zip(given, wanted, strict=True)):
        assert got.isfinite().all(), f"{index}: not finite"
        error = overall_error([got], [exact])
        # Of one key the maps are constant: all gradients vanish but for rounding.
        vanishes = exact.norm() <= 1e-14 and got.double().norm() <= 1e-6
        assert error <= tolerances[index > 0] or vanishes, f"{index}: off by {error:.1e}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("given", [False, True], ids=["softmax", "logsumexp given"])
@pytest.mark.usefixtures("_poisoned_scratch")
def test_loss_and_gradients_equal_the_reference(device, shape, given):
    check(make(device, shape, given=given))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("given", [False, True], ids=["softmax", "logsumexp given"])
@pytest.mark.usefixtures("_poisoned_scratch")
def test_narrow_inputs_are_right_to_their_rounding(device, dtype, shape, given):
    check(make(device, shape, dtype, given=given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits_of_the_queries_are_summed(device, dtype, monkeypatch):
    rows = plan.key_tiling(dtype, 16).block_queries
    monkeypatch.setattr(plan, "SPLIT_PROGRAMS", 1)
    monkeypatch.setattr(plan, "SPLIT_QUERIES", 2 * rows)
    # Two splits of two blocks, the last block not full.
    check(make(device, (1, 1, 3 * rows + 3, 5, 16), dtype))


@pytest.mark.parametrize("shape", ["seven", "two groups of heads"])
def test_columns_choose_what_is_compared(device, shape):
    check(make(device, SHAPES[shape], columns=True))


@pytest.mark.parametrize("column", [9, -2])
def test_a_column_that_is_not_there_makes_the_loss_nan(device, column):
    arguments = make(device, SHAPES["seven"], columns=True)
    arguments["columns"][0, 3] = column
    assert attention_alignment_loss(**arguments).isnan()


@pytest.mark.parametrize("given", [False, True])
def test_map_sum_and_its_gradients_equal_the_reference(device, given):
    arguments = make(device, SHAPES["two groups of heads"], given=given)
    base = arguments.pop("base_map_sum")

    def weighted(function):
        return lambda **tensors: (function(**tensors) * base).sum()

    wanted = run_reference(arguments, weighted(attention_map_sum_reference))
    for got, exact in zip(run(arguments, weighted(attention_map_sum)), wanted, strict=True):
        assert overall_error([got], [exact]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [pytest.param("two groups of heads", marks=pytest.mark.slow), "several tiles"]
)
@pytest.mark.parametrize("given", [False, True])
def test_a_base_equal_to_the_map_gives_zeros(device, dtype, shape, given):
    arguments = make(device, SHAPES[shape], dtype, given=given)
    maps = {k: v for k, v in arguments.items() if k != "base_map_sum"}
    with torch.no_grad():
        arguments["base_map_sum"] = attention_map_sum(**maps)
    assert not any(result.any() for result in run(arguments))


@pytest.mark.parametrize("num_keys", [5, 100])
def test_extreme_logits_are_finite(device, num_keys):
    arguments = make(device, (1, 2, 9, num_keys, 16), logit_size=40.0)
    assert (arguments["query"] @ arguments["key"].mT / 4).abs().max() > 80
    # Maps of nearly 0 and 1, whose gradient is a difference of nearly equal numbers.
    check(arguments, (1e-4, 1e-2))


def test_strides_do_not_matter(device):
    arguments = make(device, SHAPES["over one block"])
    twins = [dict(arguments) for _ in range(2)]
    for name in ("query", "key"):
        values = arguments[name].detach()
        twins[0][name] = values.contiguous().requires_grad_()
        # Rows at odd places, elements of a row apart.
        wide = torch.zeros(*values.shape[:3], 2 * values.shape[3] + 1, device=device)
        twins[1][name] = wide[..., 1::2].copy_(values).requires_grad_()
    for twin in twins:
        for one, other in zip(run(arguments), run(twin), strict=True):
            assert overall_error([one], [other.double()]) <= 1e-6


def lay_out(tensor, order):
    """Return the tensor with its dimensions in memory in this order."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.detach().permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)])
@pytest.mark.parametrize("given", [False, True])
def test_the_layouts_of_the_gradients_are_those_that_a_compiler_is_told(device, order, given):
    arguments = make(device, SHAPES["seven"], given=given)
    query, key, grad = (arguments[n] for n in ("query", "key", "base_map_sum"))
    tensors = [lay_out(query, order), lay_out(key, order), grad, grad.new_ones(())]
    logsumexp = lay_out(arguments["logsumexp"], (0, 2, 1)) if given else None
    backward = torch.ops.fastppt_kernels.attention_map_backward
    real = backward(*tensors, 1.0, 0.3, logsumexp)
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in tensors]
        logsumexp = mode.from_tensor(logsumexp) if given else None
        fake = backward(*tensors, 1.0, 0.3, logsumexp)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_one_batch_for_all_is_read_in_place(device):
    arguments = make(device, (1, 2, 9, 7, 16))
    arguments["key"] = arguments["key"].detach().expand(3, -1, -1, -1).requires_grad_()
    arguments["query"] = make(device, (3, 2, 9, 7, 16))["query"]
    arguments["base_map_sum"] = arguments["base_map_sum"].expand(3, -1, -1)
    check(arguments)


def test_tokens_beyond_32_bits_apart_are_copied():
    tokens_first = torch.empty(16384, 128, 20, 64, device="meta").permute(1, 2, 0, 3)
    assert tokens_first.stride(2) * tokens_first.shape[2] > 2**31
    assert launch._readable(tokens_first).is_contiguous()
    heads_of_tokens = torch.empty(128, 16384, 20, 64, device="meta").transpose(1, 2)
    assert launch._readable(heads_of_tokens) is heads_of_tokens


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("num_keys", [7, 100])
def test_query_key_and_difference_are_kept_for_the_backward(device, given, num_keys):
    arguments = make(device, (2, 2, 9, num_keys, 16), given=given)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        attention_alignment_loss(**arguments)
    wanted = [arguments[n].shape for n in ("query", "key", "logsumexp") if n in arguments]
    assert sorted(kept) == sorted([*wanted, arguments["base_map_sum"].shape])


def test_slices_of_joint_tokens_are_read_in_place(device):
    arguments = make(device, (1, 2, 27, 27, 16), given=True)
    sliced = arguments | {
        "query": arguments["query"].detach()[:, :, :20].requires_grad_(),
        "key": arguments["key"].detach()[:, :, 20:].requires_grad_(),
        "base_map_sum": arguments["base_map_sum"][:, :20, 20:],
        "logsumexp": arguments["logsumexp"].detach()[:, :, :20].requires_grad_(),
    }
    check(sliced)


@pytest.mark.slow
def test_two_runs_are_equal(device):
    arguments = make(device, SHAPES["two groups of heads"])
    assert all(map(torch.equal, run(arguments), run(arguments)))


def test_nothing_is_read_on_the_host(device):
    arguments = make(device, SHAPES["seven"], columns=True)
    # The interpreter reads every pointer itself.
    if device == "cuda":
        with ForbidHostReads():
            run(arguments)


def test_the_ops_pass_opcheck(device):
    arguments = make(device, SHAPES["seven"], columns=True)
    query, key, base, columns = arguments.values()
    ops = torch.ops.fastppt_kernels
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.attention_map_sum, (query, key, 0.3, None), test_utils=checks)
    torch.library.opcheck(
        ops.attention_alignment, (query, key, base, 0.3, None, columns), test_utils=checks
    )


# (module, right, wrong)
FAULTS = {
    "a group left out": (triton_kernel, "group < num_groups:", "group < num_groups - 1:"),
    "a head left out": (triton_kernel, "while head < last:", "while head < last - 1:"),
    "keys past the end": (
        triton_tiles,
        'tl.where(keys < num_keys, 0.0, float("-inf"))',
        "tl.where(keys < num_keys, 0.0, 0.0)",
    ),
    "rest of the keys left out": (triton_tiles, "total += tl.sum(rest, 1)", "total += 0.0"),
    "columns ignored": (
        triton_kernel,
        "column = tl.load(columns_ptr + batch * num_keys + column, mask=mask, other=-1)",
        "pass",
    ),
    "row sums left out of dQ": (
        triton_backward_query_kernel,
        "main * (main_grads - sums[:, None])",
        "main * main_grads",
    ),
    "row sums left out of dQ of several tiles": (
        triton_backward_query_kernel,
        "maps * (grads - sums[:, None])",
        "maps * grads",
    ),
    "row sums left out of dK": (
        triton_backward_key_kernel,
        "grads -= sums[:, None]",
        "grads -= 0.0",
    ),
    "scale left out of dQ": (triton_backward_query_kernel, "    factor = factor * scale\n", ""),
    "sign of the logsumexp's": (
        triton_backward_query_kernel,
        "sums = -factor * sums",
        "sums = factor * sums",
    ),
    "logsumexp of the softmax not kept": (
        triton_tiles,
        "highest + tl.log(total)",
        "highest",
    ),
    "last block of a split left out": (
        triton_backward_key_kernel,
        "while first < last:",
        "while first < last - BLOCK_QUERIES:",
    ),
    "a split left out": (
        triton_backward_key_kernel,
        "split < num_splits:",
        "split < num_splits - 1:",
    ),
}
KERNELS = {
    triton_kernel: (
        "attention_logsumexp_kernel",
        "attention_map_sum_kernel",
        "attention_difference_kernel",
    ),
    triton_backward_query_kernel: ("attention_map_backward_query_kernel",),
    triton_backward_key_kernel: (
        "attention_map_backward_key_kernel",
        "attention_sum_splits_kernel",
    ),
    triton_tiles: ("logits_of", "softmax_maps", "shifted_maps"),
}


def plant(monkeypatch, folder, module, right, wrong):
    """Put a mutant's kernels in the place of those of ``module``."""
    mutant = load_mutant(module.__file__, [(right, wrong)], folder)
    for name in KERNELS[module]:
        for user in (module, *KERNELS) if module is triton_tiles else (module,):
            if hasattr(user, name):
                monkeypatch.setattr(user, name, getattr(mutant, name))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_turns_the_comparison_red(device, fault, tmp_path, monkeypatch):
    rows = plan.key_tiling(torch.bfloat16, 16).block_queries
    monkeypatch.setattr(plan, "SPLIT_PROGRAMS", 1)
    monkeypatch.setattr(plan, "SPLIT_QUERIES", 2 * rows)
    cases = [
        make(device, (1, 6, 2 * rows + 3, 70, 16), torch.bfloat16, columns=True),
        make(device, (1, 1, 9, 5, 16), given=True),
        make(device, (1, 1, 9, 40, 16)),
    ]
    for arguments in cases:
        check(arguments)
    plant(monkeypatch, tmp_path, *fault)
    reds = 0
    for arguments in cases:
        try:
            check(arguments)
        except AssertionError:
            reds += 1
    assert reds


# SDXL's layers, SD1.5's, and the text columns of SD3-M's.
LAYERS = {
    "SDXL 64x64": ((1, 10, 4096, 77, 64), False),
    "SDXL 32x32": ((1, 20, 1024, 77, 64), False),
    "SD1.5 64x64": ((1, 8, 4096, 77, 40), False),
    "SD1.5 32x32": ((2, 8, 1024, 77, 80), False),
    "SD1.5 16x16": ((1, 8, 256, 77, 160), False),
    "SD3-M, 154": ((1, 24, 4096, 154, 64), True),
    "SD3-M, 333": ((1, 24, 4096, 333, 64), True),
    "long prompt": ((1, 10, 4096, 231, 64), False),
    "most keys": ((1, 4, 1000, 512, 128), False),
    "most queries": ((1, 4, 16384, 77, 64), False),
}


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_real_layers_equal_the_reference_and_two_runs_each_other(layer, dtype):
    shape, given = layer
    arguments = make("cuda", shape, dtype, given=given)
    check(arguments)
    assert all(map(torch.equal, run(arguments), run(arguments)))
    maps = {k: v for k, v in arguments.items() if k != "base_map_sum"}
    with torch.no_grad():
        arguments["base_map_sum"] = attention_map_sum(**maps)
    assert not any(result.any() for result in run(arguments))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_compiled_whole_equals_eager():
    arguments = make("cuda", (1, 10, 1024, 77, 64), torch.bfloat16)
    compiled = torch.compile(lambda **t: 2 * attention_alignment_loss(**t), fullgraph=True)
    eager = run(arguments, lambda **t: 2 * attention_alignment_loss(**t))
    assert all(map(torch.equal, run(arguments, compiled), eager))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_replayed_graph_equals_eager():
    arguments = make("cuda", (1, 10, 1024, 77, 64), torch.bfloat16)
    eager = run(arguments)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(arguments)
    graph.replay()
    assert all(map(torch.equal, captured, eager))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_peak_memory_is_a_quarter_of_the_maps(dtype):
    shape = (1, 10, 4096, 77, 64)
    arguments = make("cuda", shape, dtype)
    run(arguments)
    torch.cuda.reset_peak_memory_stats()
    # What was asked for, not the blocks that the allocator had lying about.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = run(arguments)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    returned = sum(result.nbytes for result in results)
    assert peak - returned <= 4 * 10 * 4096 * 77 / 4


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_heads_and_batches_may_be_more_than_a_grid_is_high():
    check(make("cuda", (3300, 20, 3, 5, 16), torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_layers_of_another_size_compile_nothing_new(monkeypatch):
    compiled = []

    def note(**of_kernel):
        compiled.append(of_kernel["repr"])

    run(make("cuda", (1, 10, 4096, 77, 64), torch.bfloat16))
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    run(make("cuda", (1, 20, 1024, 77, 64), torch.bfloat16))
    run(make("cuda", (2, 20, 576, 77, 64), torch.bfloat16))
    assert not compiled
