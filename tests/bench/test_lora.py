import dataclasses
import math

import pytest
import torch

from bench import gpu, lora_cpu
from bench.lora import LORA, LORA_BF16, MINI_LAYERS, OURS, PEFT
from bench.lora_cpu import FROZEN
from bench.problems import DisagreementError
from bench.rows import time_workload
from bench.suites import Workload, list_workload
from bench.ways import Way

# Of a group: inputs, weights, downs, ups, outputs.
SMALL = Workload(
    "small",
    [
        *[(7, 6), (3, 5, 6), (6, 6), (3, 5, 2), (3, 7, 5)],
        *[(4, 8), (1, 6, 8), (2, 8), (1, 6, 2), (1, 4, 6)],
    ],
)
SUITES = [LORA, LORA_BF16]
IDS = [suite.form for suite in SUITES]


def time_small(suite, names):
    return time_workload(suite, SMALL, names=names, copy_gb_per_s=10.0, seconds=0.01)


@pytest.mark.parametrize("suite", SUITES, ids=IDS)
def test_every_way_agrees_with_the_reference_and_gets_a_row(suite):
    names = suite.ways(compiled=False)
    rows, refusals = time_small(suite, names)
    assert not refusals
    assert [row["way"] for row in rows] == names
    # Forward and the gradient of the input, then three low-rank products of each.
    wanted = 2 * 2 * 7 * 15 * 6 + 3 * 2 * 7 * (6 * 6 + 6 * 5) + 2 * 2 * 4 * 6 * 8 + 6 * 4 * (2 * 14)
    assert {row["flops"] for row in rows} == {wanted}


@pytest.mark.parametrize("fault", ["output", "gradient of an input", "down", "up"])
@pytest.mark.parametrize("factor", [1.03, math.nan])
@pytest.mark.parametrize("suite", SUITES, ids=IDS)
def test_a_wrong_result_is_refused_and_gets_no_time(suite, factor, fault):
    def make(problem):
        call = suite.makers[OURS](problem).call

        def wrong():
            outputs, grads = call()
            outputs = [[output.clone() for output in group] for group in outputs]
            grads = [grad.clone() for grad in grads]
            place = {"gradient of an input": 0, "down": 2, "up": -1}.get(fault)
            (outputs[1][0] if place is None else grads[place]).mul_(factor)
            return outputs, grads

        return Way(wrong)

    rows, (refusal,) = time_small(dataclasses.replace(suite, makers={OURS: make}), [OURS])
    assert rows == []
    assert "gradients" in refusal["refused"]


def test_adapted_projections_launch_at_most_60_percent_of_pefts():
    counted = lora_cpu.count_layer_launches(MINI_LAYERS)
    assert counted[OURS] <= 0.6 * counted[PEFT]
    # Joining the linears of one input is part of it.
    assert counted[OURS] < counted["joint LoRA, a linear at a time"]


def test_adapters_add_at_most_60_percent_of_the_launches_that_pefts_add_to_a_network():
    networks = lora_cpu.build_networks()
    assert lora_cpu.check_networks(networks) < 1e-4
    counted = lora_cpu.count_network_launches(networks)
    assert counted[FROZEN] < counted[OURS] < counted[PEFT]
    assert counted[OURS] - counted[FROZEN] <= 0.6 * (counted[PEFT] - counted[FROZEN])


def test_networks_that_differ_are_refused():
    networks = lora_cpu.build_networks()
    parameters = networks[PEFT].unet.named_parameters()
    parameter = next(parameter for name, parameter in parameters if "lora_B" in name)
    with torch.no_grad():
        parameter.mul_(1.2)
    with pytest.raises(DisagreementError):
        lora_cpu.check_networks(networks)


def test_mini_layers_are_those_of_the_network():
    shapes = list_workload(MINI_LAYERS).shapes
    pairs = lora_cpu.build_networks()[OURS].grads().values()
    num_downs = sum(shape[0] // 4 for shape in shapes[2::5])
    assert num_downs == len(pairs)
    assert sum(a.numel() + b.numel() for a, b in pairs) == sum(
        torch.Size(shape).numel() for shape in shapes[2::5] + shapes[3::5]
    )


def test_the_gpu_bench_has_it_where_the_trainer_is(monkeypatch):
    assert {plan.suite.name for plan in gpu.trainer_plans()} == {"lora"}
    monkeypatch.setattr(gpu, "TRAINER_NEEDS", ("no_such_trainer_package",))
    assert gpu.trainer_plans() == ()
