"""Samplers of first order as tables: what each step keeps, adds and asks.

A deterministic sampler of first order is x <- keep_i x + push_i F(scale_i x, time_i), whatever the
network F predicts; so one step on tables is all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor


@dataclass(frozen=True)
class SamplerTable:
    """The steps of a sampler, from noise to picture.

    Attributes:
        times: [S] float64, what the network is told.
        scales: [S] float64, of what it is shown.
        keeps: [S] float64, part of the latents that stays.
        pushes: [S] float64, part of the prediction that is added.
        first_std: Standard deviation of the latents at the start.
    """

    times: Tensor
    scales: Tensor
    keeps: Tensor
    pushes: Tensor
    first_std: float


def ddim_table(config: Mapping[str, Any], steps: int) -> SamplerTable:
    """Return the steps of DDIM without added noise (Song et al., arXiv 2010.02502, eq. 12).

    x' = sqrt(abar') x_0 + sqrt(1 - abar') e, where x_0 and e follow from x and the prediction. As
    in diffusers' ``DDIMScheduler``, abar' is that of T // steps timesteps before. Predicted latents
    are not clipped: that is for pixels, and the stock pipelines switch it off.

    Args:
        config: Of the model's scheduler, whichever it is; it predicts noise or velocity.
        steps: At most as many as there are timesteps.
    """
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    times, alphas = scheduler.timesteps, scheduler.alphas_cumprod.double()
    earlier = times - scheduler.config.num_train_timesteps // steps
    last = scheduler.final_alpha_cumprod.double()
    alpha = alphas[times]
    next_alpha = torch.where(earlier >= 0, alphas[earlier.clamp(min=0)], last)
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    next_signal, next_noise = next_alpha.sqrt(), (1 - next_alpha).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        # x_0 = signal x - noise v, e = noise x + signal v
        keeps = next_signal * signal + next_noise * noise
        pushes = next_noise * signal - next_signal * noise
    else:
        # x_0 = (x - noise e) / signal
        keeps = next_signal / signal
        pushes = next_noise - next_signal * noise / signal
    return SamplerTable(times.double(), torch.ones_like(keeps), keeps, pushes, 1.0)


def euler_table(config: Mapping[str, Any], steps: int) -> SamplerTable:
    """Return Euler's steps along dx/dsigma = (x - x_0) / sigma, x = z + sigma e.

    Source: Karras et al. (arXiv 2206.00364), algorithm 2 without its second order and its noise.
    The network is shown x / sqrt(sigma^2 + 1).

    Args:
        config: As of `ddim_table`; its sigmas and their spacing are followed.
        steps: Number of steps.
    """
    scheduler = EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    sigma, next_sigma = scheduler.sigmas[:-1].double(), scheduler.sigmas[1:].double()
    change, variance = next_sigma - sigma, sigma**2 + 1
    if scheduler.config.prediction_type == "v_prediction":
        # x_0 = x / variance - v sigma / sqrt(variance)
        keeps, pushes = 1 + change * sigma / variance, change / variance.sqrt()
    else:
        keeps, pushes = torch.ones_like(sigma), change
    times = scheduler.timesteps.double()
    return SamplerTable(times, variance.rsqrt(), keeps, pushes, float(scheduler.init_noise_sigma))


def flow_table(config: Mapping[str, Any], steps: int) -> SamplerTable:
    """Return Euler's steps along dx/ds = v from noise, s = 1, to the picture, s = 0.

    Source: Esser et al. (arXiv 2403.03206), section 2, and the shift of its eq. 23.

    Args:
        config: Of a ``FlowMatchEulerDiscreteScheduler`` with a fixed shift.
        steps: Number of steps.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    sigma, next_sigma = scheduler.sigmas[:-1].double(), scheduler.sigmas[1:].double()
    ones = torch.ones_like(sigma)
    return SamplerTable(scheduler.timesteps.double(), ones, ones, next_sigma - sigma, 1.0)
