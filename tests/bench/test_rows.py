import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench import problems, suites
from bench import rows as bench_rows
from bench.problems import DisagreementError, Problem, exact_penalty, refuse_if_wrong
from bench.rows import describe_target, find_ratio, find_row, time_workload, write_report
from bench.suites import (
    ANCHOR,
    ARENA,
    LORA_ANCHOR,
    LORA_ANCHOR_ANCHORED,
    OPTIMIZER,
    OPTIMIZER_EFFECTIVE,
    SCALING,
    Workload,
    list_workload,
)
from bench.time_limit import OutOfTimeError
from bench.ways import Way
from fastppt_kernels.lora_anchor_penalty.reference import lora_anchor_penalty_reference

SUITES = [ANCHOR, LORA_ANCHOR, LORA_ANCHOR_ANCHORED, OPTIMIZER, OPTIMIZER_EFFECTIVE]
IDS = [f"{suite.name}, {suite.form}" for suite in SUITES]
SMALL = Workload("small", [(3, 63), (130, 3), (3, 63), (130, 3), (1, 7), (5, 1)])


def time_small(suite, names=None, **options):
    names = names or suite.ways(compiled=False)
    return time_workload(suite, SMALL, names=names, copy_gb_per_s=10.0, seconds=0.01, **options)


def replace_ours(suite, make):
    """Return the suite with another maker in the place of its first way."""
    ours = next(iter(suite.makers))
    return dataclasses.replace(suite, makers={**suite.makers, ours: make})


@pytest.mark.parametrize("suite", SUITES, ids=IDS)
def test_every_way_agrees_with_the_reference_and_gets_a_row(suite):
    rows, refusals = time_small(suite)
    assert not refusals
    assert [row["way"] for row in rows] == suite.ways(compiled=False)
    for row in rows:
        assert row["bytes"] == 4 * suite.accesses * row["elements"]
        assert row["elements"] == 2 * 3 * (63 + 130) + 12
        assert row["p20 ms"] <= row["p50 ms"] <= row["p80 ms"]
        assert row["gb/s"] == pytest.approx(row["bytes"] / row["p50 ms"] / 1e6)
        assert row["share of copy"] == pytest.approx(row["gb/s"] / 10)
    assert rows[0]["times ours"] == 1


def anchor_of_factor(factor):
    """Our op, but with a gradient that is wrong by a factor."""

    def make(problem):
        def call():
            penalty, gradients = exact_penalty(problem, "raw")
            for grad, gradient in zip(problem.grad_views, gradients, strict=True):
                grad.add_(gradient.to(grad.dtype), alpha=factor)
            return penalty

        return Way(call)

    return make


@pytest.mark.parametrize("factor", [-1, 2, 0, 1.01, float("nan")])
def test_a_wrong_gradient_is_refused_and_gets_no_time(factor):
    rows, refusals = time_small(replace_ours(ANCHOR, anchor_of_factor(factor)))
    assert [row["way"] for row in rows] == ANCHOR.ways(compiled=False)[1:]
    (refusal,) = refusals
    assert refusal["way"] == "anchor_penalty_"
    assert "no time is reported" in refusal["refused"]


def test_the_right_factor_is_not_refused():
    assert time_small(replace_ours(ANCHOR, anchor_of_factor(1)))[1] == []


def dying_of(error):
    def make(problem):
        def call():
            raise error

        return Way(call)

    return make


def test_what_one_way_dies_of_costs_no_other():
    suite = replace_ours(ANCHOR, dying_of(RuntimeError("illegal memory access\nmore")))
    rows, refusals = time_small(suite)
    assert [row["way"] for row in rows] == ANCHOR.ways(compiled=False)[1:]
    (refusal,) = refusals
    assert refusal["way"] == "anchor_penalty_"
    assert refusal["refused"] == "RuntimeError: illegal memory access"


def test_a_capture_that_fails_costs_no_other_way():
    def capture(way):
        raise RuntimeError("operation not permitted when stream is capturing")

    failing = iter([capture])

    def capture_but_once(way):
        return next(failing, lambda way: way)(way)

    rows, (refusal,) = time_small(ANCHOR, mode="captured", capture=capture_but_once)
    assert [row["way"] for row in rows] == ANCHOR.ways(compiled=False)[1:]
    assert "stream is capturing" in refusal["refused"]


@pytest.mark.parametrize("error", [OutOfTimeError("the time was up"), MemoryError("no more")])
def test_a_workload_of_which_nothing_is_left_dies_of_it(error):
    with pytest.raises(type(error)):
        time_small(replace_ours(ANCHOR, dying_of(error)), names=["anchor_penalty_"])


def test_what_is_known_of_one_way_outlives_the_death_of_the_others():
    names = ANCHOR.ways(compiled=False)[:2]
    makers = {names[0]: anchor_of_factor(1.001), names[1]: dying_of(RuntimeError("is lost"))}
    suite = dataclasses.replace(ANCHOR, makers={**ANCHOR.makers, **makers})
    rows, refusals = time_small(suite, names)
    assert rows == [] and [each["way"] for each in refusals] == names
    assert "no time is reported" in refusals[0]["refused"]


@pytest.mark.parametrize(
    ("error", "failed"), [(RuntimeError("is lost"), True), (torch.OutOfMemoryError("full"), False)]
)
def test_too_little_memory_is_no_fault_of_a_way(error, failed):
    _, (refusal,) = time_small(replace_ours(ANCHOR, dying_of(error)))
    assert refusal["failed"] is failed


def test_nothing_is_timed_in_a_process_whose_gpu_is_spoiled(monkeypatch):
    monkeypatch.setattr(bench_rows, "is_spoiled", lambda device: True)
    rows, (refusal,) = time_small(replace_ours(ANCHOR, dying_of(RuntimeError("is lost"))))
    assert rows == [] and refusal["way"] == "anchor_penalty_"


def test_time_that_is_up_is_known_by_what_a_compiler_makes_of_it():
    def make(problem):
        try:
            raise OutOfTimeError("the time was up")
        except OutOfTimeError as error:
            raise RuntimeError("backend failed") from error

    with pytest.raises(OutOfTimeError):
        time_small(replace_ours(ANCHOR, make))


def test_time_that_is_up_ends_all_ways():
    with pytest.raises(OutOfTimeError):
        time_small(replace_ours(ANCHOR, dying_of(OutOfTimeError("the time was up"))))


STEP_FAULTS = {
    "sign of the anchor": {"anchor_weight": -problems.WEIGHT},
    "factor of the anchor": {"anchor_weight": 2 * problems.WEIGHT},
    "no clip": {"max_norm": 1e9},
    "wrong clip": {"max_norm": 0.9},
    "anchor left out of the clip": {"clip_first": True},
    "no weight decay": {"weight_decay": 0.0},
    "another eps": {"eps": 1e-4},
}


@pytest.mark.parametrize("fault", STEP_FAULTS)
@pytest.mark.parametrize("judged_as", ["ours", "a baseline"])
def test_a_wrong_step_is_refused(fault, judged_as):
    name = "AnchoredAdamW" + ARENA if judged_as == "ours" else "foreach + AdamW(fused)" + ARENA
    suite = dataclasses.replace(
        OPTIMIZER, makers={**OPTIMIZER.makers, name: step_with(**STEP_FAULTS[fault])}
    )
    assert time_small(suite, [name])[1]


def test_the_right_step_is_not_refused():
    name = "AnchoredAdamW" + ARENA
    suite = dataclasses.replace(OPTIMIZER, makers={**OPTIMIZER.makers, name: step_with()})
    assert time_small(suite, [name])[1] == []


def step_with(
    *,
    anchor_weight=problems.WEIGHT,
    max_norm=1.0,
    clip_first=False,
    weight_decay=problems.WEIGHT_DECAY,
    eps=problems.EPS,
):
    """A plain step in which one thing may be wrong, but not the penalty that it returns."""

    def make(problem):
        params = problem.params
        adamw = torch.optim.AdamW(params, lr=problems.LR, weight_decay=weight_decay, eps=eps)
        clip = max_norm * problem.max_norm

        def call():
            penalty, _ = exact_penalty(problem, "raw")
            norm = 0.0
            if clip_first:
                norm = torch.nn.utils.clip_grad_norm_(params, clip)
            for param, anchor, grad in zip(params, problem.anchors, problem.grads, strict=True):
                grad.add_(param.detach() - anchor, alpha=2 * anchor_weight)
            norm = norm if clip_first else torch.nn.utils.clip_grad_norm_(params, clip)
            adamw.step()
            return penalty, norm

        def rewind():
            adamw.state.clear()

        return Way(call, rewind)

    return make


def test_a_nan_is_past_every_tolerance():
    with pytest.raises(DisagreementError):
        refuse_if_wrong({"penalty": float("nan")}, {"penalty": 1e9})
    assert refuse_if_wrong({"a": 0.1, "b": 0.3}, {"a": 1, "b": 1}) == 0.3


@pytest.mark.parametrize("anchored", [False, True])
def test_exact_penalty_of_pairs_is_that_of_the_weights(anchored):
    problem = Problem(SMALL.shapes)
    downs, ups, scales = zip(*problem.pairs, strict=True)
    anchors = {"anchor_downs": problem.anchors[::2], "anchor_ups": problem.anchors[1::2]}
    wanted, *gradients = lora_anchor_penalty_reference(
        downs, ups, scales, problems.WEIGHT, **(anchors if anchored else {})
    )
    form = "effective, anchored" if anchored else "effective"
    penalty, given = exact_penalty(problem, form)
    torch.testing.assert_close(penalty, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(given[::2], gradients[0], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(given[1::2], gradients[1], rtol=1e-9, atol=1e-15)


def test_problems_of_one_seed_are_equal_in_an_arena_too():
    problem, arena = Problem(SMALL.shapes), Problem(SMALL.shapes, arena=True)
    problem.grads[0].zero_()
    problem.reset()
    for name in ("param_views", "anchor_views", "grad_views"):
        for tensor, view in zip(getattr(problem, name), getattr(arena, name), strict=True):
            assert torch.equal(tensor, view)
            assert view.storage_offset() % problems.ALIGNMENT == 0
    assert len(arena.params) == 1
    assert arena.params[0].grad is arena.grads[0]
    assert not torch.equal(problem.params[0], Problem(SMALL.shapes, seed=1).params[0])


def test_a_captured_row_is_of_the_replay():
    captured = []

    def capture(way):
        captured.append(way)
        return way

    rows, _ = time_small(ANCHOR, ["anchor_penalty_"], mode="captured", capture=capture)
    assert len(captured) == 1
    assert rows[0]["mode"] == "captured"


def test_workloads_are_found_by_their_names():
    names = ["SDXL, rank 4", "SD3-M, rank 32", "SD1.5, rank 128", "SD1.5 full", *SCALING]
    lengths = [len(list_workload(name).shapes) for name in names]
    assert lengths == [1120, 380, 256, 686, 10, 100, 1_000, 10_000]


def test_ratio_is_of_two_ways_and_none_without_a_row():
    rows = [{"way": "a", "times ours": 2.0, "mode": "x"}]
    rows.append({"way": "b", "times ours": 5.0, "mode": "x"})
    assert find_ratio(rows, "a", "b", mode="x") == 2.5
    assert find_ratio(rows, "a", "c") is None
    assert find_row(rows, way="a", mode="y") is None


def test_a_target_is_met_missed_or_not_measured():
    for at_most, wanted in ((False, [True, False, True, None]), (True, [True, True, False, None])):
        targets = [describe_target("it", 1.3, m, at_most=at_most) for m in (1.3, 1.29, 1.31, None)]
        assert [target["met"] for target in targets] == wanted


def test_report_keeps_four_digits_and_makes_its_folder(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_report(path, {"rows": [{"p50 ms": 1.23456, "tensors": 12345}]})
    assert json.loads(path.read_text()) == {"rows": [{"p50 ms": 1.235, "tensors": 12345}]}


def test_compiled_ways_are_left_out_unless_asked_for():
    for suite in SUITES:
        assert not any(n.startswith(suites.COMPILE) for n in suite.ways(compiled=False))
        assert suite.ways(compiled=True) == list(suite.makers)


def test_a_report_that_is_cut_off_leaves_the_one_before(monkeypatch, tmp_path):
    path = tmp_path / "report.json"
    write_report(path, {"rows": [1]})
    whole = Path.write_text

    def write_a_part(path, text):
        whole(path, text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_a_part)
    with pytest.raises(KeyboardInterrupt):
        write_report(path, {"rows": [1, 2]})
    assert json.loads(path.read_text()) == {"rows": [1]}
