import pytest
import torch

from fastppt_kernels import lora_anchor_penalty_
from fastppt_kernels.lora_anchor_penalty import plain
from fastppt_kernels.lora_anchor_penalty.reference import lora_anchor_penalty_reference
from fastppt_kernels.testing import (
    ForbidHostReads,
    check_added,
    check_stored,
    draw_lora_lists,
    drop_lora_grads,
)

WEIGHT = 0.37
# (rank, in, out, scale)
PAIRS = {
    "one": [(1, 1, 1, 1.0)],
    "seven": [(7, 7, 7, 0.5)],
    "63": [(3, 63, 65, 2.0)],
    "rank over width": [(9, 4, 5, 1.0)],
    "many": [(4, 16, 8, 1.0), (1, 7, 63, 0.25), (4, 16, 8, 1.0), (4, 16, 8, 3.0), (4, 8, 16, 1.0)],
    "over one batch": [(4, 640, 1280, 1.0)] * 20,
}


def make(pairs, dtype=torch.float64, drift=1e-2, none_at=(), zero_grads=False):
    """Return the lists of the op; anchors are there except for the pairs of ``none_at``."""
    return draw_lora_lists(
        pairs, WEIGHT, dtypes=[dtype] * 3, drift=drift, none_at=none_at, zero_grads=zero_grads
    )


def check_against_reference(op, lists, tolerance=1e-12):
    """Compare what is added to the gradients, not the gradients."""
    grads = lists["down_grads"] + lists["up_grads"]
    old = [g.clone() for g in grads]
    penalty = op(**lists)
    wanted_penalty, downs, ups = lora_anchor_penalty_reference(**drop_lora_grads(lists))
    torch.testing.assert_close(penalty.double(), wanted_penalty, rtol=tolerance, atol=0)
    check_added(grads, old, downs + ups, tolerance)


def all_of(pairs):
    return tuple(range(len(pairs)))


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("anchored", [True, False], ids=["anchored", "zero anchor"])
def test_values_and_gradients_equal_the_reference_in_float64(pairs, anchored):
    lists = make(pairs, none_at=() if anchored else all_of(pairs))
    check_against_reference(lora_anchor_penalty_, lists)


def test_reference_is_the_gradient_of_its_penalty():
    lists = make(PAIRS["63"])
    lists = drop_lora_grads(lists)
    _, down_gradients, up_gradients = lora_anchor_penalty_reference(**lists)
    down, up = (lists[k][0].requires_grad_() for k in ("downs", "ups"))
    change = lists["scales"][0] * (up @ down - lists["anchor_ups"][0] @ lists["anchor_downs"][0])
    (WEIGHT * change.square().sum()).backward()
    torch.testing.assert_close(down.grad, down_gradients[0])
    torch.testing.assert_close(up.grad, up_gradients[0])


def test_anchors_may_be_there_for_some_pairs_only():
    check_against_reference(lora_anchor_penalty_, make(PAIRS["many"], none_at=(0, 3)))


def test_left_out_anchors_are_anchors_of_none():
    lists = make(PAIRS["many"], none_at=all_of(PAIRS["many"]))
    del lists["anchor_downs"], lists["anchor_ups"]
    check_against_reference(lora_anchor_penalty_, lists)


@pytest.mark.parametrize("drift", [1.0, 1e-2, 1e-4])
def test_float32_is_right_to_its_rounding_at_any_drift(drift):
    lists = make(PAIRS["63"], torch.float32, drift, zero_grads=True)
    check_against_reference(lora_anchor_penalty_, lists, tolerance=2e-7)


@pytest.mark.parametrize("pair", [(4, 640, 640, 1.0), (4, 1280, 10240, 1.0)])
def test_long_sums_are_right_to_the_rounding_of_short_ones(pair):
    lists = make([pair], torch.float32, 1e-2, zero_grads=True)
    check_against_reference(lora_anchor_penalty_, lists, tolerance=5e-7)


@pytest.mark.parametrize("name", ["downs", "ups", "anchor_downs", "anchor_ups", "up_grads"])
def test_one_tensor_in_float64_makes_the_penalty_float64(name):
    lists = make(PAIRS["seven"], torch.float32, 0.1)
    assert lora_anchor_penalty_(**lists).dtype == torch.float32
    lists[name] = [tensor.double() for tensor in lists[name]]
    assert lora_anchor_penalty_(**lists).dtype == torch.float64


def test_penalty_vanishes_at_the_anchor():
    lists = make(PAIRS["many"], torch.float32, drift=0.0)
    before = [g.clone() for g in lists["down_grads"] + lists["up_grads"]]
    assert lora_anchor_penalty_(**lists) == 0
    after = lists["down_grads"] + lists["up_grads"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradient_is_rounded_once(dtype):
    lists = make([(3, 7, 5, 0.5)], dtype, drift=0.1)
    grads = lists["down_grads"] + lists["up_grads"]
    old = [g.clone() for g in grads]
    penalty = lora_anchor_penalty_(**lists)
    assert penalty.dtype == torch.float32
    _, downs, ups = lora_anchor_penalty_reference(**drop_lora_grads(lists))
    wanted = [before.double() + update for before, update in zip(old, downs + ups, strict=True)]
    # The float32 sum may fall on the other side of a tie: half an ulp and a little.
    check_stored(grads, old, wanted, num_ulps=0.5005)


def test_mixed_dtypes_are_taken():
    lists = make(PAIRS["63"], torch.float32, drift=0.1, zero_grads=True)
    lists["downs"] = [t.bfloat16() for t in lists["downs"]]
    lists["anchor_ups"] = [t.bfloat16() for t in lists["anchor_ups"]]
    check_against_reference(lora_anchor_penalty_, lists, tolerance=2e-7)


@pytest.mark.parametrize("wanted", [torch.float64, torch.float32])
def test_penalty_is_a_scalar_of_the_promised_dtype(wanted):
    penalty = lora_anchor_penalty_(**make(PAIRS["many"], wanted))
    assert penalty.shape == ()
    assert penalty.dtype == wanted


def test_empty_lists_give_zero():
    penalty = lora_anchor_penalty_([], [], [], [], [], WEIGHT)
    assert penalty.dtype == torch.float32
    assert penalty == 0


def test_without_grads_only_the_penalty_is_computed():
    lists = make(PAIRS["many"], none_at=(1,))
    with_grads = lora_anchor_penalty_(**lists)
    lists["down_grads"] = lists["up_grads"] = None
    assert torch.equal(lora_anchor_penalty_(**lists), with_grads)


def test_tensor_weight_is_the_float_weight():
    lists = make(PAIRS["many"]) | {"weight": torch.tensor(WEIGHT, dtype=torch.float64)}
    check_against_reference(lora_anchor_penalty_, lists)


def test_two_runs_are_equal_and_only_grads_are_written():
    runs = []
    for _ in range(2):
        lists = make(PAIRS["over one batch"], torch.float32)
        read = [t for k in ("downs", "ups", "anchor_downs", "anchor_ups") for t in lists[k]]
        before = [t.clone() for t in read]
        penalty = lora_anchor_penalty_(**lists)
        assert all(torch.equal(a, b) for a, b in zip(read, before, strict=True))
        runs.append([penalty, *lists["down_grads"], *lists["up_grads"]])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_changes_nothing():
    lists, others = (make(PAIRS["63"], torch.float32) for _ in range(2))
    plain = lora_anchor_penalty_(**lists)
    with torch.autocast("cpu", torch.bfloat16):
        other = lora_anchor_penalty_(**others)
    assert torch.equal(plain, other)
    assert torch.equal(lists["up_grads"][0], others["up_grads"][0])


def allow_fewer_bits_as_before():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    return lambda: torch.set_float32_matmul_precision(precision)


def allow_fewer_bits():
    matmul = torch.backends.mkldnn.matmul
    precision, matmul.fp32_precision = matmul.fp32_precision, "bf16"

    def restore():
        matmul.fp32_precision = precision

    return restore


@pytest.mark.parametrize("allow", [allow_fewer_bits_as_before, allow_fewer_bits])
def test_products_that_may_be_of_fewer_bits_are_not(monkeypatch, allow):
    widths, lists = [], make(PAIRS["63"], torch.float32, zero_grads=True)
    join = plain._join

    def joining(tensors, dtype):
        widths.append(dtype)
        return join(tensors, dtype)

    monkeypatch.setattr(plain, "_join", joining)
    restore = allow()
    try:
        check_against_reference(lora_anchor_penalty_, lists, tolerance=2e-7)
    finally:
        restore()
    assert set(widths) == {torch.float64}


@pytest.mark.parametrize("weight", [WEIGHT, torch.tensor(WEIGHT)], ids=["float", "tensor"])
def test_nothing_is_read_on_the_host(weight):
    lists = make(PAIRS["many"], torch.float32, none_at=(1,)) | {"weight": weight}
    with ForbidHostReads():
        lora_anchor_penalty_(**lists)


def spoil(name, index, change):
    def apply(lists):
        lists[name] = [change(t) if i == index else t for i, t in enumerate(lists[name])]

    return apply


WRONG = {
    "lengths": (lambda lists: lists["scales"].pop(), r"scales: got 4 entries, want 5"),
    "ranks": (spoil("ups", 1, lambda t: t.repeat(1, 2)), r"pair 1: .*\(63, 2\)"),
    "dimensions": (spoil("downs", 2, lambda t: t.flatten()), r"pair 2: .*\(64,\)"),
    "grad shape": (spoil("up_grads", 3, lambda t: t[:1]), r"up_grads\[3\]"),
    "anchor shape": (spoil("anchor_downs", 0, lambda t: t[:1]), r"anchor_downs\[0\]"),
    "strides": (spoil("downs", 4, lambda t: t.T.contiguous().T), r"downs\[4\].*strides"),
    "integers": (spoil("ups", 0, lambda t: t.int()), r"ups\[0\].*int32"),
    "no grad": (spoil("down_grads", 2, lambda t: None), r"down_grads\[2\]: got None"),
    "one anchor": (spoil("anchor_ups", 2, lambda t: None), r"pair 2: anchor_ups\[2\] is None"),
    "one list of grads": (lambda lists: lists.update(up_grads=None), "up_grads: got None"),
    "device": (spoil("anchor_ups", 1, lambda t: t.to("meta")), r"anchor_ups\[1\].*meta"),
    "weight": (lambda lists: lists.update(weight=torch.ones(2)), "weight: got a tensor"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_named_by_its_index(change, message):
    lists = make(PAIRS["many"])
    change(lists)
    with pytest.raises(ValueError, match=message):
        lora_anchor_penalty_(**lists)


def test_a_gradient_given_twice_is_refused():
    lists = make([(2, 3, 4, 1.0)] * 2)
    lists["down_grads"] = [lists["down_grads"][0]] * 2
    with pytest.raises(ValueError, match=r"down_grads\[1\]: is the memory of down_grads\[0\]"):
        lora_anchor_penalty_(**lists)


def wrong_sign(**lists):
    penalty = lora_anchor_penalty_(**lists)
    lora_anchor_penalty_(**lists | {"weight": -2 * lists["weight"]})
    return penalty


def factor_two_missing(**lists):
    lora_anchor_penalty_(**lists | {"weight": lists["weight"] / 2})
    return lora_anchor_penalty_(**lists | {"down_grads": None, "up_grads": None})


def scale_not_squared(**lists):
    return lora_anchor_penalty_(**lists | {"scales": [s**0.5 for s in lists["scales"]]})


def anchor_ignored(**lists):
    return lora_anchor_penalty_(**lists | {"anchor_downs": None, "anchor_ups": None})


def difference_of_grams(**lists):
    """||BA - B0 A0||^2 as ||BA||^2 - 2 <BA, B0 A0> + ||B0 A0||^2, each from Grams: it cancels."""
    penalty = 0
    names = ("downs", "ups", "anchor_downs", "anchor_ups", "scales", "down_grads", "up_grads")
    for a, b, a0, b0, s, da, db in zip(*(lists[name] for name in names), strict=True):
        own = ((b.T @ b) * (a @ a.T)).sum()
        cross = ((b0.T @ b) * (a0 @ a.T)).sum()
        penalty += s**2 * (own - 2 * cross + ((b0.T @ b0) * (a0 @ a0.T)).sum())
        factor = 2 * s**2 * lists["weight"]
        da += factor * ((b.T @ b) @ a - (b.T @ b0) @ a0)
        db += factor * (b @ (a @ a.T) - b0 @ (a0 @ a.T))
    return lists["weight"] * penalty


@pytest.mark.parametrize(
    "fault",
    [wrong_sign, factor_two_missing, scale_not_squared, anchor_ignored, difference_of_grams],
)
def test_a_planted_fault_turns_the_comparison_red(fault):
    def lists():
        return make(PAIRS["63"], torch.float32, drift=1e-4, zero_grads=True)

    check_against_reference(lora_anchor_penalty_, lists(), tolerance=2e-7)
    with pytest.raises(AssertionError):
        check_against_reference(fault, lists(), tolerance=2e-7)


def test_the_difference_of_grams_is_right_but_for_its_rounding():
    check_against_reference(difference_of_grams, make(PAIRS["63"], drift=1.0), tolerance=1e-9)
