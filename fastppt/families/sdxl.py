"""Stable Diffusion XL (Podell et al., arXiv 2307.01952).

Shape legend: B batch, N prompts, K text tokens, D text width, W pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from fastppt.config import ModelConfig
from fastppt.families.base import PromptEmbeddings, PromptIds
from fastppt.families.networks import blocks_with_attention
from fastppt.families.text_encoders import PROJECTIONS
from fastppt.families.unet import UNetFamily


class StableDiffusionXL(UNetFamily):
    """SDXL: two text encoders, pooled text and sizes in the time embedding."""

    name = "sdxl"
    lora_component = "unet"
    kohya_model_version = "sdxl_base_v1-0"
    modelspec_architecture = "stable-diffusion-xl-v1-base"
    # T of Adaptive Personalized Training, arXiv 2507.02687.
    indicator_temperature = 1000.0
    sampler, sampler_guidance = "euler", 5.0

    def __init__(
        self, pipeline: Any, model: ModelConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(pipeline, model, device, dtype)
        self.aligned_blocks: tuple[str, ...] = blocks_with_attention(
            pipeline.unet.config.up_block_types
        )
        # The first encoder is read before its last layer, and nothing pooled of it.
        last = pipeline.text_encoder.config.num_hidden_layers - 1
        self.unread_projections: tuple[str, ...] = tuple(
            f"text_encoder.text_model.encoder.layers.{last}.self_attn.{name}"
            for name in PROJECTIONS
        )

    def _encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
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

    def encode_ids(self, ids: PromptIds) -> PromptEmbeddings:
        """Return both encoders' penultimate layers side by side [N, K, D], the second's pooled."""
        outputs = [
            clip(ids.clips[component], output_hidden_states=True)
            for component, clip in self.text.clips.items()
        ]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return PromptEmbeddings(tokens, outputs[-1].text_embeds)

    def negative_ids(self) -> PromptIds | None:
        """Return the empty prompt; None where the pipeline has zeros for it."""
        if self._pipeline.config.force_zeros_for_empty_prompt:
            return None
        return super().negative_ids()

    def size_conditions(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int]
    ) -> Tensor:
        """Return [6]: original height and width, crop top and left, target height and width."""
        sizes = (*original_size, *crop, *target_size)
        # Not in bf16, which has no odd numbers past 256: the network embeds them in float32.
        return torch.tensor(sizes, device=self.device, dtype=self._precise)

    def predict_at(
        self, noisy: Tensor, times: Tensor, prompts: PromptEmbeddings, sizes: Tensor
    ) -> Tensor:
        """Run the UNet on [B, C, h, w] latents with [B, 6] size conditions."""
        prediction: Tensor = self.network(
            noisy.to(self.dtype),
            times,
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
