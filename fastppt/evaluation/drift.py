"""How far a tuned model has moved from its base: in what it predicts, and in its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppt.mini.prompt_following import BATCH

TENTHS = 10
"""Parts of the schedule, from the least noise to the most, that are looked at apart."""


@torch.inference_mode()
def predict_noise(pipeline: Any, latents: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
    """Return the noise that a pipeline finds in scenes, once in each tenth of the schedule.

    z_t = sqrt(abar_t) z + sqrt(1 - abar_t) e; a network that predicts the velocity v has found
    e = sqrt(1 - abar_t) z_t + sqrt(abar_t) v (arXiv 2202.00512).

    Timesteps and noise depend on ``seed`` alone: two pipelines see the same latents. Each encodes
    the prompts itself, so what has moved in text encoders counts.

    Args:
        pipeline: A stock pipeline with a UNet that is told sizes.
        latents: [N, C, h, w], as of `encode`.
        prompts: One a scene.
        seed: Of timesteps and noise.

    Returns:
        [`TENTHS`, N, C, h, w].
    """
    abar = pipeline.scheduler.alphas_cumprod.float()
    generator = torch.Generator().manual_seed(seed)
    width = len(abar) // TENTHS
    drawn = torch.randint(width, (TENTHS, len(latents)), generator=generator)
    timesteps = drawn + width * torch.arange(TENTHS)[:, None]
    tokens, _, pooled, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    found = []
    for tenth in timesteps:
        noise = torch.randn(latents.shape, generator=generator)
        signal = abar[tenth].sqrt()[:, None, None, None]
        remains = (1 - abar[tenth]).sqrt()[:, None, None, None]
        noised = signal * latents + remains * noise
        predicted = torch.cat(
            [
                _predict(pipeline, noised[part], tenth[part], tokens[part], pooled[part])
                for part in (
                    slice(start, start + 2 * BATCH) for start in range(0, len(latents), 2 * BATCH)
                )
            ]
        )
        if pipeline.scheduler.config.prediction_type == "v_prediction":
            predicted = remains * noised + signal * predicted
        found.append(predicted)
    return torch.stack(found)


def _predict(
    pipeline: Any, noised: Tensor, timesteps: Tensor, tokens: Tensor, pooled: Tensor
) -> Tensor:
    side = float(noised.shape[-1] * pipeline.vae_scale_factor)
    # Original size, crop corner, target size.
    sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(len(noised), 1)
    conditions = {"text_embeds": pooled, "time_ids": sizes}
    output: Tensor = pipeline.unet(
        noised, timesteps, encoder_hidden_states=tokens, added_cond_kwargs=conditions
    ).sample
    return output


def effective_weights(network: Any) -> dict[str, Tensor]:
    """Return the weights that a network computes with, adapters merged into them, in float64.

    For LoRA that is W + s B A. The network is left as it was. Adapters' own parameters are among
    what is returned, under names that a network without adapters does not have.

    Args:
        network: Of diffusers, with adapters of the peft library in it or without.
    """
    merged = copy.deepcopy(network).double()
    for module in list(merged.modules()):
        # A layer of peft's around one of the network's.
        if hasattr(module, "base_layer"):
            module.merge()
    return {
        name.replace(".base_layer.", "."): value.detach()
        for name, value in merged.named_parameters()
    }


def parameter_distance(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> float:
    """Return ||theta - theta_0|| over the weights that the base has.

    Args:
        base: theta_0, of `effective_weights`.
        tuned: theta, likewise; holds the same names at least.
    """
    squares = [(tuned[name] - value).square().sum() for name, value in base.items()]
    return torch.stack(squares).sum().sqrt().item()
