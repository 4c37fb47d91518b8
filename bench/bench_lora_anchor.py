"""The anchor of LoRA pairs in the effective form, without and with an anchor that is not zero."""

import pytest

from bench.suites import LORA_ANCHOR, LORA_ANCHOR_ANCHORED

# What takes well under a second a call on one CPU thread.
WORKLOADS = ("SDXL, rank 4", "SD1.5, rank 32")


@pytest.mark.parametrize("way", LORA_ANCHOR.makers)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_lora_anchor_penalty(run_way, workload, way):
    run_way(LORA_ANCHOR, workload, way)


@pytest.mark.parametrize("way", LORA_ANCHOR_ANCHORED.makers)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_lora_anchor_penalty_with_an_anchor(run_way, workload, way):
    run_way(LORA_ANCHOR_ANCHORED, workload, way)


def test_lora_anchor_penalty_in_rotation(run_in_rotation):
    run_in_rotation(LORA_ANCHOR, "SDXL, rank 4")
