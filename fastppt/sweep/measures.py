"""What is measured of a run whatever its model is.

Shape legend: P photos, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.data.photos import crop_photo, find_photos
from fastppt.data.prompts import class_prompt, quiet_truncation
from fastppt.families.base import Family, PromptEmbeddings
from fastppt.families.loading import load_family, resolve_resolution
from fastppt.outputs.generate import install_run

LAST_PART = 0.25
"""Of the steps, the last ones, over which a loss is averaged."""

TENTHS = 10
"""Parts of the timesteps, in each of which every photo is looked at once."""

NOISE_SEED = 0
"""The same for all runs: their noise differences are of the same noised latents."""


@dataclass(frozen=True)
class Predictions:
    """What a network predicts of noised photos, as noise up to what all networks share.

    Attributes:
        class_prompt: Told the class prompt, [`TENTHS` * P, C, h, w], float32 on the host.
        no_prompt: Told what guidance pushes away from, likewise.
    """

    class_prompt: Tensor
    no_prompt: Tensor


def subject_loss(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean denoising loss over the last quarter of the steps.

    Runs of one seed draw the same photos, timesteps and noise, so theirs compare step by step.

    Args:
        rows: Of metrics.jsonl.

    Returns:
        None where no step there has one that is finite.
    """
    last = rows[-max(1, round(LAST_PART * len(rows))) :]
    losses = [row["denoising"] for row in last if row.get("denoising") is not None]
    return statistics.fmean(losses) if losses else None


def parameter_drift(rows: Sequence[Mapping[str, Any]], weight: float) -> float | None:
    """Return ||theta - theta_0|| as the anchor measures it, before the last of its stage's steps.

    Its penalty is weight * ||theta - theta_0||^2: for LoRA in the effective form over the network's
    weights, otherwise over what is trained.

    Args:
        rows: Of metrics.jsonl, those of the last stage that has an anchor.
        weight: Of the anchor.

    Returns:
        None where nothing was held, so that nothing was measured.
    """
    penalty = rows[-1].get("anchor")
    return math.sqrt(penalty / weight) if weight > 0 and penalty is not None else None


def noise_differences(base: Predictions, tuned: Predictions) -> dict[str, float]:
    """Return the mean squared difference of the noise that two networks find."""
    return {
        "class_noise": (tuned.class_prompt - base.class_prompt).square().mean().item(),
        "no_prompt_noise": (tuned.no_prompt - base.no_prompt).square().mean().item(),
    }


def predict_both(
    config: RunConfig, folder: Path, base: Predictions | None
) -> tuple[Predictions, Predictions]:
    """Return what the base predicts, and what a run has made of it.

    The model is loaded anew, and the run's files are put into it.

    Args:
        config: The run's.
        folder: Likewise.
        base: What the base predicts, where it was asked before for a run of the same sweep.

    Raises:
        UserError: the model or the run's files cannot be read.
    """
    family = load_family(config.model)
    latents, sizes = _encode_photos(config, family)
    if base is None:
        base = _predict(config, family, latents, sizes)
    # A prompt that says no learned word: the word is not what is asked for.
    install_run(family, folder, config, None, class_prompt(config.prompts))
    return base, _predict(config, family, latents, sizes)


@torch.no_grad()
def _encode_photos(config: RunConfig, family: Family) -> tuple[Tensor, Tensor]:
    """Return the photos' latents, the means of their posteriors [P, C, h, w], and their sizes."""
    assert config.photos.folder is not None
    side = resolve_resolution(config.photos.resolution, family)
    latents, sizes = [], []
    for photo in find_photos(config.photos.folder, config.photos.captions):
        crop = crop_photo(photo, (side, side))
        latents.append(family.encode_photos(crop.pixels[None])[0])
        sizes.append(family.size_conditions(photo.size, crop.crop, (side, side)))
    return torch.cat(latents), torch.stack(sizes)


@torch.no_grad()
def _predict(config: RunConfig, family: Family, latents: Tensor, sizes: Tensor) -> Predictions:
    with quiet_truncation():
        prompts = (family.encode_prompts([class_prompt(config.prompts)]), family.encode_negative())
    count, width = len(latents), family.num_timesteps // TENTHS
    generator = torch.Generator().manual_seed(NOISE_SEED)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tenth in range(TENTHS):
        timesteps = tenth * width + torch.randint(width, (count,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps, noise = timesteps.to(latents.device), noise.to(latents)
        noisy = family.add_noise(latents, noise, timesteps)
        for prompt, kept in zip(prompts, found, strict=True):
            # One at a time, as in a step: a full-size model's photos need not fit together.
            for at in range(count):
                row = slice(at, at + 1)
                predicted = _noise_of(family, noisy[row], timesteps[row], prompt, sizes[row])
                kept.append(predicted.float().cpu())
    return Predictions(torch.cat(found[0]), torch.cat(found[1]))


def _noise_of(
    family: Family, noisy: Tensor, timesteps: Tensor, prompt: PromptEmbeddings, sizes: Tensor
) -> Tensor:
    """Return the noise in the network's prediction, without what follows from the noisy latents.

    z_t = a z + b e. Of velocity, v = a e - b z (a^2 + b^2 = 1), it is e = a v + b z_t; of flow,
    v = e - z (a + b = 1), e = a v + z_t. Differences of e are a times those of v in both.
    """
    predicted = family.predict(noisy.to(family.dtype), timesteps, prompt, sizes).to(noisy.dtype)
    if family.prediction_type == "epsilon":
        return predicted
    signal = family.add_noise(torch.ones_like(noisy), torch.zeros_like(noisy), timesteps)
    return signal * predicted
