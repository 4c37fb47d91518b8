"""The anchor penalty: the op, torch._foreach, the autograd loop and torch.compile."""

import pytest

from bench.suites import ANCHOR, SCALING

# What takes well under a second a call on one CPU thread. SDXL at rank 128 and a full fine-tune of
# SD1.5 do not: bench.gpu measures them.
WORKLOADS = ("SDXL, rank 1", "SDXL, rank 4", "SDXL, rank 32", "SD3-M, rank 32", "SD1.5, rank 32")


@pytest.mark.parametrize("way", ANCHOR.makers)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_anchor_penalty(run_way, workload, way):
    run_way(ANCHOR, workload, way)


@pytest.mark.parametrize("way", ANCHOR.ways(compiled=False))
@pytest.mark.parametrize("workload", SCALING)
def test_anchor_penalty_over_the_number_of_tensors(run_way, workload, way):
    run_way(ANCHOR, workload, way)


@pytest.mark.parametrize("workload", ["SDXL, rank 1", "SDXL, rank 4"])
def test_anchor_penalty_in_rotation(run_in_rotation, workload):
    run_in_rotation(ANCHOR, workload)
