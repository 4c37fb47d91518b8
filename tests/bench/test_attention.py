import dataclasses

import pytest
import torch

from bench import attention, gpu, gpu_targets
from bench.rows import time_workload
from bench.shapes import ATTENTIONS
from bench.suites import (
    ATTENTION_ALIGNMENT,
    ATTENTION_ALIGNMENT_BF16,
    ATTENTION_ALIGNMENT_FP16,
    ATTENTION_ALIGNMENT_JOINT,
    ATTENTION_ALIGNMENT_JOINT_BF16,
    COMPILE,
    JOINT_ATTENTION,
    JOINT_ATTENTION_BF16,
    JOINT_ATTENTION_FP16,
    Workload,
    list_workload,
)
from bench.ways import Way

# Two layers: queries and keys of each.
LAYERS = Workload("small", [(1, 3, 20, 8), (1, 3, 7, 8), (2, 2, 33, 16), (2, 2, 9, 16)])
SUITES = [
    ATTENTION_ALIGNMENT,
    ATTENTION_ALIGNMENT_BF16,
    ATTENTION_ALIGNMENT_FP16,
    ATTENTION_ALIGNMENT_JOINT,
    ATTENTION_ALIGNMENT_JOINT_BF16,
    JOINT_ATTENTION,
    JOINT_ATTENTION_BF16,
    JOINT_ATTENTION_FP16,
]
IDS = [f"{suite.name}, {suite.form}" for suite in SUITES]


def time_small(suite, names):
    return time_workload(suite, LAYERS, names=names, copy_gb_per_s=10.0, seconds=0.01)


@pytest.mark.parametrize("suite", SUITES, ids=IDS)
def test_every_way_agrees_with_the_reference_and_gets_a_row(suite):
    names = suite.ways(compiled=False)
    rows, refusals = time_small(suite, names)
    assert not refusals
    assert [row["way"] for row in rows] == names
    width = 4 if suite.form.startswith("float32") else 2
    assert {row["bytes"] for row in rows} == {width * suite.accesses * LAYERS.num_elements}


def test_operations_are_those_of_the_products():
    maps = (3 * 20 * 7, 2 * 2 * 33 * 9)
    assert attention.count_maps(LAYERS.shapes) == sum(maps)
    alignment = 10 * (maps[0] * 8 + maps[1] * 16)
    assert ATTENTION_ALIGNMENT.num_flops(LAYERS) == alignment
    attentions = 18 * (3 * 27**2 * 8 + 2 * 2 * 42**2 * 16)
    assert JOINT_ATTENTION.num_flops(LAYERS) == alignment + attentions


def scale_results(loss_factor=1.0, grad_factor=1.0):
    return lambda loss, grads: (loss_factor * loss, [grad_factor * g for g in grads])


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (scale_results(loss_factor=1.01), "loss"),
        (scale_results(grad_factor=1.02), "gradients"),
        (scale_results(grad_factor=-1), "gradients"),
    ],
)
@pytest.mark.parametrize("suite", SUITES, ids=IDS)
def test_a_wrong_result_is_refused_and_gets_no_time(suite, fault, named):
    ours = next(iter(suite.makers))

    def make(problem):
        call = suite.makers[ours](problem).call
        return Way(lambda: fault(*call()))

    planted = dataclasses.replace(suite, makers={ours: make})
    rows, (refusal,) = time_small(planted, [ours])
    assert rows == []
    assert named in refusal["refused"]


@pytest.mark.parametrize("left_out", ["loss_grads", "output_grads"])
def test_a_joint_attention_shows_a_fault_in_either_gradient(left_out):
    def make(problem):
        pulls = [0 * pull for pull in getattr(problem, left_out)]
        return attention.joint_attention_op(WithPulls(problem, {left_out: pulls}))

    planted = dataclasses.replace(JOINT_ATTENTION_BF16, makers={"joint_attention": make})
    assert "gradients" in time_small(planted, ["joint_attention"])[1][0]["refused"]


class WithPulls:
    """A problem with other gradients of its results."""

    def __init__(self, problem, changes):
        self._problem, self._changes = problem, changes

    def __getattr__(self, name):
        return self._changes[name] if name in self._changes else getattr(self._problem, name)


@pytest.mark.parametrize("suite", SUITES, ids=IDS)
def test_a_call_that_lets_go_makes_the_gradients_and_keeps_none(suite):
    problem = suite.make_problem(LAYERS.shapes)
    given = []
    for leaf in problem.leaves:
        leaf.register_hook(given.append)
    way = next(iter(suite.makers.values()))(problem)
    assert way.letting_go() is None
    assert len(given) == len(problem.leaves) and all(grad.any() for grad in given)
    assert all(leaf.grad is None for leaf in problem.leaves)
    assert not any(leaf._post_accumulate_grad_hooks for leaf in problem.leaves)


def test_problems_of_one_seed_are_equal():
    for suite in (ATTENTION_ALIGNMENT_JOINT, JOINT_ATTENTION):
        one, other, third = (suite.make_problem(LAYERS.shapes, seed=seed) for seed in (0, 0, 1))
        assert all(map(torch.equal, one.leaves, other.leaves))
        assert not any(map(torch.equal, one.leaves, third.leaves))


def test_workloads_are_found_by_their_names():
    assert {len(list_workload(name).shapes) for name in ATTENTIONS} == {72, 12, 24, 4, 2}
    assert attention.count_maps(ATTENTIONS["SDXL attention"]) * 4 / 1e6 == pytest.approx(265, 0.01)


def test_flex_attention_is_a_compiled_way_of_the_joint_attention():
    assert JOINT_ATTENTION_BF16.ways(compiled=False) == ["joint_attention", "materialised maps"]
    (flex,) = set(JOINT_ATTENTION_BF16.makers) - set(JOINT_ATTENTION_BF16.ways(compiled=False))
    assert flex == f"{COMPILE} of flex_attention"
    for layer in gpu.JOINT_LAYERS:
        (plan,) = (p for p in gpu.PLANS if p.workload == layer and p.compiled)
        assert plan.names("captured") == ["joint_attention", flex]


def test_attention_targets_are_met_from_below():
    def row(mode, milliseconds, extra):
        labels = {"suite": "attention alignment", "form": "bfloat16", "mode": mode}
        labels |= {"workload": gpu_targets.MAIN_ATTENTION, "way": "attention_alignment_loss"}
        return labels | {"p50 ms": milliseconds, "extra bytes": extra}

    def targets(*rows):
        return [t for t in gpu_targets.list_targets(rows) if t["what"].startswith("attention")]

    assert [t["measured"] for t in targets()] == [None, None]
    met = targets(row("captured", 0.5, None), row("eager", 9.0, 26.5e6))
    assert [t["measured"] for t in met] == pytest.approx([0.5, 0.1], rel=0.01)
    assert [t["met"] for t in met] == [True, True]
    missed = targets(row("captured", 0.7, None), row("eager", 9.0, 265e6))
    assert [t["met"] for t in missed] == [False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flex_attention_agrees_with_the_reference():
    suite = JOINT_ATTENTION_BF16
    workload = Workload("small", [(1, 4, 256, 64), (1, 4, 154, 64)])
    rows, refusals = time_workload(
        suite,
        workload,
        names=["joint_attention", f"{COMPILE} of flex_attention"],
        copy_gb_per_s=1000.0,
        seconds=0.01,
        device="cuda",
    )
    assert not refusals
    assert len(rows) == 2 and all(row["extra bytes"] for row in rows)
