"""One training step: draw, predict, compare, pull back, update, note.

Everything that the step reads and writes sits at a fixed device address before the first step, and
nothing is read back on the host: the same step can be captured in a CUDA graph as it stands.

Shape legend: B batch, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastppt.config import StageConfig
from fastppt.data.latents import PLAIN_VIEW, LatentBank
from fastppt.data.prompts import PromptBank
from fastppt.families.base import Family
from fastppt.objectives.denoising import denoising_losses
from fastppt.training.loss_scale import LossScale
from fastppt.training.ring import MetricRing
from fastppt_kernels import AnchoredAdamW

METRICS = ("loss", "denoising", "anchor", "grad_norm", "learning_rate")


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
class Step:
    """Everything that a step of one stage reads and writes.

    The steps of a stage's buckets share all but latents and prompts.

    Attributes:
        learning_rate: 0-dim tensor on the device, also the optimizer's; the loop writes it.
        generator: The run's own, on the device; nothing else draws from it.
        loss_scale: Of a network in float16; None for the others.
        losses: [1], the passes' losses so far, averaged over the passes of the step.
    """

    family: Family
    stage: StageConfig
    latents: LatentBank
    prompts: PromptBank
    optimizer: AnchoredAdamW
    learning_rate: Tensor
    generator: torch.Generator
    ring: MetricRing
    loss_scale: LossScale | None
    losses: Tensor


def run_step(step: Step) -> None:
    """Take one optimizer step and note its metrics.

    loss = denoising.weight * mean_B L_b + anchor.weight * ||theta - theta_0||^2

    The gradients of the passes of one step are averaged; the anchor's is added once, by the
    optimizer, before clipping.
    """
    for _ in range(step.stage.gradient_accumulation):
        accumulate_gradients(step)
    update_parameters(step)


def accumulate_gradients(step: Step) -> None:
    """Add the gradients of one pass, and its losses to `Step.losses`."""
    stage = step.stage
    assert stage.objectives.denoising is not None
    loss = denoising_pass(step, draw(step)) / stage.gradient_accumulation
    _scaled(step, stage.objectives.denoising.weight * loss).backward()
    step.losses.add_(loss.detach())


def update_parameters(step: Step) -> None:
    """Take the optimizer's step with the gradients that there are, and note the metrics."""
    assert step.stage.objectives.denoising is not None
    step.optimizer.step(skip=_unscale_gradients_(step))
    step.optimizer.zero_grad(set_to_none=False)
    penalty, grad_norm = step.optimizer.penalty, step.optimizer.grad_norm
    (denoising,) = step.losses.unbind()
    total = step.stage.objectives.denoising.weight * denoising + penalty
    step.ring.write([total, denoising, penalty, grad_norm, step.learning_rate])
    step.losses.zero_()


def draw(step: Step) -> Draws:
    """Draw everything that any recipe needs, so that recipes compare draw for draw."""
    batch_size, device = step.stage.batch_size, step.family.device
    shape = (batch_size, *step.latents.latent_shape)
    dtype, generator = step.latents.posteriors.dtype, step.generator
    return Draws(
        photos=torch.randint(
            step.latents.num_photos, (batch_size,), generator=generator, device=device
        ),
        timesteps=step.family.draw_timesteps(batch_size, generator),
        augmentations=torch.rand(batch_size, generator=generator, device=device),
        view_fractions=torch.rand(batch_size, generator=generator, device=device),
        posterior_normals=torch.randn(shape, generator=generator, device=device, dtype=dtype),
        noise=torch.randn(shape, generator=generator, device=device, dtype=dtype),
    )


def denoising_pass(step: Step, draws: Draws) -> Tensor:
    """Return the batch's mean denoising loss, with the graph that leads to the adapters."""
    family = step.family
    views = torch.full_like(draws.photos, PLAIN_VIEW)
    latents = step.latents.sample(draws.photos, views, draws.posterior_normals)
    noisy = family.add_noise(latents, draws.noise, draws.timesteps)
    target = family.target(latents, draws.noise, draws.timesteps)
    prediction = family.predict(
        noisy,
        draws.timesteps,
        step.prompts.subject(draws.photos),
        step.prompts.sizes[draws.photos],
    )
    return denoising_losses(prediction, target).mean()


def _scaled(step: Step, loss: Tensor) -> Tensor:
    return loss if step.loss_scale is None else loss * step.loss_scale.scale


def _unscale_gradients_(step: Step) -> Tensor | None:
    """Take the loss scale out of the gradients; returns whether to skip the step, on the device."""
    if step.loss_scale is None:
        return None
    params = (param for group in step.optimizer.param_groups for param in group["params"])
    return step.loss_scale.unscale_([param.grad for param in params])
