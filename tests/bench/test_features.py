import dataclasses

import pytest
import torch

from bench import features, gpu
from bench.rows import time_workload
from bench.suites import (
    ADAPTIVE_DENOISING,
    ADAPTIVE_DENOISING_BF16,
    FEATURE_ALIGNMENT,
    FEATURE_ALIGNMENT_ADDED,
    FEATURE_ALIGNMENT_BF16,
    FEATURE_ALIGNMENT_BF16_ADDED,
    FEATURE_ALIGNMENT_BF16_CHANNELS_LAST,
    FEATURE_ALIGNMENT_CHANNELS_LAST,
    FEATURE_WORKLOADS,
    LATENT_WORKLOADS,
    Workload,
    list_workload,
)
from bench.ways import Way

LAYERS = Workload("small", [(1, 6, 5, 7), (2, 3, 8, 8), (1, 35, 6)])
LATENTS = Workload("small", [(3, 4, 6, 5)])
SUITES = {
    FEATURE_ALIGNMENT: LAYERS,
    FEATURE_ALIGNMENT_CHANNELS_LAST: LAYERS,
    FEATURE_ALIGNMENT_BF16: LAYERS,
    FEATURE_ALIGNMENT_BF16_CHANNELS_LAST: LAYERS,
    FEATURE_ALIGNMENT_ADDED: LAYERS,
    FEATURE_ALIGNMENT_BF16_ADDED: LAYERS,
    ADAPTIVE_DENOISING: LATENTS,
    ADAPTIVE_DENOISING_BF16: LATENTS,
}
IDS = [f"{suite.name}, {suite.form}" for suite in SUITES]


def time_small(suite, workload, names):
    return time_workload(suite, workload, names=names, copy_gb_per_s=10.0, seconds=0.01)


@pytest.mark.parametrize(("suite", "workload"), SUITES.items(), ids=IDS)
def test_every_way_agrees_with_the_reference_and_gets_a_row(suite, workload):
    names = suite.ways(compiled=False)
    rows, refusals = time_small(suite, workload, names)
    assert not refusals
    assert [row["way"] for row in rows] == names
    width = 2 if suite.form.startswith("bfloat16") else 4
    assert {row["bytes"] for row in rows} == {width * suite.accesses * workload.num_elements}
    flops = {"feature alignment": 11, "adaptive denoising": 8}[suite.name]
    flops += "added" in suite.form
    assert {row["flops"] for row in rows} == {flops * workload.num_elements}


@pytest.mark.parametrize("fault", ["loss", "gradients"])
@pytest.mark.parametrize(("suite", "workload"), SUITES.items(), ids=IDS)
def test_a_wrong_result_is_refused_and_gets_no_time(suite, workload, fault):
    ours = next(iter(suite.makers))

    def make(problem):
        call = suite.makers[ours](problem).call

        def wrong():
            loss, grads = call()
            return (1.01 * loss, grads) if fault == "loss" else (loss, [1.02 * g for g in grads])

        return Way(wrong)

    planted = dataclasses.replace(suite, makers={ours: make})
    rows, (refusal,) = time_small(planted, workload, [ours])
    assert rows == []
    assert fault in refusal["refused"]


def test_workloads_are_found_by_their_names():
    elements = [
        list_workload(n).num_elements / 1e6 for n in (*FEATURE_WORKLOADS, *LATENT_WORKLOADS)
    ]
    assert elements == pytest.approx([11.8, 5.9, 75.5, 0.066, 0.066, 0.262], rel=0.01)


def test_problems_of_one_seed_are_equal_and_have_the_layout_asked_for():
    one, last = (
        features.FeatureProblem(LAYERS.shapes, channels_last=channels_last)
        for channels_last in (False, True)
    )
    assert all(map(torch.equal, one.tuned, last.tuned))
    assert last.base[0].is_contiguous(memory_format=torch.channels_last)
    assert one.channel_dims == [1, 1, -1]


def test_the_gpu_bench_has_both():
    planned = {plan.suite.name for plan in gpu.PLANS}
    assert {"feature alignment", "adaptive denoising"} <= planned
