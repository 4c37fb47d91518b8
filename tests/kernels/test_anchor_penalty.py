import pytest
import torch

from fastppt_kernels import anchor_penalty_
from fastppt_kernels.anchor_penalty.reference import anchor_penalty_reference
from fastppt_kernels.testing import ForbidHostReads, check_added, check_stored, draw_tensors

WEIGHT = 0.37
SHAPES = {
    "one": [(1,)],
    "scalar": [()],
    "seven": [(7,)],
    "63": [(63,)],
    "odd": [(3, 5, 7), (63, 1), (1,), (2, 31)],
    "over one chunk": [(33_000,), (7,), (257, 513)],
    "empty tensor": [(0, 4), (5,)],
}


def make(shapes, dtype=torch.float64, drift=1e-2, none_at=()):
    drawn = draw_tensors(list(shapes) * 3)
    params, drifts, grads = (drawn[i * len(shapes) : (i + 1) * len(shapes)] for i in range(3))
    anchors = [p + drift * d for p, d in zip(params, drifts, strict=True)]
    params, anchors, grads = ([t.to(dtype) for t in ts] for ts in (params, anchors, grads))
    return params, [None if i in none_at else a for i, a in enumerate(anchors)], grads


def check_against_reference(op, params, anchors, grads, weight=WEIGHT, tolerance=1e-12):
    """Compare what is added to the gradients, not the gradients."""
    old = [g.clone() for g in grads]
    penalty = op(params, anchors, grads, weight)
    wanted_penalty, wanted = anchor_penalty_reference(params, anchors, float(weight))
    torch.testing.assert_close(penalty.double(), wanted_penalty, rtol=tolerance, atol=0)
    check_added(grads, old, wanted, tolerance)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("none_at", [(), (0,)], ids=["anchors", "first anchor is None"])
def test_values_and_gradients_equal_the_reference_in_float64(shapes, none_at):
    check_against_reference(anchor_penalty_, *make(shapes, none_at=none_at))


def test_float32_is_right_to_its_rounding():
    params, anchors, grads = make(SHAPES["over one chunk"], torch.float32, drift=1.0)
    for grad in grads:
        grad.zero_()
    check_against_reference(anchor_penalty_, params, anchors, grads, tolerance=1e-6)


def test_sum_over_millions_of_elements_keeps_float32_precision():
    generator = torch.Generator().manual_seed(0)
    param = torch.rand(4_000_003, generator=generator)
    penalty = anchor_penalty_([param], [None], None, 1.0)
    torch.testing.assert_close(penalty.double(), param.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradient_is_rounded_once(dtype):
    params, anchors, grads = make([(63,), (2, 31)], dtype, none_at=(1,))
    old = [g.clone() for g in grads]
    anchor_penalty_(params, anchors, grads, WEIGHT)
    _, wanted = anchor_penalty_reference(params, anchors, WEIGHT)
    wanted = [before.double() + update for before, update in zip(old, wanted, strict=True)]
    # The float32 sum may fall on the other side of a tie: half an ulp and a little.
    check_stored(grads, old, wanted, num_ulps=0.5005)


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("anchor_dtype", [torch.bfloat16, torch.float32])
def test_mixed_dtypes_are_computed_in_float32(param_dtype, anchor_dtype):
    params, anchors, _ = make([(63,), (5, 7)], torch.float32)
    params = [p.to(param_dtype) for p in params]
    anchors = [a.to(anchor_dtype) for a in anchors]
    grads = [torch.zeros(p.shape) for p in params]
    check_against_reference(anchor_penalty_, params, anchors, grads, tolerance=1e-6)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_penalty_is_a_scalar_of_the_promised_dtype(dtype, wanted):
    penalty = anchor_penalty_(*make([(7,)], dtype), WEIGHT)
    assert penalty.shape == ()
    assert penalty.dtype == wanted
    assert not penalty.requires_grad


def test_empty_lists_give_zero():
    penalty = anchor_penalty_([], [], [], WEIGHT)
    assert penalty.dtype == torch.float32
    assert penalty == 0


def test_without_grads_only_the_penalty_is_computed():
    params, anchors, grads = make(SHAPES["odd"])
    penalty = anchor_penalty_(params, anchors, None, WEIGHT)
    assert torch.equal(penalty, anchor_penalty_(params, anchors, grads, WEIGHT))


def test_tensor_weight_is_the_float_weight():
    check_against_reference(
        anchor_penalty_, *make(SHAPES["odd"]), torch.tensor(WEIGHT, dtype=torch.float64)
    )


def test_two_runs_are_equal_and_only_grads_are_written():
    runs = []
    for _ in range(2):
        params, anchors, grads = make(SHAPES["over one chunk"], torch.float32)
        before = [t.clone() for t in params + anchors]
        penalty = anchor_penalty_(params, anchors, grads, WEIGHT)
        assert all(torch.equal(a, b) for a, b in zip(params + anchors, before, strict=True))
        runs.append([penalty, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_parameters_that_require_grad_are_taken():
    params, anchors, grads = make([(7,)])
    params = [torch.nn.Parameter(p) for p in params]
    assert not anchor_penalty_(params, anchors, grads, WEIGHT).requires_grad


def test_autocast_changes_nothing():
    params, anchors, grads = make(SHAPES["odd"], torch.float32)
    others = [g.clone() for g in grads]
    plain = anchor_penalty_(params, anchors, grads, WEIGHT)
    with torch.autocast("cpu", torch.bfloat16):
        cast = anchor_penalty_(params, anchors, others, WEIGHT)
    assert all(torch.equal(a, b) for a, b in zip([plain, *grads], [cast, *others], strict=True))


@pytest.mark.parametrize("weight", [WEIGHT, torch.tensor(WEIGHT)], ids=["float", "tensor"])
def test_nothing_is_read_on_the_host(weight):
    params, anchors, grads = make(SHAPES["over one chunk"], torch.float32, none_at=(1,))
    with ForbidHostReads():
        anchor_penalty_(params, anchors, grads, weight)


def test_host_reads_are_seen_by_the_guard():
    with pytest.raises(AssertionError, match="host"), ForbidHostReads():
        torch.ones(()).item()


WRONG = {
    "lengths": (lambda p, a, g: (p, a[:1], g), r"anchors: got 1 entries, want 3"),
    "grad lengths": (lambda p, a, g: (p, a, g[:2]), r"grads: got 2 entries, want 3"),
    "shape": (
        lambda p, a, g: (p, [a[0], a[1].view(5, 4), a[2]], g),
        r"anchors\[1\].*\(5, 4\).*\(4, 5\)",
    ),
    "broadcast": (lambda p, a, g: (p, [*a[:2], a[2][:1]], g), r"anchors\[2\].*\(1,\).*\(6,\)"),
    "grad shape": (lambda p, a, g: (p, a, [g[0], g[1][:1], g[2]]), r"grads\[1\]"),
    "strides": (lambda p, a, g: (p, a, [g[0], g[1].T.contiguous().T, g[2]]), r"grads\[1\].*stride"),
    "integers": (lambda p, a, g: ([*p[:2], p[2].long()], a, g), r"params\[2\].*int64"),
    "no param": (lambda p, a, g: ([p[0], None, p[2]], a, g), r"params\[1\]: got None"),
    "no grad": (lambda p, a, g: (p, a, [None, *g[1:]]), r"grads\[0\]: got None"),
    "device": (lambda p, a, g: (p, [*a[:2], a[2].to("meta")], g), r"anchors\[2\].*meta.*cpu"),
    "same grad twice": (
        lambda p, a, g: ([p[0], p[0]], [a[0], a[0]], [g[0], g[0]]),
        r"grads\[1\]: is the memory of grads\[0\]",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_named_by_its_index(spoil, message):
    lists = make([(3,), (4, 5), (6,)])
    with pytest.raises(ValueError, match=message):
        anchor_penalty_(*spoil(*lists), WEIGHT)


@pytest.mark.parametrize("weight", [torch.ones(1), torch.tensor(1)], ids=["1-dim", "integer"])
def test_wrong_weight_is_refused(weight):
    with pytest.raises(ValueError, match="weight: got a tensor"):
        anchor_penalty_(*make([(3,)]), weight)


def wrong_sign(params, anchors, grads, weight):
    penalty = anchor_penalty_(params, anchors, grads, weight)
    anchor_penalty_(params, anchors, grads, -2 * weight)
    return penalty


def factor_two_missing(params, anchors, grads, weight):
    anchor_penalty_(params, anchors, grads, weight / 2)
    return anchor_penalty_(params, anchors, None, weight)


def anchor_ignored(params, anchors, grads, weight):
    return anchor_penalty_(params, [None] * len(params), grads, weight)


def mean_instead_of_sum(params, anchors, grads, weight):
    return anchor_penalty_(params, anchors, grads, weight) / sum(p.numel() for p in params)


@pytest.mark.parametrize(
    "fault", [wrong_sign, factor_two_missing, anchor_ignored, mean_instead_of_sum]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_planted_fault_turns_the_comparison_red(fault, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}[dtype]
    check_against_reference(anchor_penalty_, *make(SHAPES["odd"], dtype), tolerance=tolerance)
    with pytest.raises(AssertionError):
        check_against_reference(fault, *make(SHAPES["odd"], dtype), tolerance=tolerance)
