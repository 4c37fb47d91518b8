"""The kernels of the LoRA anchor penalty: on a GPU, or in Triton's interpreter, a process apart."""

from dataclasses import replace

import pytest
import torch

from fastppt_kernels import lora_anchor_penalty_
from fastppt_kernels.lora_anchor_penalty import launch
from fastppt_kernels.lora_anchor_penalty.plan import GRAM_COLUMNS, PairKey, make_plan
from fastppt_kernels.lora_anchor_penalty.reference import lora_anchor_penalty_reference
from fastppt_kernels.testing import (
    HAS_GPU,
    INTERPRETED,
    ForbidHostReads,
    check_added,
    check_stored,
    draw_lora_lists,
    drop_lora_grads,
    run_in_interpreter,
)

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

WEIGHT = 0.37
# (rank, in, out, scale)
PAIRS = {
    "one": [(1, 1, 1, 1.0)],
    "seven": [(7, 7, 7, 0.5)],
    "63": [(3, 63, 65, 2.0)],
    "64": [(4, 64, 1000, 2.0)],
    "rank over width": [(9, 4, 5, 1.0)],
    "many": [(4, 16, 8, 1.0), (1, 7, 63, 0.25), (4, 16, 8, 3.0), (16, 8, 130, 1.0)],
    "every variant": [(5, 33, 9, 1.0), (20, 70, 31, 0.5), (33, 40, 50, 2.0), (70, 30, 90, 1.0)],
    "over one chunk": [(2, GRAM_COLUMNS + 1, 2 * GRAM_COLUMNS + 7, 1.0)],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(
    params=[pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=needs_gpu)]
)
def device(request):
    return request.param


@pytest.fixture
def _poisoned_scratch():
    """Fill every torch.empty with NaN."""
    # As a warning: cuBLAS, which the references use, refuses without a setting of its own.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_the_kernels_pass_in_the_interpreter():
    run_in_interpreter(__file__)


def make(device, pairs, dtypes=(torch.float32,) * 3, drift=0.1, none_at=()):
    """Return the lists of the op; dtypes of values, anchors and (zero) gradients."""
    return draw_lora_lists(
        pairs, WEIGHT, dtypes=dtypes, drift=drift, none_at=none_at, zero_grads=True, device=device
    )


def check(lists, run=lora_anchor_penalty_):
    """Compare what is added to zero gradients to float64: 1e-6 of the update, 1 ulp of a value."""
    penalty = run(**lists)
    wanted_penalty, downs, ups = lora_anchor_penalty_reference(**drop_lora_grads(lists))
    torch.testing.assert_close(penalty.double(), wanted_penalty, rtol=1e-6, atol=0)
    grads, updates = lists["down_grads"] + lists["up_grads"], downs + ups
    zeros = [torch.zeros_like(grad) for grad in grads]
    check_stored(grads, zeros, updates)
    if all(grad.dtype == torch.float32 for grad in grads):
        check_added(grads, zeros, updates, 1e-6)


def all_of(pairs):
    return tuple(range(len(pairs)))


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("anchored", [True, False], ids=["anchored", "zero anchor"])
@pytest.mark.usefixtures("_poisoned_scratch")
def test_updates_and_penalty_equal_the_reference(device, pairs, anchored):
    check(make(device, pairs, none_at=() if anchored else all_of(pairs)))


@pytest.mark.parametrize(
    ("rank", "anchored"),
    [(130, True), (256, False), pytest.param(256, True, marks=needs_gpu)],
)
def test_ranks_go_up_to_256(device, rank, anchored):
    if rank == 256 and anchored and device == "cpu":
        pytest.skip("needs a GPU: half a minute in the interpreter")
    check(make(device, [(rank, 17, 7, 1.0)], none_at=() if anchored else (0,)))


@pytest.mark.parametrize("drift", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("pairs", ["63", "every variant"])
def test_a_small_drift_is_as_exact(device, drift, pairs):
    check(make(device, PAIRS[pairs], drift=drift))


def test_penalty_vanishes_at_the_anchor(device):
    lists = make(device, PAIRS["many"], drift=0.0)
    assert lora_anchor_penalty_(**lists) == 0
    assert not any(g.any() for g in lists["down_grads"] + lists["up_grads"])


def test_anchors_may_be_there_for_some_pairs_only(device):
    check(make(device, PAIRS["many"], none_at=(0, 3)))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_dtypes_may_differ(device, dtypes):
    check(make(device, PAIRS["many"], dtypes))


def test_each_tensor_may_have_a_dtype_of_its_own(device):
    lists = make(device, PAIRS["many"])
    for shift, name in enumerate(["downs", "ups", "anchor_downs", "anchor_ups"]):
        lists[name] = [t.to(DTYPES[(i + shift) % 3]) for i, t in enumerate(lists[name])]
    check(lists)


def test_tensor_weight_is_the_float_weight(device):
    check(make(device, PAIRS["63"]) | {"weight": torch.tensor(WEIGHT, device=device)})


def test_what_is_added_comes_on_top(device):
    lists, others = make(device, PAIRS["63"]), make(device, PAIRS["63"])
    for grad in others["down_grads"] + others["up_grads"]:
        grad.fill_(64.0)
    lora_anchor_penalty_(**lists)
    lora_anchor_penalty_(**others)
    for name in ("down_grads", "up_grads"):
        torch.testing.assert_close(others[name][0] - 64, lists[name][0], rtol=0, atol=2**-15)


def test_without_grads_only_the_penalty_is_computed(device):
    lists = make(device, PAIRS["many"], none_at=(1,))
    alone = lora_anchor_penalty_(**lists | {"down_grads": None, "up_grads": None})
    assert torch.equal(alone, lora_anchor_penalty_(**lists))


def test_empty_pairs_are_left_out(device):
    penalty = lora_anchor_penalty_(**make(device, [(4, 0, 5, 1.0), (0, 3, 5, 1.0)]))
    assert penalty == 0
    check(make(device, [*PAIRS["63"], (4, 0, 5, 1.0)]))


def test_two_runs_are_equal(device):
    runs = []
    for _ in range(2):
        lists = make(device, PAIRS["many"])
        runs.append([lora_anchor_penalty_(**lists), *lists["down_grads"], *lists["up_grads"]])
    assert all(map(torch.equal, *runs))


def test_a_repeated_call_makes_no_plan(device, monkeypatch):
    lists = make(device, PAIRS["many"])
    lora_anchor_penalty_(**lists)
    monkeypatch.setattr("fastppt_kernels.lora_anchor_penalty.plan._tables", None)
    with ForbidHostReads():
        lora_anchor_penalty_(**lists)


def key(rank, width, out, anchored):
    return PairKey(
        rank, (width, out), 1.0, (16, 16), (16, 16) if anchored else (0, 0), (16, 16), (0, 0)
    )


@pytest.mark.parametrize("rank", [1, 32, 256])
def test_scratch_is_a_gram_for_each_chunk(rank):
    width, out = 3 * GRAM_COLUMNS, GRAM_COLUMNS + 1
    plan = make_plan((key(rank, width, out, False),) * 3)
    assert plan.num_floats == 3 * (3 + 2) * rank**2
    plan = make_plan((key(rank, width, out, True),) * 3)
    assert plan.num_floats == 3 * 3 * (3 + 2) * rank**2


def test_the_number_of_launches_does_not_grow_with_the_pairs():
    pairs = [key(rank, 640, 1280, anchored) for rank in range(1, 257) for anchored in (0, 1)]
    assert len(make_plan(tuple(pairs)).works) == 6


def plant(monkeypatch, change):
    """Spoil the tables of the plan."""

    def spoiled(pairs):
        plan = make_plan(pairs)
        rows = plan.rows.clone()
        for work in plan.works:
            change(rows, work)
        return replace(plan, rows=rows)

    monkeypatch.setattr(launch, "_cached_plan", spoiled)
    monkeypatch.setattr(launch, "cached_table", lambda key, build, device: build().to(device))


def rows_of(rows, places):
    return rows[places.start : places.stop]


def scale_not_squared(rows, work):
    bits = torch.tensor(2.0).view(torch.int32)
    rows_of(rows, work.reduce)[:, 8] = int(bits)


def chunk_left_out(rows, work):
    rows_of(rows, work.reduce)[:, 5] -= 1


def sides_swapped(rows, work):
    rows_of(rows, work.reduce)[:, [6, 7]] = rows_of(rows, work.reduce)[:, [7, 6]]


def column_left_out(rows, work):
    rows_of(rows, work.gram)[:, 3] -= 1


def rank_left_out(rows, work):
    rows_of(rows, work.apply)[:, 4] -= 1


def anchor_of_ups_stale(rows, work):
    ups = rows_of(rows, work.apply)[:, 8] >= 256
    rows_of(rows, work.apply)[ups, 1] = rows_of(rows, work.apply)[ups, 0]


@pytest.mark.parametrize(
    "change",
    [
        scale_not_squared,
        chunk_left_out,
        sides_swapped,
        column_left_out,
        rank_left_out,
        anchor_of_ups_stale,
    ],
)
def test_a_planted_fault_in_the_plan_turns_the_comparison_red(device, monkeypatch, change):
    plant(monkeypatch, lambda rows, work: None)
    check(make(device, PAIRS["63"]))
    plant(monkeypatch, change)
    with pytest.raises(AssertionError):
        check(make(device, PAIRS["63"]))


@pytest.mark.parametrize("factor", [-1.0, 0.5], ids=["wrong sign", "factor 2 missing"])
def test_a_planted_fault_in_the_gradient_turns_the_comparison_red(device, factor):
    def planted(**lists):
        lora_anchor_penalty_(**lists | {"weight": factor * lists["weight"]})
        return lora_anchor_penalty_(**lists | {"down_grads": None, "up_grads": None})

    with pytest.raises(AssertionError):
        check(make(device, PAIRS["63"]), planted)


# Adapters of SDXL's attention: (in, out) and how many.
SDXL = [(640, 640, 50), (1280, 1280, 330), (2048, 640, 20), (2048, 1280, 160)]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("rank", [4, 32, 128])
def test_sdxl_adapters_equal_the_reference_and_two_runs_each_other(rank, anchored):
    pairs = [(rank, i, o, 1.0) for i, o, num in SDXL for _ in range(num)]
    runs = []
    for _ in range(2):
        lists = make("cuda", pairs, drift=1e-2, none_at=() if anchored else all_of(pairs))
        check(lists)
        runs.append(lists["down_grads"] + lists["up_grads"])
    assert all(map(torch.equal, *runs))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_replayed_graph_equals_eager():
    weight = torch.tensor(WEIGHT, device="cuda")
    lists, twin = (make("cuda", PAIRS["every variant"]) | {"weight": weight} for _ in range(2))
    lora_anchor_penalty_(**lists)
    lora_anchor_penalty_(**twin)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        penalty = lora_anchor_penalty_(**lists)
    weight.fill_(2 * WEIGHT)
    graph.replay()
    assert torch.equal(penalty, lora_anchor_penalty_(**twin))
    for name in ("down_grads", "up_grads"):
        assert all(map(torch.equal, lists[name], twin[name]))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("anchored", [True, False])
def test_peak_memory_is_a_gram_for_each_chunk(anchored):
    rank, num = 128, 20
    pairs = [(rank, 1280, 1280, 1.0)] * num
    lists = make("cuda", pairs, none_at=() if anchored else all_of(pairs))
    lora_anchor_penalty_(**lists)
    torch.cuda.reset_peak_memory_stats()
    # What was asked for, not the blocks that the allocator had lying about.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    lora_anchor_penalty_(**lists)
    num_grams = 3 if anchored else 1
    num_chunks = 2 * num * -(-1280 // GRAM_COLUMNS) * num_grams
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    # And the parts of the penalty.
    assert peak - before <= 4 * num_chunks * rank**2 + 2**16
