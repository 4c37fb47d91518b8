"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752).

Shape legend: B batch, C latent channels, h and w latent height and width, N prompts, K text
tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import PromptEmbeddings, PromptIds
from fastppt.families.networks import finest_blocks
from fastppt.families.unet import UNetFamily


class StableDiffusion(UNetFamily):
    """SD 1.x and 2.x: one text encoder, and the timestep as the only other condition.

    Which of them a model is shows in its configuration: 2.x has linear projections around its
    transformers, 1.x has convolutions; the 2.x of 768 pixels predicts velocity.
    """

    name = "sd"
    lora_component = "unet"
    unread_projections: tuple[str, ...] = ()
    # T of Adaptive Personalized Training (arXiv 2507.02687) for 2.1; for 1.x it is our choice.
    indicator_temperature = 100.0
    sampler, sampler_guidance = "ddim", 7.5

    def __init__(
        self, pipeline: Any, model: ModelConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(pipeline, model, device, dtype)
        self.aligned_blocks: tuple[str, ...] = finest_blocks(pipeline.unet.config.up_block_types)
        is_second = bool(pipeline.unet.config.use_linear_projection)
        predicts_velocity = self.prediction_type == "v_prediction"
        # The names that sd-scripts gives (get_model_version_str_for_sd1_sd2, sai_model_spec).
        self.kohya_model_version = f"sd_v{1 + is_second}" + "_v" * predicts_velocity
        self.modelspec_architecture = "stable-diffusion-v1"
        if is_second:
            size = "768-v" if predicts_velocity else "512"
            self.modelspec_architecture = f"stable-diffusion-v2-{size}"

    def _encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Return tokens [N, K, D], as the pipeline encodes prompts; nothing is pooled."""
        tokens, _ = self._pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return PromptEmbeddings(tokens.to(self.dtype), None)

    def prompt_ids(self, prompts: Sequence[str]) -> PromptIds:
        """Return the prompts as the CLIP's tokens, as `Family` says.

        Raises:
            UserError: the encoder is told where padding is, which `encode_ids` does not.
        """
        if getattr(self._pipeline.text_encoder.config, "use_attention_mask", False):
            raise UserError(
                f"model {self.model.path}: its text encoder has use_attention_mask in its "
                "configuration, which training of text does not follow; leave trainables.tokens "
                "and trainables.text_encoder_lora out"
            )
        return super().prompt_ids(prompts)

    def encode_ids(self, ids: PromptIds) -> PromptEmbeddings:
        """Return tokens [N, K, D], the encoder's last layer, normalised; nothing is pooled."""
        tokens: Tensor = self.text.clips["text_encoder"](ids.clips["text_encoder"])[0]
        return PromptEmbeddings(tokens, None)

    def encode_negative(self) -> PromptEmbeddings:
        """Return the embedding of the empty prompt, one row, as the pipeline has it."""
        return self.encode_prompts([""])

    def size_conditions(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int]
    ) -> Tensor:
        """Return [0]: the network is told nothing of sizes."""
        return torch.empty(0, device=self.device, dtype=self._precise)

    def predict_at(
        self, noisy: Tensor, times: Tensor, prompts: PromptEmbeddings, sizes: Tensor
    ) -> Tensor:
        """Run the UNet on [B, C, h, w] latents; ``sizes`` is [B, 0]."""
        prediction: Tensor = self.network(
            noisy.to(self.dtype),
            times,
            encoder_hidden_states=prompts.tokens,
            return_dict=False,
        )[0]
        return prediction

    def _painter(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=self._pipeline.vae,
            text_encoder=None,
            tokenizer=None,
            unet=self.network,
            scheduler=type(self._pipeline.scheduler).from_config(self._pipeline.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
