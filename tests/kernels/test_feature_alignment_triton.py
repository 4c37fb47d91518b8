"""The kernels of feature alignment: on a GPU, or in Triton's interpreter, a process of its own."""

import sys

import pytest
import torch

from fastppt_kernels import align_features, feature_alignment_loss, feature_statistics
from fastppt_kernels.feature_alignment import launch, op
from fastppt_kernels.feature_alignment.reference import (
    feature_alignment_reference,
    feature_statistics_reference,
)
from fastppt_kernels.testing import (
    HAS_GPU,
    INTERPRETED,
    ForbidHostReads,
    draw_tensors,
    load_mutant,
    run_in_interpreter,
    worst_error,
)

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

# Large enough beside the variances for float32 to see it left out.
EPS = 1e-2
WEIGHTS = (0.7, -1.3)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GRAD_TOLERANCES = {F32: 1e-5, BF16: 1e-2, F16: 1e-2}


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


def channels_last(values):
    return values.contiguous(memory_format=torch.channels_last)


def tokens(values):
    """[B, N, C] after 3 others, as the views [B, C, N] that the launches take."""
    return inside(values.flatten(2).mT, (0, 3, 0)).mT


def inside(values, before, after=(0, 0, 0, 0)):
    """Return a view of the values into NaNs, so many ``before`` and ``after`` in each dimension."""
    sizes = [b + s + a for b, s, a in zip(before, values.shape, after, strict=False)]
    larger = torch.full(sizes, torch.nan, dtype=values.dtype, device=values.device)
    for dim, (start, size) in enumerate(zip(before, values.shape, strict=True)):
        larger = larger.narrow(dim, start, size)
    return larger.copy_(values)


# What makes features [B, C, ...] from [B, C, H, W], and the LAYOUT that is chosen for it.
LAYOUTS = {
    "contiguous": (torch.clone, "channels_first"),
    "channels_last": (channels_last, "channels_last"),
    "tokens behind others": (tokens, "channels_last"),
    "channels behind others": (lambda v: inside(v, (0, 2, 0, 0)), "channels_first"),
    "rows of more": (lambda v: inside(v, (0, 0, 1, 0), (0, 0, 2, 0)), "channels_first"),
    "crop": (lambda v: inside(v, (1, 2, 1, 3), (0, 1, 2, 1)), "strided"),
    "every other channel of channels_last": (
        lambda v: channels_last(v.repeat_interleave(2, 1))[:, ::2],
        "strided",
    ),
    "one sample for all": (lambda v: v[:1].expand_as(v), "channels_first"),
}
# Aligned or not; a tile of channels_last is 64 channels of 64 positions, of others 4 of 1024.
SHAPES = {
    "one position": (2, 3, 1, 1),
    "one channel": (2, 1, 3, 3),
    "odd": (2, 5, 3, 7),
    "aligned": (2, 16, 4, 4),
    "over a tile of channels": (1, 67, 2, 5),
    "over tiles of positions": (1, 3, 33, 32),
}


def make(shape, dtype, device, mean=2.0):
    """Return features and base statistics that differ from theirs by their own size."""
    drawn = [t.to(device) for t in draw_tensors([shape, shape[:2], shape[:2]])]
    return (drawn[0] + mean).to(dtype), drawn[1].float(), drawn[2].abs().float()


def check(features, base_mean, base_std):
    """Compare statistics, losses and gradients with float64 on the same values."""
    check_aligned(features, base_mean, base_std)
    exact = features.detach().double().requires_grad_()
    leaf = features.detach().requires_grad_()
    # A leaf of these strides, whatever they are.
    assert leaf.stride() == features.stride()
    statistics = feature_statistics(leaf, eps=EPS)
    wanted = feature_statistics_reference(exact, eps=EPS)
    losses = feature_alignment_loss(leaf, base_mean, base_std, eps=EPS)
    wanted_losses = feature_alignment_reference(exact, base_mean, base_std, eps=EPS)
    given = [t.detach() for t in (*statistics, *losses)]
    assert worst_error(given, [t.detach() for t in (*wanted, *wanted_losses)]) <= 1e-5
    totals = [
        sum(w * t for w, t in zip(WEIGHTS, both, strict=True)) for both in (losses, wanted_losses)
    ]
    totals += [(mean * base_mean + std * base_std).sum() for mean, std in (statistics, wanted)]
    for total, wanted_total in (totals[:2], totals[2:]):
        (grad,) = torch.autograd.grad(total, leaf)
        (wanted_grad,) = torch.autograd.grad(wanted_total, exact)
        assert worst_error([grad], [wanted_grad]) <= GRAD_TOLERANCES[features.dtype]
        assert grad.stride() == torch.empty_like(features).stride()


def check_aligned(features, base_mean, base_std):
    """Compare the gradient of features that go on, added to what flows into them, with float64."""
    leaf = features.detach().requires_grad_()
    exact = features.detach().double().requires_grad_()
    incoming = draw_tensors([features.shape], seed=3)[0].to(features)
    incoming = torch.empty_like(features).copy_(1e-2 * incoming)
    aligned, *losses = align_features(leaf, base_mean, base_std, eps=EPS)
    assert torch.equal(aligned, features)
    wanted_losses = feature_alignment_reference(exact, base_mean, base_std, eps=EPS)
    total, wanted_total = (
        sum(w * t for w, t in zip(WEIGHTS, both, strict=True)) for both in (losses, wanted_losses)
    )
    (grad,) = torch.autograd.grad([aligned, total], leaf, [incoming, None])
    (wanted,) = torch.autograd.grad(wanted_total, exact)
    assert worst_error([grad], [wanted + incoming.double()]) <= GRAD_TOLERANCES[features.dtype]
    assert grad.stride() == torch.empty_like(features).stride()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("lay", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.usefixtures("_poisoned_scratch")
def test_all_results_equal_the_reference(device, lay, shape, dtype):
    features, *base = make(shape, dtype, device)
    check(lay(features), *base)


@pytest.mark.parametrize(("lay", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.usefixtures("_poisoned_scratch")
def test_every_memory_layout_gives_the_same(device, lay, layout):
    features, *base = make((2, 6, 5, 8), F16, device)
    features = lay(features)
    check(features, *base)
    strides = launch.read_strides(features, torch.empty_like(features))
    assert launch.choose_layout(features, strides)[0] == layout


@pytest.mark.parametrize("lay", [torch.clone, channels_last])
def test_aligned_strides_at_an_odd_address_give_the_same(device, lay):
    features, *base = make((2, 16, 4, 4), BF16, device)
    features = lay(features)
    memory = features.new_empty(features.numel() + 1)
    shifted = memory.as_strided(features.shape, features.stride(), 1).copy_(features)
    assert launch.choose_layout(shifted, launch.read_strides(shifted))[1]
    check(shifted, *base)


def test_loads_are_wide_where_all_strides_and_the_size_along_the_memory_allow():
    def aligned(features):
        return launch.choose_layout(features, launch.read_strides(features))[1]

    assert aligned(torch.ones(2, 3, 4, 8)) and aligned(channels_last(torch.ones(2, 32, 3, 3)))
    assert aligned(torch.ones(2, 7, 48).mT[:, :32])
    assert not aligned(torch.ones(2, 3, 4, 7))
    assert not aligned(channels_last(torch.ones(2, 33, 4, 4)))
    # 32 channels, positions 40 elements apart; channels 40 elements apart.
    assert not aligned(torch.ones(2, 7, 40).mT[:, :32])
    assert not aligned(torch.ones(2, 3, 5, 8)[:, :, :4])
    assert aligned(torch.ones(1, 3, 3, 16)) and not aligned(torch.ones(1, 3, 3, 32)[..., ::2])


@pytest.mark.parametrize("wanted_programs", [1, 6, 512])
@pytest.mark.parametrize(
    ("lay", "shape"), [(torch.clone, (1, 3, 70, 33)), (channels_last, (1, 5, 33, 6))]
)
def test_any_number_of_splits_gives_the_same(device, monkeypatch, wanted_programs, lay, shape):
    features, *base = make(shape, F32, device, mean=30.0)
    monkeypatch.setattr(launch, "WANTED_PROGRAMS", wanted_programs)
    layout = "channels_last" if lay is channels_last else "channels_first"
    tiles = -(-features[0, 0].numel() // launch.TILES[layout][1])
    num_splits = launch.cut_positions(features[0, 0].numel(), layout, 1)[1]
    assert num_splits == min(wanted_programs, tiles)
    check(lay(features), *base)


@pytest.mark.parametrize("layout", launch.TILES)
@pytest.mark.parametrize("num_programs", [1, 20, 320, 5000])
def test_splits_cover_all_positions_and_are_as_few_as_the_merge_takes(layout, num_programs):
    for num_positions in (1, 63, 64, 65, 1024, 4096, 16384, 100_003):
        length, num_splits = launch.cut_positions(num_positions, layout, num_programs)
        assert (num_splits - 1) * length < num_positions <= num_splits * length
        assert length % launch.TILES[layout][1] == 0
        assert num_splits <= launch.MAX_SPLITS


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("lay", [torch.clone, channels_last])
def test_features_of_the_base_have_no_loss_and_no_gradient(device, lay, dtype):
    features = lay(make((2, 67, 5, 13), dtype, device)[0]).requires_grad_()
    base = feature_statistics(features.detach())
    losses = feature_alignment_loss(features, *base)
    assert [float(x.detach()) for x in losses] == [0.0, 0.0]
    sum(losses).backward()
    assert not features.grad.any()


# What flows into features, their layout, and whether it is read where it lies.
INCOMING = {
    "some of the channels": (torch.clone, lambda v: inside(v, (0, 2, 0, 0), (0, 3, 0, 0)), True),
    "some of the channels of channels_last": (
        channels_last,
        lambda v: inside(v.permute(0, 2, 3, 1), (0, 0, 0, 2), (0, 0, 0, 3)).permute(0, 3, 1, 2),
        True,
    ),
    "channels_last": (torch.clone, channels_last, False),
    "contiguous": (channels_last, torch.clone, False),
    "a crop": (torch.clone, lambda v: inside(v, (1, 2, 1, 3), (0, 1, 2, 1)), False),
    "the same for all": (torch.clone, lambda v: v[:1, :1, :1, :1].expand_as(v), False),
    "of a crop": (lambda v: inside(v, (1, 2, 1, 3), (0, 1, 2, 1)), torch.clone, True),
}


@pytest.mark.parametrize(("lay", "lay_incoming", "is_read"), INCOMING.values(), ids=INCOMING.keys())
@pytest.mark.parametrize("shape", [(2, 6, 5, 8), (2, 16, 4, 8), (1, 3, 1, 7), (3, 1, 1, 1)])
@pytest.mark.usefixtures("_poisoned_scratch")
def test_what_flows_in_may_have_strides_of_its_own(device, lay, lay_incoming, is_read, shape):
    values, *base = make(shape, BF16, device)
    features = lay(values)
    mean, std = feature_statistics(features)
    incoming = lay_incoming(values.cos())
    given = (features, mean, std, *base, *torch.tensor(WEIGHTS, device=device))
    grad = op._backward(*given, incoming)
    assert grad.stride() == torch.empty_like(features).stride()
    assert torch.equal(grad, op._backward(*given, torch.empty_like(grad).copy_(incoming)))
    if shape[1] > 1 and values[0, 0].numel() > 7:
        assert launch.lies_like(incoming, grad) == is_read


def test_what_flows_in_may_need_more_strides_than_the_features():
    values = torch.ones(2, 3, 4, 6, 8)
    assert not launch.lies_like(inside(values, (0, 0, 1, 1, 1), (0, 0, 1, 1, 1)), values)
    assert launch.lies_like(inside(values, (0, 1, 0, 0, 0), (0, 0, 0, 0, 0)), values)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("lay", [torch.clone, channels_last])
def test_features_of_the_base_pass_their_gradient_on_bit_by_bit(device, dtype, lay):
    features = lay(make((2, 67, 5, 13), dtype, device)[0]).requires_grad_()
    base = feature_statistics(features.detach())
    aligned, *losses = align_features(features, *base)
    incoming = lay(draw_tensors([features.shape], seed=3)[0].to(features))
    torch.autograd.backward([aligned, sum(losses)], [incoming, None])
    assert torch.equal(features.grad, incoming)


@pytest.mark.parametrize("value", [0.0, 3.7, -1000.0])
def test_features_without_variance_have_finite_losses_and_gradients(device, value):
    features = torch.full((2, 3, 5, 5), value, device=device, requires_grad=True)
    _, *base = make((2, 3, 5, 5), F32, device)
    _, std = feature_statistics(features.detach(), eps=1e-6)
    torch.testing.assert_close(std, torch.full_like(std, 1e-3), rtol=1e-2, atol=0)
    losses = feature_alignment_loss(features, *base)
    sum(losses).backward()
    assert all(x.isfinite() for x in losses) and features.grad.isfinite().all()


def test_a_large_mean_leaves_the_deviation_right(device):
    features, *base = make((1, 5, 33, 32), F32, device, mean=300.0)
    check(features, *base)
    check(channels_last(features), *base)


def test_two_runs_are_equal(device):
    features, *base = make((2, 5, 33, 32), BF16, device)
    results = []
    for _ in range(2):
        leaf = features.clone().requires_grad_()
        losses = feature_alignment_loss(leaf, *base)
        results.append([*losses, *torch.autograd.grad(sum(losses), leaf)])
    assert all(map(torch.equal, *results))


class ForbidCopies(ForbidHostReads):
    """Refuses to copy features too; the interpreter copies memory as a whole, of one dimension."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy)
        assert func.overloadpacket not in copies or args[0].dim() < 3
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_nothing_is_read_on_the_host_and_no_feature_is_copied(device):
    features, base_mean, base_std = make((2, 6, 5, 8), BF16, device)
    crop = inside(features, (1, 2, 1, 3))
    # The mode does not see into an operation.
    with ForbidCopies():
        with pytest.raises(AssertionError):
            crop.contiguous()
        mean, std, mean_loss, _ = launch.launch_statistics(crop, (base_mean, base_std), EPS)
        base = (base_mean, base_std)
        grad = launch.launch_backward(crop, mean, std, base, mean_loss, mean_loss, None)
        launch.launch_backward(crop, mean, std, base, mean_loss, mean_loss, grad)


def test_float64_takes_the_plain_path(device):
    features, *base = make((2, 3, 4, 5), torch.float64, device)
    losses = feature_alignment_loss(features, *base, eps=EPS)
    wanted = feature_alignment_reference(features, *base, eps=EPS)
    assert worst_error(losses, wanted) < 1e-12


def test_positions_of_three_strides_are_refused(device):
    features = torch.ones(2, 3, 4, 6, 8, device=device)[:, :, 1:3, 1:5, 1:7]
    with pytest.raises(ValueError, match=r"features: got strides .* pass features.contiguous\(\)"):
        feature_statistics(features)
    feature_statistics(features.contiguous())


def test_opcheck_is_green(device):
    features, *base = make((2, 3, 4, 5), BF16, device)
    features.requires_grad_()
    # Compiling in the interpreter calls for what the interpreter has not.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastppt_kernels.feature_statistics, (features, EPS), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.fastppt_kernels.feature_alignment, (features, *base, EPS), test_utils=tests
    )


FAULTS = {
    "mean of squares": [
        ("tl.where(mask, value - tile_mean[:, None], 0.0)", "value"),
        ("tl.sum(deviation * deviation, 1)", "tl.sum(value * value, 1) - tile_count * tile_mean"),
    ],
    "masked positions counted": [
        ("tl.where(mask, value - tile_mean[:, None], 0.0)", "value - tile_mean[:, None]")
    ],
    "a split left out": [("(split < num_splits)[:, None]", "(split < num_splits - 1)[:, None]")],
    "means of splits weigh alike": [
        ("tl.sum(part_count * part_mean, 0) / count", "tl.sum(part_mean, 0) / num_splits")
    ],
    "between splits nothing varies": [("part_square + part_count * delta * delta", "part_square")],
    "between tiles nothing varies": [
        ("square + other_square + delta * delta * count * share", "square + other_square")
    ],
    "eps left out": [("square / count + eps", "square / count")],
    "sum over samples": [("tl.sum(mean_squares) / num_samples", "tl.sum(mean_squares)")],
    "losses exchanged": [
        (
            "std_squares += tl.where(row_mask, std_delta * std_delta, 0.0)",
            "std_squares += tl.where(row_mask, mean_delta * mean_delta, 0.0)",
        )
    ],
    "wrong sign": [("mean_delta = mean - tl.load(", "mean_delta = -mean + tl.load(")],
    "no centre": [("(value - mean[:, None])", "value")],
    "std once too often": [("std_grad / (count * std)", "std_grad / (count * std * std)")],
    "factor 2 missing": [("factor = 2.0 /", "factor = 1.0 /")],
    "one sample read for all": [("sample.to(tl.int64) * stride_b", "sample.to(tl.int64) * 0")],
    "what flows in is not read": [("if incoming_ptr is not None:", "if False:")],
    "what flows in, read where the features are": [
        ("tl.load(incoming_ptr + incoming_offsets", "tl.load(incoming_ptr + offsets")
    ],
    "what flows in takes the gradient's place": [("grad += tl.load(", "grad = tl.load(")],
    "rows of a crop": [("row.to(tl.int64) * stride_h", "row.to(tl.int64) * width")],
}


@pytest.mark.slow
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_turns_the_comparison_red(device, monkeypatch, tmp_path, faults):
    from fastppt_kernels.feature_alignment import triton_kernel

    # Two splits of two tiles, a smaller one last; a crop, so that no stride is another.
    monkeypatch.setattr(launch, "WANTED_PROGRAMS", 4)
    features, *base = make((2, 3, 51, 72), F32, device)
    features = inside(features, (1, 1, 1, 3))
    check(features, *base)
    mutant = load_mutant(triton_kernel.__file__, faults, tmp_path)
    monkeypatch.setitem(sys.modules, triton_kernel.__name__, mutant)
    with pytest.raises(AssertionError):
        check(features, *base)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_aligned_features_are_read_and_written_16_bytes_at_a_time(layout):
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for configuration in launch.kernel_configurations():
        given = configuration.constexprs
        if (
            given.get("LAYOUT") != layout
            or not given["ALIGNED"]
            or "bfloat16" not in configuration.name
        ):
            continue
        kinds = configuration.signature.values()
        attributes = {
            (i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind.startswith("*")
        }
        source = ASTSource(configuration.kernel, configuration.signature, given, attributes)
        options = {"num_warps": configuration.num_warps}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert "ld.global.v4.b32" in ptx and ".global.b16" not in ptx
        assert ("st.global.v4.b32" in ptx) == configuration.name.startswith("feature_backward")


# Of a layer of SDXL at 1024 px, of SD1.5 at 512 px, and the image tokens of SD3-M at 1024 px.
REAL = {
    "SDXL, 32x32": ((1, 1280, 32, 32), torch.clone),
    "SDXL, 64x64": ((1, 640, 64, 64), channels_last),
    "SD1.5, 64x64": ((2, 320, 64, 64), torch.clone),
    "SD3-M": ((1, 1536, 64, 64), tokens),
}


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("shape", "lay"), REAL.values(), ids=REAL.keys())
def test_layers_of_real_networks_equal_the_reference(shape, lay, dtype):
    features, *base = make(shape, dtype, "cuda")
    features = lay(features)
    check(features, *base)
    leaf = features.detach().requires_grad_()
    losses = feature_alignment_loss(leaf, *feature_statistics(features))
    assert [x.item() for x in losses] == [0.0, 0.0]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("lay", [torch.contiguous_format, torch.channels_last])
def test_features_beyond_2_to_the_31_elements_are_right_at_both_ends(lay):
    shape = (1, 48, 8192, 8192)
    # Nothing varies within a channel: its mean and its gradient are exact.
    value = torch.arange(1.0, 49.0, device="cuda")[None]
    features = torch.empty(shape, dtype=BF16, device="cuda", memory_format=lay)
    features.copy_(value[..., None, None]).requires_grad_()
    mean, _ = feature_statistics(features)
    assert torch.equal(mean, value)
    (grad,) = torch.autograd.grad((mean * value).sum(), features)
    for ends in (grad.amin((2, 3)), grad.amax((2, 3))):
        assert torch.equal(ends.float(), value / 2**26)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_compiled_and_replayed_equal_eager_and_nothing_waits_for_the_device():
    features, *base = make((2, 64, 16, 16), BF16, "cuda")

    def run(leaf):
        aligned, mean_loss, std_loss = align_features(leaf, *base)
        return torch.autograd.grad([aligned, mean_loss + 0.7 * std_loss], leaf, [incoming, None])[0]

    leaf = features.clone().requires_grad_()
    incoming = torch.sin(features)
    wanted = run(leaf)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(leaf)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(leaf)
    graph.replay()
    assert torch.equal(replayed, wanted)

    def total(leaf):
        aligned, *losses = align_features(leaf, *base)
        return (aligned * incoming).sum() + sum(losses) + sum(feature_alignment_loss(leaf, *base))

    compiled = torch.compile(total, fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(leaf), leaf)
    (eager,) = torch.autograd.grad(total(leaf), leaf)
    # The sum of the two gradients is rounded by Inductor's addition or by autograd's.
    torch.testing.assert_close(grad, eager, rtol=2**-7, atol=1e-4)
