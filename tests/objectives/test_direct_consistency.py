"""Direct consistency: the loss and every gradient of a whole step, from the equation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.objectives.direct_consistency import direct_consistency_loss
from fastppt.training.step import run_step
from tests.training.objective_steps import (
    OBJECTIVES,
    ONE_FAST,
    load,
    metrics_of,
    prepared,
    stir,
)
from tests.training.plain_losses import PlainPass, compare_with_equation

MakeConfig = Callable[..., RunConfig]

CONSISTENCY = f"{OBJECTIVES}.direct_consistency"
BETA, WEIGHT, DENOISING = 40.0, 1.7, 0.6


def equation(one: PlainPass) -> dict[str, Tensor]:
    tuned, base = one.losses(one.prediction).mean(), one.losses(one.base).mean()
    # log(1 + e^x), which is -log sigmoid(-x)
    consistency = torch.log(1 + torch.exp(BETA * (tuned - base)))
    return {
        "direct_consistency": consistency,
        "denoising": tuned,
        "prediction_difference": ((one.prediction - one.base) ** 2).mean(),
        "loss": WEIGHT * consistency + DENOISING * tuned,
    }


@pytest.mark.parametrize("model", ONE_FAST)
def test_loss_and_every_gradient_follow_the_equation(make_config: MakeConfig, model: str) -> None:
    settings = {
        "model.path": model,
        "stage.0.batch_size": 3,
        "stage.0.gradient_accumulation": 2,
        # At half the side mini-sd's middle has one place, and attention to one has no gradient.
        "photos.resolution": 64,
        f"{CONSISTENCY}.beta": BETA,
        f"{CONSISTENCY}.weight": WEIGHT,
        f"{OBJECTIVES}.denoising.weight": DENOISING,
    }
    step, adapters = prepared(make_config("lora", **settings), load(model, torch.float64))
    stir(adapters)
    passes = compare_with_equation(step, adapters, load(model, torch.float64), model, equation)
    # Where sigmoid is flat, a wrong beta would not show.
    assert all(0.01 < float(terms["direct_consistency"]) < 20 for terms in passes)


def test_it_teaches_alone_and_notes_the_denoising_loss(make_config: MakeConfig) -> None:
    config = make_config("dco", **{"stage.0.trainables.lora.learning_rate": 1e-2})
    (stage,) = config.stage
    assert stage.objectives.denoising is None
    step, _ = prepared(config, load("mini-sdxl"))
    for number in range(3):
        run_step(step, number)
    rows = metrics_of(step, 3)
    for row in rows:
        assert row["loss"] == row["direct_consistency"] and row["denoising"] > 0
    assert len({row["direct_consistency"] for row in rows}) == 3


def test_equal_predictions_cost_log_two_and_pull_as_beta_over_two() -> None:
    chance = torch.Generator().manual_seed(0)
    base, target = torch.randn(2, 3, 4, 5, 5, generator=chance, dtype=torch.float64)
    prediction = base.clone().requires_grad_()
    loss = direct_consistency_loss(prediction, base, target, 1000.0)
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-12)
    loss.backward()
    plain = 2 * (base - target) / base.numel()
    torch.testing.assert_close(prediction.grad, 500 * plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_difference_beyond_every_exponent_stays_finite(sign: int) -> None:
    target, far = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 10.0)
    tuned, base = (far, target) if sign > 0 else (target, far)
    tuned = tuned.clone().requires_grad_()
    loss = direct_consistency_loss(tuned, base, target, 1000.0)
    assert float(loss.detach()) == (1e5 if sign > 0 else 0.0)
    loss.backward()
    assert tuned.grad.isfinite().all()


def test_half_precision_predictions_are_compared_in_float32() -> None:
    chance = torch.Generator().manual_seed(0)
    base, target = torch.randn(2, 2, 4, 8, 8, generator=chance)
    tuned = (base + 1e-3 * torch.randn(2, 4, 8, 8, generator=chance)).bfloat16()
    ours = direct_consistency_loss(tuned, base.bfloat16(), target, 1000.0)
    wanted = direct_consistency_loss(
        tuned.double(), base.bfloat16().double(), target.double(), 1000.0
    )
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(wanted), rel=1e-3)


def test_steps_without_a_base_pass_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="direct_consistency compares with the base in each step"):
        make_config("lora", **{f"{CONSISTENCY}.beta": 1000.0, "stage.0.base_every": 2})
