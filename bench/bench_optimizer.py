"""Anchor, clip and AdamW: AnchoredAdamW against torch's AdamW behind an anchor of its own."""

import pytest

from bench.suites import OPTIMIZER, OPTIMIZER_EFFECTIVE, SCALING

# What takes well under a second a call on one CPU thread.
WORKLOADS = ("SDXL, rank 4", "SD1.5, rank 32")


@pytest.mark.parametrize("way", OPTIMIZER.makers)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_anchored_adamw(run_way, workload, way):
    run_way(OPTIMIZER, workload, way)


@pytest.mark.parametrize("way", OPTIMIZER.ways(compiled=False))
# At 10,000 tensors the way over an autograd loop takes seconds.
@pytest.mark.parametrize("workload", SCALING[:-1])
def test_anchored_adamw_over_the_number_of_tensors(run_way, workload, way):
    run_way(OPTIMIZER, workload, way)


@pytest.mark.parametrize("way", OPTIMIZER_EFFECTIVE.makers)
def test_anchored_adamw_in_the_effective_form(run_way, way):
    run_way(OPTIMIZER_EFFECTIVE, "SD1.5, rank 4", way)


def test_anchored_adamw_in_rotation(run_in_rotation):
    run_in_rotation(OPTIMIZER, "SDXL, rank 4")
