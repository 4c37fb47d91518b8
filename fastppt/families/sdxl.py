"""Stable Diffusion XL (Podell et al., arXiv 2307.01952).

Shape legend: B batch, N prompts, K text tokens, D text width, W pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from fastppt.families.base import PromptEmbeddings
from fastppt.families.unet import UNetFamily


class StableDiffusionXL(UNetFamily):
    """SDXL: two text encoders, pooled text and sizes in the time embedding."""

    name = "sdxl"
    lora_component = "unet"
    unread_projections: tuple[str, ...] = ()
    kohya_model_version = "sdxl_base_v1-0"
    modelspec_architecture = "stable-diffusion-xl-v1-base"
    # Adaptive Personalized Training, arXiv 2507.02687: the coarser two up blocks, and T.
    aligned_blocks: tuple[str, ...] = ("up_blocks.0", "up_blocks.1")
    indicator_temperature = 1000.0

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Return tokens [N, K, D] and pooled [N, W], as the pipeline encodes prompts."""
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return PromptEmbeddings(tokens.to(self.dtype), pooled.to(self.dtype))

    @torch.no_grad()
    def encode_negative(self) -> PromptEmbeddings:
        """Return the pipeline's unconditional embedding, one row (zeros where configured so)."""
        _, tokens, _, pooled = self._pipeline.encode_prompt(
            "", device=self.device, do_classifier_free_guidance=True
        )
        return PromptEmbeddings(tokens.to(self.dtype), pooled.to(self.dtype))

    def size_conditions(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int]
    ) -> Tensor:
        """Return [6]: original height and width, crop top and left, target height and width."""
        sizes = (*original_size, *crop, *target_size)
        # Not in bf16, which has no odd numbers past 256: the network embeds them in float32.
        return torch.tensor(sizes, device=self.device, dtype=self._precise)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, prompts: PromptEmbeddings, sizes: Tensor
    ) -> Tensor:
        """Run the UNet on [B, C, h, w] latents with [B, 6] size conditions."""
        prediction: Tensor = self.network(
            noisy.to(self.dtype),
            timesteps,
            encoder_hidden_states=prompts.tokens,
            added_cond_kwargs={"text_embeds": prompts.pooled, "time_ids": sizes},
            return_dict=False,
        )[0]
        return prediction

    def _painter(self) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=self._pipeline.vae,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=self.network,
            scheduler=type(self._pipeline.scheduler).from_config(self._pipeline.scheduler.config),
            force_zeros_for_empty_prompt=self._pipeline.config.force_zeros_for_empty_prompt,
        )
