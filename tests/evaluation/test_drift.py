"""Drift of predictions and of weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppt.evaluation.drift import TENTHS, parameter_distance, predict_noise
from fastppt.evaluation.measures import noise_scores

ABAR = torch.linspace(0.999, 0.01, 1000)


def perfect_pipeline(latents: Tensor, prediction_type: str, seen: list[Tensor]) -> Any:
    """A pipeline whose network knows the scenes, and so finds their noise without error."""

    def unet(noised: Tensor, timesteps: Tensor, *, added_cond_kwargs: Any, **_: object) -> Any:
        seen.append(timesteps)
        # Original size, corner of the crop, target size, as the pipeline itself says them.
        assert added_cond_kwargs["time_ids"].unique(dim=0).tolist() == [[16, 16, 0, 0, 16, 16]]
        signal, remains = (part[timesteps].sqrt()[:, None, None, None] for part in (ABAR, 1 - ABAR))
        noise = (noised - signal * latents) / remains
        velocity = signal * noise - remains * latents
        return SimpleNamespace(sample=velocity if prediction_type == "v_prediction" else noise)

    def encode_prompt(prompts: list[str], **_: object) -> tuple[Tensor, None, Tensor, None]:
        return torch.zeros(len(prompts), 24, 8), None, torch.zeros(len(prompts), 4), None

    config = SimpleNamespace(prediction_type=prediction_type)
    scheduler = SimpleNamespace(alphas_cumprod=ABAR, config=config)
    return SimpleNamespace(
        unet=unet, encode_prompt=encode_prompt, scheduler=scheduler, vae_scale_factor=4
    )


def test_velocity_is_converted_to_the_noise_that_was_added() -> None:
    latents = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    found = {
        kind: predict_noise(perfect_pipeline(latents, kind, []), latents, ["a boat"] * 5, seed=3)
        for kind in ("v_prediction", "epsilon")
    }
    torch.testing.assert_close(found["v_prediction"], found["epsilon"], atol=2e-4, rtol=1e-4)
    assert found["epsilon"].std().item() == pytest.approx(1, abs=0.1)


def test_every_scene_is_seen_once_in_each_tenth_of_the_schedule() -> None:
    seen: list[Tensor] = []
    latents = torch.zeros(6, 8, 4, 4)
    predict_noise(perfect_pipeline(latents, "epsilon", seen), latents, ["a boat"] * 6, seed=0)
    assert torch.equal(torch.stack(seen) // 100, torch.arange(TENTHS)[:, None].expand(-1, 6))
    assert len(torch.cat(seen).unique()) > TENTHS


def test_noise_difference_is_the_mean_square_over_all_and_by_tenths() -> None:
    base = torch.zeros(TENTHS, 3, 2, 2, 2)
    tuned = torch.arange(TENTHS).float()[:, None, None, None, None].expand_as(base)
    scores = noise_scores("class", base, tuned)
    assert [scores[f"class_noise_tenth_{at + 1}"].value for at in range(TENTHS)] == [
        at**2 for at in range(TENTHS)
    ]
    assert scores["class_noise"].value == pytest.approx(28.5)
    assert scores["class_noise"].count == 3


def test_parameter_distance_is_the_norm_of_all_that_has_moved() -> None:
    base = {"a": torch.zeros(2, 2).double(), "b": torch.ones(3).double()}
    tuned = {"a": torch.full((2, 2), 2.0).double(), "b": base["b"] + 3, "adapter": torch.ones(1)}
    assert parameter_distance(base, tuned) == pytest.approx((4 * 4 + 3 * 9) ** 0.5)
    assert parameter_distance(base, base) == 0
