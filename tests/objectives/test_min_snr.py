"""Min-SNR weighting: the loss and every gradient of a whole step, from the equation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastppt.config import ModelConfig, RunConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import make_family
from fastppt.families.names import MINI_MODELS
from fastppt.mini import build_mini
from fastppt.objectives.denoising import min_snr_weights
from fastppt.training.loop import train
from tests.training.objective_steps import OBJECTIVES, prepared, stir
from tests.training.plain_losses import PlainPass, compare_with_equation

MakeConfig = Callable[..., RunConfig]

GAMMA, WEIGHT = 0.8, 1.3
MIN_SNR = {
    f"{OBJECTIVES}.denoising.weighting": "min_snr",
    f"{OBJECTIVES}.denoising.snr_gamma": GAMMA,
    f"{OBJECTIVES}.denoising.weight": WEIGHT,
}


def load(model: str, prediction_type: str) -> Family:
    pipeline = build_mini(model)
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    where = ModelConfig(path=model, device="cpu")
    return make_family(MINI_MODELS[model], pipeline, where, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("model", [pytest.param("mini-sd", marks=pytest.mark.slow), "mini-sdxl"])
def test_loss_and_every_gradient_follow_the_equation(
    make_config: MakeConfig, model: str, prediction_type: str
) -> None:
    velocity = prediction_type == "v_prediction"
    above = []

    def equation(one: PlainPass) -> dict[str, Tensor]:
        total = torch.zeros((), dtype=torch.float64)
        for alpha, loss in zip(one.alphas.tolist(), one.losses(one.prediction), strict=True):
            ratio = alpha / (1 - alpha)
            above.append(ratio > GAMMA)
            total = total + min(ratio, GAMMA) / (ratio + velocity) * loss / len(one.alphas)
        return {"denoising": total, "loss": WEIGHT * total}

    config = make_config(
        "lora",
        **MIN_SNR,
        **{"model.path": model, "stage.0.batch_size": 4, "stage.0.gradient_accumulation": 2},
        # At half the side mini-sd's middle has one place, and attention to one has no gradient.
        **{"photos.resolution": 64},
    )
    step, adapters = prepared(config, load(model, prediction_type))
    stir(adapters)
    other = load(model, prediction_type)
    compare_with_equation(step, adapters, other, model, equation)
    assert len(above) == 8 and len(set(above)) == 2


def test_without_any_signal_noise_weighs_one_and_velocity_nothing() -> None:
    ratios = torch.tensor([0.0, 2.0, 10.0])
    assert min_snr_weights(ratios, "epsilon", 5.0).tolist() == [1.0, 1.0, 0.5]
    velocity = min_snr_weights(ratios, "v_prediction", 5.0)
    torch.testing.assert_close(velocity, torch.tensor([0.0, 2 / 3, 5 / 11]))


def test_flow_matching_is_refused_before_anything_is_encoded(make_config: MakeConfig) -> None:
    config = make_config("lora", **MIN_SNR, **{"model.path": "mini-sd3"})
    with pytest.raises(UserError) as error:
        train(config, Console(quiet=True))
    assert str(error.value).startswith("stage.0.objectives.denoising.weighting: min_snr weighs by")
    assert "mini-sd3 was trained by flow matching" in str(error.value)
    assert not config.output.exists()
