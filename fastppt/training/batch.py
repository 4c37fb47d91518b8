"""What a pass is asked: photos, views, timesteps and noise, and the class images beside them.

Shape legend: B batch, C latent channels, h and w latent height and width, S size conditions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppt.data.latents import PLAIN_VIEW, LatentBank
from fastppt.objectives.prior_preservation import join_halves

if TYPE_CHECKING:
    from fastppt.training.step import Step


@dataclass(frozen=True)
class Draws:
    """All the chance in one pass.

    Attributes:
        photos: [B] int64, uniform, with replacement.
        timesteps: [B] int64, as the family draws them.
        augmentations: [B] uniform in [0, 1), compared with the probability of augmentation.
        view_fractions: [B] uniform in [0, 1), which augmented view.
        posterior_normals: [B, C, h, w] standard normal, for the VAE's posterior.
        noise: [B, C, h, w] standard normal, what the network learns to find.
    """

    photos: Tensor
    timesteps: Tensor
    augmentations: Tensor
    view_fractions: Tensor
    posterior_normals: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Batch:
    """What base and tuned network are both asked.

    With prior preservation all but the photos have 2 B rows: those of the photos, then those of as
    many class images.

    Attributes:
        photos: [B] int64.
        timesteps: [B] int64.
        noisy: [B, C, h, w], z_t.
        target: [B, C, h, w], what is to be predicted from it.
        sizes: [B, S], what the network is told of the photos' sizes.
        class_images: [B] int64; None without prior preservation.
    """

    photos: Tensor
    timesteps: Tensor
    noisy: Tensor
    target: Tensor
    sizes: Tensor
    class_images: Tensor | None = None


def draw(step: Step) -> Draws:
    """Draw everything that any recipe needs, so that recipes compare draw for draw."""
    return _draw(step, step.latents, step.generator)


def _draw(step: Step, bank: LatentBank, generator: torch.Generator) -> Draws:
    """Draw a batch of a bank's pictures, and what goes with it."""
    batch_size, device = step.stage.batch_size, step.family.device
    shape = (batch_size, *bank.latent_shape)
    dtype = bank.posteriors.dtype
    return Draws(
        photos=torch.randint(bank.num_photos, (batch_size,), generator=generator, device=device),
        timesteps=step.family.draw_timesteps(batch_size, generator),
        augmentations=torch.rand(batch_size, generator=generator, device=device),
        view_fractions=torch.rand(batch_size, generator=generator, device=device),
        posterior_normals=torch.randn(shape, generator=generator, device=device, dtype=dtype),
        noise=torch.randn(shape, generator=generator, device=device, dtype=dtype),
    )


def make_batch(step: Step, draws: Draws) -> Batch:
    """Return the noisy latents of the photos and views that were drawn, and what they hide."""
    views = choose_views(step, draws)
    latents = step.latents.sample(draws.photos, views, draws.posterior_normals)
    return _make_batch(step, draws, latents, step.prompts.sizes[draws.photos])


def with_class_half(step: Step, batch: Batch) -> Batch:
    """Draw as many class images as the batch has photos, and put them behind these."""
    bank, prompts = step.class_latents, step.class_prompts
    assert bank is not None and prompts is not None and step.class_generator is not None
    draws = _draw(step, bank, step.class_generator)
    plain = torch.full_like(draws.photos, PLAIN_VIEW)
    latents = bank.sample(draws.photos, plain, draws.posterior_normals)
    half = _make_batch(step, draws, latents, prompts.sizes[draws.photos])
    return Batch(
        photos=batch.photos,
        timesteps=join_halves(batch.timesteps, half.timesteps),
        noisy=join_halves(batch.noisy, half.noisy),
        target=join_halves(batch.target, half.target),
        sizes=join_halves(batch.sizes, half.sizes),
        class_images=draws.photos,
    )


def _make_batch(step: Step, draws: Draws, latents: Tensor, sizes: Tensor) -> Batch:
    family = step.family
    return Batch(
        photos=draws.photos,
        timesteps=draws.timesteps,
        noisy=family.add_noise(latents, draws.noise, draws.timesteps),
        target=family.target(latents, draws.noise, draws.timesteps),
        sizes=sizes,
    )


def choose_views(step: Step, draws: Draws) -> Tensor:
    """Return which view of each photo is shown, [B] int64: the plain one, or any augmented one.

    P(augmented) = min(gamma[bin of the sample's timestep], max_augmentation)

    Source: Adaptive Personalized Training (arXiv 2507.02687), section 4.1; gamma is the one known
    before the step.
    """
    plain = torch.full_like(draws.photos, PLAIN_VIEW)
    if step.indicator is None or not step.stage.objectives.augment:
        return plain
    assert step.stage.objectives.denoising is not None
    probability = step.indicator.gamma(draws.timesteps).clamp(
        max=step.stage.objectives.denoising.max_augmentation
    )
    augmented = PLAIN_VIEW + 1 + (draws.view_fractions * step.latents.num_views).long()
    return torch.where(draws.augmentations < probability, augmented, plain)
