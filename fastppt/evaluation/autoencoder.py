"""Pictures as a pipeline's VAE sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppt.mini.prompt_following import BATCH


@torch.inference_mode()
def encode(pipeline: Any, pictures: Tensor) -> Tensor:
    """Return the latents of pictures: the means of the posterior, scaled.

    Args:
        pipeline: Of diffusers.
        pictures: [N, 3, H, W] in -1 to 1.
    """
    vae = pipeline.vae
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(BATCH)])
    return means * float(vae.config.scaling_factor)


@torch.inference_mode()
def decode(pipeline: Any, latents: Tensor) -> Tensor:
    """Return the pictures [N, 3, H, W] in -1 to 1 of latents as `encode` makes them."""
    vae = pipeline.vae
    parts = (latents / float(vae.config.scaling_factor)).split(BATCH)
    return torch.cat([vae.decode(part).sample for part in parts]).clamp(-1, 1)
