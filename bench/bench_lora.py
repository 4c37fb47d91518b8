"""Adapted projections, forward and backward: joint LoRA, peft's layers, autograd, torch.compile."""

import pytest

from bench.lora import LAYER, LORA, MINI_LAYERS


@pytest.mark.parametrize("way", LORA.makers)
@pytest.mark.parametrize("workload", [LAYER, MINI_LAYERS])
def test_lora(run_way, workload, way):
    run_way(LORA, workload, way)


@pytest.mark.parametrize("workload", [LAYER, MINI_LAYERS])
def test_lora_in_rotation(run_in_rotation, workload):
    run_in_rotation(LORA, workload)
