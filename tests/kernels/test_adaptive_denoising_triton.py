"""The kernels of the adaptive denoising loss: on a GPU, or in Triton's interpreter, on its own."""

import sys

import pytest
import torch

from fastppt_kernels import adaptive_denoising_loss
from fastppt_kernels.adaptive_denoising import launch
from fastppt_kernels.adaptive_denoising.reference import adaptive_denoising_reference
from fastppt_kernels.testing import (
    HAS_GPU,
    INTERPRETED,
    ForbidHostReads,
    draw_denoising_arguments,
    load_mutant,
    run_in_interpreter,
    worst_error,
)

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GRAD_TOLERANCES = {F32: 1e-5, BF16: 1e-2, F16: 1e-2}
BLOCK = launch.BLOCK_SIZE
NUM_BINS = 10


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


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_the_kernels_pass_in_the_interpreter():
    run_in_interpreter(__file__)


def make(device, num_samples=3, shape=(4, 5, 7), dtype=F32, *, weights=True):
    return draw_denoising_arguments(num_samples, shape, dtype, weights=weights, device=device)


def check(arguments, **settings):
    """Compare all results and the gradient with float64 on the same values."""
    prediction = arguments["prediction"]
    results = []
    for function, dtype in (
        (adaptive_denoising_loss, prediction.dtype),
        (adaptive_denoising_reference, torch.float64),
    ):
        leaf = prediction.detach().to(dtype).requires_grad_()
        loss, *others = function(**arguments | {"prediction": leaf}, **settings)
        # So large that float16 has digits for it.
        (grad,) = torch.autograd.grad(1.7 * leaf.numel() * loss, leaf)
        results.append([loss.detach(), *others, grad])
    given, wanted = results
    assert worst_error(given[:1], wanted[:1]) <= 1e-5
    torch.testing.assert_close(given[1].double(), wanted[1], rtol=0, atol=1e-5)
    for new, wanted_new in zip(given[2:4], wanted[2:4], strict=True):
        torch.testing.assert_close(new.double(), wanted_new, rtol=1e-6, atol=0, equal_nan=True)
    assert worst_error(given[4:], wanted[4:]) <= GRAD_TOLERANCES[prediction.dtype]
    assert given[4].stride() == torch.empty_like(prediction).stride()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(1,), (63,), (4, 4, 4), (3, BLOCK // 3 + 5)])
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.usefixtures("_poisoned_scratch")
def test_all_results_equal_the_reference(device, num_samples, shape, dtype):
    check(make(device, num_samples, shape, dtype))


@pytest.mark.usefixtures("_poisoned_scratch")
def test_more_samples_bins_and_blocks_than_are_read_at_a_time(device, monkeypatch):
    check(make(device, launch.INDICATOR_TILE["BLOCK_SAMPLES"] + 3, (5,)))
    arguments = make(device, 5, (33, 7))
    for name in ("base_ema", "tuned_ema"):
        arguments[name] = torch.cat([arguments[name], arguments[name]])
    arguments["bins"] += torch.tensor([0, 10, 0, 10, 13], device=device)
    monkeypatch.setattr(launch, "BLOCK_SIZE", 4)
    assert launch.INDICATOR_TILE["BLOCK_BLOCKS"] < 33 * 7 / 4
    check(arguments)


@pytest.mark.parametrize("settings", [{"temperature": 100.0}, {"smoothing": 1.0}])
@pytest.mark.parametrize("weights", [True, False])
def test_settings_and_weights_are_those_of_the_reference(device, settings, weights):
    check(make(device, weights=weights), **settings)


@pytest.mark.parametrize("dtypes", [(BF16, BF16, F32), (F16, F16, F32), (F32, BF16, F16)])
def test_mixed_dtypes_are_computed_in_float32(device, dtypes):
    arguments = make(device)
    names = ("prediction", "base_prediction", "target")
    check(arguments | {n: arguments[n].to(d) for n, d in zip(names, dtypes, strict=True)})


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "some of the channels": lambda t: torch.cat([t, t * torch.nan], 1)[:, : t.shape[1]],
    "every other column": lambda t: torch.stack([t, t * torch.nan], -1).flatten(3)[..., ::2],
    # Dense, but its samples are not.
    "channels before samples": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "samples innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "one sample for all": lambda t: t[:1].expand_as(t),
    # No multiple of 16 bytes.
    "one element further": lambda t: t.new_empty(t.numel() + 1)[1:].view_as(t).copy_(t),
}


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(
    "names",
    [("prediction",), ("target", "base_prediction"), ("prediction", "target", "base_prediction")],
)
@pytest.mark.parametrize("shape", [(4, 5, 7), (4, 4, 8)], ids=["odd", "aligned"])
@pytest.mark.usefixtures("_poisoned_scratch")
def test_every_memory_layout_gives_the_same(device, shape, names, lay):
    arguments = make(device, shape=shape)
    check(arguments | {name: lay(arguments[name]) for name in names})


def test_tensors_of_one_layout_are_not_copied(device):
    arguments = make(device)
    tensors = [arguments[n] for n in ("prediction", "base_prediction", "target")]
    # The prediction of a network that predicts a variance too, and what lies like it.
    tensors[0] = LAYOUTS["some of the channels"](tensors[0])
    alike = launch.lay_alike(*tensors)
    assert all(given is laid for given, laid in zip(tensors, alike, strict=True))
    tensors = [LAYOUTS["channels_last"](t) for t in tensors]
    alike = launch.lay_alike(*tensors)
    assert all(given is laid for given, laid in zip(tensors, alike, strict=True))


@pytest.mark.parametrize("index", [-1, NUM_BINS])
def test_a_bin_that_does_not_exist_makes_the_loss_nan_and_moves_nothing(device, index):
    arguments = make(device, 2)
    arguments["bins"] = torch.tensor([3, index], device=device)
    loss, gamma, new_base, _ = adaptive_denoising_loss(**arguments)
    assert loss.isnan()
    assert gamma.isnan().tolist() == [False, True]
    moved = (new_base != arguments["base_ema"]) & ~new_base.isnan()
    assert moved.nonzero().flatten().tolist() == [3]


def test_a_loss_of_nan_stays_in_its_bin(device):
    arguments = make(device, 2)
    arguments["bins"] = torch.tensor([3, 6], device=device)
    arguments["prediction"][0] = torch.nan
    loss, gamma, _, new_tuned = adaptive_denoising_loss(**arguments)
    assert loss.isnan() and gamma.isnan().tolist() == [True, False]
    assert new_tuned.isnan().nonzero().flatten().tolist() == [1, 3, 7]


def test_nothing_that_is_given_is_written_and_two_runs_are_equal(device):
    arguments = make(device, 3, (70, 63))
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    first, second = (adaptive_denoising_loss(**arguments) for _ in range(2))
    for name, tensor in arguments.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_nothing_is_read_on_the_host(device):
    arguments = make(device)
    # The mode does not see into an operation.
    with ForbidHostReads():
        loss, *_, coefficients = launch.launch_forward(*arguments.values(), 1000.0, 0.1)
        launch.launch_backward(arguments["prediction"], arguments["target"], coefficients, loss)


def test_float64_takes_the_plain_path(device):
    arguments = make(device, dtype=torch.float64)
    loss = adaptive_denoising_loss(**arguments)[0]
    assert worst_error([loss], [adaptive_denoising_reference(**arguments)[0]]) < 1e-12


def test_opcheck_is_green(device):
    arguments = make(device, dtype=BF16)
    # NaN is not equal to itself.
    arguments |= {name: arguments[name].nan_to_num() for name in ("base_ema", "tuned_ema")}
    arguments["prediction"].requires_grad_()
    # Compiling in the interpreter calls for what the interpreter has not.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastppt_kernels.adaptive_denoising,
        (*arguments.values(), 1000.0, 0.1),
        test_utils=tests,
    )


FAULTS = {
    "base's error for both": [
        ("error = prediction - target\n    base", "error = base - target\n    base")
    ],
    "base against the prediction": [
        ("base_error = base - target", "base_error = base - prediction")
    ],
    "a block left out": [("(block < num_blocks)", "(block < num_blocks - 1)")],
    "mean over the batch too": [
        ("count = num_elements.to(tl.float64)", "count = num_elements.to(tl.float64) * num_samples")
    ],
    "samples of all bins": [("(wanted[:, None] == sample_bin[None, :])", "(wanted[:, None] >= 0)")],
    "sum of a bin's samples": [
        ("divisor = tl.maximum(count, 1.0)", "divisor = tl.minimum(count, 1.0)")
    ],
    "first observation smoothed": [
        ("(observed - old), observed)", "(observed - old), smoothing * observed)")
    ],
    "smoothing exchanged": [
        ("old + smoothing * (observed - old)", "observed + smoothing * (old - observed)")
    ],
    "all bins move": [("tl.where(count > 0, new, old)", "new")],
    "base and tuned exchanged": [("(new - base_new)", "(base_new - new)")],
    "EMAs exchanged": [
        ("tl.store(new_ema_ptr + index, new", "tl.store(new_ema_ptr + index, base_new")
    ],
    "no clamp": [("kept = tl.where(kept > 1.0, 1.0, kept)", "")],
    "weight left out": [("weight *= tl", "weight *= 0.0 * tl.load(bin_ptr) + 1.0  # tl")],
    "sum over the batch": [
        (
            "scale = 1.0 / num_samples.to(tl.float64)",
            "scale = num_samples.to(tl.float64) / num_samples",
        )
    ],
    "factor 2 missing": [("coefficient = 2.0 *", "coefficient = 1.0 *")],
    "one weight for all samples": [
        ("tl.load(coefficient_ptr + sample)", "tl.load(coefficient_ptr)")
    ],
    "wrong sign": [("factor * (prediction - target)", "factor * (target - prediction)")],
    "gradient of the loss ignored": [("tl.load(loss_grad_ptr) * tl", "tl")],
    "mask one too narrow": [
        ("mask=offsets < num_elements, other", "mask=offsets < num_elements - 1, other")
    ],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_turns_the_comparison_red(device, monkeypatch, tmp_path, faults):
    from fastppt_kernels.adaptive_denoising import triton_kernel

    monkeypatch.setattr(launch, "BLOCK_SIZE", 64)
    arguments = make(device, 8, (3, 5, 7))
    check(arguments)
    mutant = load_mutant(triton_kernel.__file__, faults, tmp_path)
    monkeypatch.setitem(sys.modules, triton_kernel.__name__, mutant)
    with pytest.raises(AssertionError):
        check(arguments)


# Latents of SDXL and SD3-M at 1024 px, and of SD1.5 at 512 px.
@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("num_samples", [1, 4, 64])
@pytest.mark.parametrize("shape", [(4, 128, 128), (16, 128, 128), (4, 64, 64)])
def test_latents_of_real_networks_equal_the_reference(shape, num_samples, dtype):
    check(make("cuda", num_samples, shape, dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_compiled_and_replayed_equal_eager_and_nothing_waits_for_the_device():
    arguments = make("cuda", 4, (4, 64, 64), BF16)
    leaf = arguments.pop("prediction").requires_grad_()

    def run(prediction):
        loss, gamma, *emas = adaptive_denoising_loss(prediction, **arguments)
        return loss, gamma, *(ema.nan_to_num() for ema in emas)

    def step():
        results = run(leaf)
        return [*torch.autograd.grad(results[0], leaf), *(t.detach() for t in results)]

    wanted = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    graph.replay()
    assert all(map(torch.equal, replayed, wanted))
    run = torch.compile(run, fullgraph=True)
    assert all(map(torch.equal, step(), wanted))
