"""`optimizer.moments` and rounding at random, from the configuration to a run's steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastppt.training.runners import EagerRunner, GraphRunner
from fastppt.training.step import Step
from tests.training.objective_steps import load, prepared_trainables
from tests.training.replay import ReplayRecorder
from tests.training.stages import are_equal, state_of
from tests.training.weight_steps import DENOISING, stage, weights_config

WORD = {"custom_diffusion": {"learning_rate": 1e-3, "master_weights": False}, "tokens": {}}


def prepare(photos: Path, seed: int = 0, moments: str = "8bit") -> Step:
    table = stage(WORD, DENOISING | {"anchor": {"weight": 0.1}}, optimizer={"moments": moments})
    config = weights_config(photos, [table], "mini-sd", prompts__token="<v>", seed=seed)
    return prepared_trainables(config, load("mini-sd", torch.bfloat16))[0]


def test_the_networks_weights_alone_have_their_moments_in_8_bits(photos: Path) -> None:
    step = prepare(photos)
    weights, word = step.optimizer.param_groups
    assert (weights["moments"], weights["rounding"]) == ("8bit", "stochastic")
    assert (word["moments"], word["rounding"]) == ("fp32", "nearest")
    state = step.optimizer.state[weights["params"][0]]
    assert {name: t.dtype for name, t in state.items() if "exp_avg" in name} == {
        "exp_avg": torch.uint8,
        "exp_avg_scale": torch.float32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_scale": torch.float32,
    }


@pytest.mark.slow
def test_runs_of_different_seeds_round_differently(photos: Path) -> None:
    seeds = [prepare(photos, seed).optimizer.param_groups[0]["seed"] for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.slow
def test_replayed_steps_with_8_bit_moments_equal_eager_ones(photos: Path) -> None:
    ends = []
    for replayed in (False, True):
        step = prepare(photos)
        recorder = ReplayRecorder([step.generator])
        runner = GraphRunner([step], recorder) if replayed else EagerRunner([step])
        for number in range(4):
            runner.run(0, number)
        ends.append(state_of(step))
    assert are_equal(*ends)


@pytest.mark.slow
def test_8_bit_moments_learn_as_float32_ones_do(photos: Path) -> None:
    moved = []
    for moments in ("fp32", "8bit"):
        step = prepare(photos, moments=moments)
        param = step.optimizer.param_groups[0]["params"][0]
        start = param.detach().double()
        runner = EagerRunner([step])
        for number in range(20):
            step.learning_rate.fill_(1e-3)
            runner.run(0, number)
        moved.append(param.detach().double() - start)
    cosine = torch.nn.functional.cosine_similarity(*moved, dim=0)
    assert cosine > 0.9
