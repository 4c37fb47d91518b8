import inspect

import pytest
import torch

from fastppt_kernels import adaptive_denoising_loss
from fastppt_kernels.adaptive_denoising import op
from fastppt_kernels.adaptive_denoising.reference import adaptive_denoising_reference
from fastppt_kernels.testing import (
    INTERPRETED,
    ForbidHostReads,
    draw_denoising_arguments,
    worst_error,
)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="is about the PyTorch path")

NAN = float("nan")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {F64: 1e-12, F32: 1e-5, BF16: 1e-5, F16: 1e-5}
GRAD_TOLERANCES = {F64: 1e-12, F32: 1e-5, BF16: 1e-2, F16: 1e-2}
NUM_BINS = 10
# About the losses that are drawn.
LOSS = 0.1


def make(num_samples=4, shape=(4, 5, 7), dtype=F64, *, weights=True):
    return draw_denoising_arguments(num_samples, shape, dtype, weights=weights)


def check(arguments, run=adaptive_denoising_loss, **settings):
    """Compare all results and the gradient with float64 on the same values."""
    dtype = arguments["prediction"].dtype
    results = []
    for function, number in ((run, dtype), (adaptive_denoising_reference, F64)):
        leaf = arguments["prediction"].detach().to(number).requires_grad_()
        loss, *others = function(**arguments | {"prediction": leaf}, **settings)
        # So large that float16 has digits for it.
        (grad,) = torch.autograd.grad(1.7 * leaf.numel() * loss, leaf)
        results.append([loss.detach(), *others, grad])
    given, wanted = results
    assert not any(t.requires_grad for t in given)
    assert worst_error(given[:1], wanted[:1]) <= TOLERANCES[dtype]
    torch.testing.assert_close(given[1].double(), wanted[1], rtol=0, atol=TOLERANCES[dtype])
    for new, wanted_new in zip(given[2:4], wanted[2:4], strict=True):
        tolerance = TOLERANCES[arguments["base_ema"].dtype]
        torch.testing.assert_close(new.double(), wanted_new, rtol=tolerance, atol=0, equal_nan=True)
    assert worst_error(given[4:], wanted[4:]) <= GRAD_TOLERANCES[dtype]
    assert given[4].stride() == torch.empty_like(arguments["prediction"]).stride()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 63), (4, 33, 35)])
@pytest.mark.parametrize("num_samples", [1, 2, 8, 33])
def test_all_results_equal_the_reference(num_samples, shape, dtype):
    check(make(num_samples, shape, dtype))


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 100.0}, {"temperature": 3.0, "smoothing": 0.5}, {"smoothing": 1.0}],
)
def test_temperature_and_smoothing_are_those_of_the_reference(settings):
    check(make(), **settings)
    check(make(weights=False), **settings)


def test_defaults_are_those_of_the_paper():
    parameters = inspect.signature(adaptive_denoising_loss).parameters
    assert parameters["temperature"].default == 1000.0
    assert parameters["smoothing"].default == 0.1


def test_gammas_of_these_tests_are_on_both_sides_of_the_clamp():
    gamma = adaptive_denoising_loss(**make(33))[1]
    assert (gamma == 0).any() and ((gamma > 0.1) & (gamma < 0.95)).any()
    assert ((gamma >= 0) & (gamma <= 1)).all()


def test_first_observation_sets_an_unseen_bin_and_no_other_bin_moves():
    arguments = make(2)
    arguments["bins"] = torch.tensor([7, 7])
    _, _, new_base, new_tuned = adaptive_denoising_loss(**arguments)
    for name, new, old in (
        ("base_prediction", new_base, arguments["base_ema"]),
        ("prediction", new_tuned, arguments["tuned_ema"]),
    ):
        loss = (arguments[name] - arguments["target"]).square().mean()
        torch.testing.assert_close(new[7], loss, rtol=1e-12, atol=0)
        assert new[1].isnan()
        others = torch.tensor([0, *range(2, 7), 8, 9])
        assert torch.equal(new[others], old[others])


@pytest.mark.parametrize("dtype", [F64, F32])
def test_the_order_of_the_samples_does_not_matter(dtype):
    arguments = make(8, dtype=dtype)
    order = torch.tensor([5, 2, 7, 0, 3, 1, 6, 4])
    names = ("prediction", "base_prediction", "target", "bins", "sample_weight")
    shuffled = arguments | {name: arguments[name][order] for name in names}
    loss, gamma, *emas = adaptive_denoising_loss(**arguments)
    other_loss, other_gamma, *other_emas = adaptive_denoising_loss(**shuffled)
    tolerance = {F64: 1e-12, F32: 1e-6}[dtype]
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(
        [loss, gamma[order], *emas], [other_loss, other_gamma, *other_emas], **close
    )


def test_without_overfitting_it_is_the_plain_loss():
    arguments = make(weights=False) | {"base_ema": torch.zeros(NUM_BINS)}
    arguments |= {"tuned_ema": torch.ones(NUM_BINS)}
    loss, gamma, *_ = adaptive_denoising_loss(**arguments)
    assert not gamma.any()
    plain = torch.nn.functional.mse_loss(arguments["prediction"], arguments["target"])
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)


def test_far_overfitting_leaves_a_weight_that_is_right_not_zero():
    arguments = make(dtype=F32, weights=False)
    # exp(-20): 1 - gamma of float32 would be 0.
    arguments |= {"base_ema": torch.full((NUM_BINS,), LOSS + 0.02, dtype=F64)}
    arguments |= {"tuned_ema": torch.full((NUM_BINS,), LOSS, dtype=F64)}
    check(arguments, smoothing=1e-6)
    _, gamma, *_ = adaptive_denoising_loss(**arguments, smoothing=1e-6)
    assert (gamma == 1).all()


def test_only_the_prediction_gets_a_gradient():
    arguments = make()
    tensors = {n: t.requires_grad_() for n, t in arguments.items() if n != "bins"}
    loss, gamma, *emas = adaptive_denoising_loss(**arguments)
    assert not any(t.requires_grad for t in (gamma, *emas))
    loss.backward()
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == ["prediction"]


def test_the_loss_does_not_keep_the_graph_of_the_base():
    arguments = make()
    factor = torch.ones((), dtype=F64, requires_grad=True)
    arguments["base_prediction"] = arguments["base_prediction"] * factor
    assert not adaptive_denoising_loss(**arguments)[0].requires_grad


def test_nothing_that_is_given_is_written():
    arguments = make(8)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    results = adaptive_denoising_loss(**arguments)
    for name, tensor in arguments.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert results[2].data_ptr() != arguments["base_ema"].data_ptr()


@pytest.mark.parametrize("dtypes", [(BF16, BF16, F32), (F32, BF16, F32), (F16, F32, F64)])
def test_mixed_dtypes_are_computed_in_the_widest(dtypes):
    arguments = make(dtype=F32)
    names = ("prediction", "base_prediction", "target")
    arguments |= {n: arguments[n].to(d) for n, d in zip(names, dtypes, strict=True)}
    check(arguments)
    wanted = F64 if F64 in dtypes else F32
    assert [t.dtype for t in adaptive_denoising_loss(**arguments)] == [wanted, wanted, F32, F32]


@pytest.mark.parametrize(
    "lay",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: torch.cat([t, t], 1)[:, :4],
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], 3)[..., ::2],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ],
    ids=[
        "channels_last",
        "some of the channels",
        "transposed",
        "every other column",
        "channels before samples",
    ],
)
@pytest.mark.parametrize("names", [("prediction",), ("target", "base_prediction")])
def test_every_memory_layout_gives_the_same(names, lay):
    arguments = make()
    check(arguments | {name: lay(arguments[name]) for name in names})


@pytest.mark.parametrize("index", [-1, NUM_BINS])
def test_a_bin_that_does_not_exist_makes_the_loss_nan_and_moves_nothing(index):
    arguments = make(2)
    arguments["bins"] = torch.tensor([3, index])
    loss, gamma, new_base, _ = adaptive_denoising_loss(**arguments)
    assert loss.isnan()
    assert gamma.isnan().tolist() == [False, True]
    moved = (new_base != arguments["base_ema"]) & ~new_base.isnan()
    assert moved.nonzero().flatten().tolist() == [3]


def test_a_loss_of_nan_stays_in_its_bin():
    arguments = make(2)
    arguments["bins"] = torch.tensor([3, 6])
    arguments["prediction"][0] = NAN
    loss, gamma, _, new_tuned = adaptive_denoising_loss(**arguments)
    assert loss.isnan() and gamma.isnan().tolist() == [True, False]
    assert new_tuned.isnan().nonzero().flatten().tolist() == [1, 3, 7]


def test_two_runs_are_equal():
    first, second = (adaptive_denoising_loss(**make(8, dtype=F32)) for _ in range(2))
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)
    )


def test_autocast_changes_nothing():
    results = []
    for enabled in (False, True):
        arguments = make(dtype=F32)
        leaf = arguments["prediction"].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, gamma, *_ = adaptive_denoising_loss(**arguments)
        results.append([loss, gamma, *torch.autograd.grad(loss, leaf)])
    assert all(map(torch.equal, *results))


def test_nothing_is_read_on_the_host():
    arguments = make(dtype=F32)
    positional = [*arguments.values(), 1000.0, 0.1]
    # The mode does not see into an operation.
    with ForbidHostReads():
        loss, _, _, _, coefficients = op.plain_forward(*positional)
        op.plain_backward(arguments["prediction"], arguments["target"], coefficients, loss)
        arguments["prediction"].requires_grad_()
        adaptive_denoising_loss(**arguments)[0].backward()


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("weights", [True, False])
def test_opcheck_is_green(weights, dtype):
    arguments = make(dtype=dtype, weights=weights)
    # NaN is not equal to itself.
    arguments |= {name: arguments[name].nan_to_num() for name in ("base_ema", "tuned_ema")}
    arguments["prediction"].requires_grad_()
    torch.library.opcheck(
        torch.ops.fastppt_kernels.adaptive_denoising, (*arguments.values(), 1000.0, 0.1)
    )
    prediction, target = arguments["prediction"].detach(), arguments["target"]
    coefficients = torch.rand(4, dtype=F64 if dtype == F64 else F32)
    torch.library.opcheck(
        torch.ops.fastppt_kernels.adaptive_denoising_backward,
        (prediction, target, coefficients, coefficients.sum()),
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend):
    arguments = make(dtype=F32)

    def run(leaf):
        loss, gamma, *emas = adaptive_denoising_loss(**arguments | {"prediction": leaf * 2})
        return 3 * loss, gamma, *emas

    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend=backend)):
        leaf = (arguments["prediction"] / 2).requires_grad_()
        loss, *others = call(leaf)
        grads = torch.autograd.grad(loss, leaf)
        results.append([t.detach().nan_to_num() for t in (loss, *others, *grads)])
    assert worst_error(*results) < 1e-6


def test_a_second_derivative_is_refused():
    arguments = make()
    leaf = arguments["prediction"].requires_grad_()
    loss = adaptive_denoising_loss(**arguments)[0]
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again; call backward without"):
        grad.sum().backward()


WRONG = {
    "one dimension": ({"prediction": torch.ones(4)}, r"prediction: got shape \(4,\), want \[B"),
    "empty": ({"prediction": torch.ones(0, 3)}, "prediction: .* at least one element"),
    "shape": ({"target": torch.ones(4, 1, 5, 7)}, r"target: got shape \(4, 1, 5, 7\), want \(4, 4"),
    "integers": ({"base_prediction": torch.ones(4, 4, 5, 7).int()}, "base_prediction: got dtype"),
    "device": ({"target": torch.ones(4, 4, 5, 7, device="meta")}, "target: is on meta, want cpu"),
    "bins": ({"bins": torch.zeros(4)}, "bins: got torch.float32 of shape .*want torch.int64"),
    "number of bins": ({"bins": torch.zeros(3).long()}, r"bins: .* \(3,\), want .* \(4,\)"),
    "narrow ema": ({"tuned_ema": torch.ones(10).bfloat16()}, "tuned_ema: got dtype torch.bfloat16"),
    "emas differ": (
        {"tuned_ema": torch.ones(9)},
        r"tuned_ema: got shape \(9,\), want \[num_bins\]",
    ),
    "ema of two dimensions": ({"base_ema": torch.ones(1, 10)}, r"base_ema: got shape \(1, 10\)"),
    "weights": ({"sample_weight": torch.ones(4, 1)}, r"sample_weight: .* \(4, 1\), want .*\(4,\)"),
    "temperature": ({"temperature": 0.0}, "temperature: got 0.0, want > 0"),
    "smoothing": ({"smoothing": 1.5}, "smoothing: got 1.5, want > 0 and at most 1"),
    "no smoothing": ({"smoothing": 0.0}, "smoothing: got 0.0, want > 0 and at most 1"),
}


@pytest.mark.parametrize(("spoilt", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_named(spoilt, message):
    with pytest.raises(ValueError, match=message):
        adaptive_denoising_loss(**make() | spoilt)


# A fault is what the source of the reference has (right) and what stands there instead.
FAULTS = {
    "old EMAs for the indicator": (
        "new_emas[0][index] - new_emas[1][index]",
        "base_ema[index] - tuned_ema[index]",
    ),
    "base and tuned exchanged": (
        "new_emas[0][index] - new_emas[1][index]",
        "new_emas[1][index] - new_emas[0][index]",
    ),
    "one sample after the other": ("for index in set(bins.tolist())", "for index in bins.tolist()"),
    "sum of a bin's samples": ("observed[bins == index].mean()", "observed[bins == index].sum()"),
    "first observation smoothed": (
        "mean if old.isnan() else",
        "smoothing * mean if old.isnan() else",
    ),
    "smoothing exchanged": (
        "(1 - smoothing) * old + smoothing * mean",
        "smoothing * old + (1 - smoothing) * mean",
    ),
    "no clamp": ("1.0 if distance <= 0 else ", ""),
    "gamma for its complement": ("weight * share", "weight * (1 - share)"),
    "gradient through gamma": ("share * losses)", "share * (2 * losses - losses.detach()))"),
    "weight left out": ("(weight * share", "(share"),
    "sum over the batch": ("losses).mean()", "losses).sum()"),
    "sum over the elements": (
        ".square().flatten(1).mean(1)\n    base",
        ".square().flatten(1).sum(1)\n    base",
    ),
}


def run_reference(right="", wrong=""):
    source = inspect.getsource(adaptive_denoising_reference)
    assert right in source
    scope = dict(vars(inspect.getmodule(adaptive_denoising_reference)))
    exec(source.replace(right, wrong) if right else source, scope)
    return scope["adaptive_denoising_reference"]


def test_the_reference_without_a_fault_is_green():
    check(make(8), run=run_reference())


@pytest.mark.parametrize(("right", "wrong"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_turns_the_comparison_red(right, wrong):
    with pytest.raises(AssertionError):
        check(make(8), run=run_reference(right, wrong))
