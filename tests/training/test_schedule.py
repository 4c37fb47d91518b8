"""The learning rate rises, stays or falls as asked."""

from __future__ import annotations

import pytest

from fastppt.stage_config import DenoisingConfig, StageConfig
from fastppt.trainables_config import LoraConfig
from fastppt.training.schedule import learning_rate_factor


def factors(schedule: str, steps: int = 8, warmup_steps: int = 0) -> list[float]:
    stage = StageConfig(
        steps=steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        trainables={"lora": LoraConfig()},
        objectives={"denoising": DenoisingConfig()},
    )
    return [learning_rate_factor(stage, step) for step in range(steps)]


def test_constant_stays() -> None:
    assert factors("constant") == [1.0] * 8


def test_warmup_rises_linearly_and_ends_at_the_full_rate() -> None:
    assert factors("constant", steps=5, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_falls_to_zero_after_the_last_step() -> None:
    assert factors("linear", steps=6, warmup_steps=2) == pytest.approx(
        [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]
    )


def test_cosine_is_symmetric_about_its_middle() -> None:
    values = factors("cosine")
    assert values[0] == 1.0 and values[4] == pytest.approx(0.5)
    assert values[2] + values[6] == pytest.approx(1.0)
    assert sorted(values, reverse=True) == values
