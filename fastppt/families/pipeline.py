"""What all families share: a diffusers pipeline taken apart for training, and put together to draw.

Shape legend: B batch, N prompts, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fastppt.config import ModelConfig
from fastppt.families.attention import Projections, make_adaptable
from fastppt.families.backends import resolve_attention
from fastppt.families.base import PromptEmbeddings


class PipelineFamily:
    """A loaded pipeline, frozen, its parts placed where training wants them.

    Args:
        pipeline: The pretrained model; its modules are moved and frozen in place.
        model: Where it came from.
        device: Where the network trains.
        dtype: Of the network and the text encoders. The VAE runs in float32 (float64 for float64).

    Raises:
        UserError: the model cannot be trained as it is, or its attention backend is not here.
    """

    network: nn.Module
    native_resolution: int
    prompt_options: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        model: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self._attend = resolve_attention(model.attention, device, dtype)
        self._precise = torch.promote_types(dtype, torch.float32)
        self._pipeline: Any = pipeline
        self._encoders: list[nn.Module] = [
            part
            for name, part in pipeline.components.items()
            if name.startswith("text_encoder") and part is not None
        ]
        for module in (*self._encoders, self.network):
            _place(module, device, dtype)
        _place(self._pipeline.vae, device, self._precise)

    def make_adaptable(self) -> list[Projections]:
        """Give every attention a processor with places for adapters, as `Family` says."""
        return [
            group
            for processor in make_adaptable(self.network, self._attend)
            for group in processor.groups
        ]

    @torch.no_grad()
    def encode_photos(self, pixels_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std [B, C, h, w] of scaled latents; pixels [B, 3, H, W] in [-1, 1]."""
        vae = self._pipeline.vae
        posterior = vae.encode(pixels_bchw.to(vae.device, vae.dtype)).latent_dist
        scale, shift = self._latent_scale()
        return (posterior.mean - shift) * scale, posterior.std * scale

    def truncated_text(self, prompt: str) -> str | None:
        """Return the end of a prompt that no text encoder reads, as `Family` says.

        It is decoded from the tokens, so case and spaces are the tokenizer's.
        """
        unread: list[str] = []
        for tokenizer, num_tokens in self._tokenizers():
            tokens = tokenizer(prompt, verbose=False).input_ids
            if len(tokens) <= num_tokens:
                return None
            # Cut or not, the last place is the end token's.
            unread.append(tokenizer.decode(tokens[num_tokens - 1 : -1]).strip())
        return min(unread, key=len)

    def _tokenizers(self) -> list[tuple[Any, int]]:
        """Return the tokenizers of the text encoders that are used, and the tokens they take."""
        parts = self._pipeline.components
        used = [
            parts[name.replace("text_encoder", "tokenizer")]
            for name, part in parts.items()
            if name.startswith("text_encoder") and part is not None
        ]
        # A CLIP has learned so many positions; a T5 takes any number.
        clip_tokens = min(t.model_max_length for t in used if isinstance(t, CLIPTokenizer))
        return [
            (tokenizer, clip_tokens)
            if isinstance(tokenizer, CLIPTokenizer)
            else (tokenizer, self.model.max_tokens or clip_tokens)
            for tokenizer in used
        ]

    def release_encoders(self) -> None:
        """Move the text encoders and the VAE to host memory."""
        for module in (*self._encoders, self._pipeline.vae):
            module.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def sample(
        self,
        prompts: PromptEmbeddings,
        negative: PromptEmbeddings,
        *,
        seeds: Sequence[int],
        resolution: int,
        steps: int,
        guidance_scale: float,
    ) -> Iterator[Image.Image]:
        """Draw a picture for each prompt and seed through the stock pipeline.

        A picture is what the model's own diffusers pipeline draws for the same prompt with its own
        scheduler and ``generator=torch.Generator().manual_seed(seed)``. The VAE visits the device
        until the iterator ends.
        """
        vae = self._pipeline.vae
        home = vae.device
        vae.to(self.device)
        scale, shift = self._latent_scale()
        painter = self._painter()
        painter.set_progress_bar_config(disable=True)
        try:
            for row, seed in enumerate(seeds):
                prompt = prompts[row : row + 1]
                embeddings = {
                    "prompt_embeds": prompt.tokens,
                    "pooled_prompt_embeds": prompt.pooled,
                    "negative_prompt_embeds": negative.tokens,
                    "negative_pooled_prompt_embeds": negative.pooled,
                }
                latents = painter(
                    **{name: tensor for name, tensor in embeddings.items() if tensor is not None},
                    height=resolution,
                    width=resolution,
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    output_type="latent",
                ).images
                # Not by the pipeline: it does not widen bf16 latents for a float32 VAE.
                latents = latents.to(vae.dtype) / scale + shift
                pixels = vae.decode(latents, return_dict=False)[0]
                yield painter.image_processor.postprocess(pixels)[0]
        finally:
            vae.to(home)

    def _painter(self) -> Any:
        """Return the stock pipeline without its text encoders, around the network as it is."""
        raise NotImplementedError

    def _latent_scale(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift [C or 1, 1, 1]: the network sees (x - shift) * scale."""
        config = self._pipeline.vae.config
        like = torch.empty((), device=self.device, dtype=self._precise)
        scale = torch.tensor(config.scaling_factor).to(like).view(1, 1, 1)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            shift = torch.tensor(config.latents_mean).to(like).view(-1, 1, 1)
            return scale / torch.tensor(config.latents_std).to(like).view(-1, 1, 1), shift
        return scale, torch.full_like(scale, config.get("shift_factor") or 0.0)


def _place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Freeze a pretrained module and move it."""
    module.requires_grad_(False).eval().to(device)
    if next(module.parameters()).dtype != dtype:
        # Not by diffusers' own method: it warns of modules to keep in float32 where there are none.
        nn.Module.to(module, dtype=dtype)
