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
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTokenizer

from fastppt.config import ModelConfig
from fastppt.families.attention import (
    Projections,
    TextAttention,
    make_adaptable,
    text_attentions,
)
from fastppt.families.backends import resolve_attention
from fastppt.families.base import PromptEmbeddings, PromptIds, TokenBlock
from fastppt.families.text_encoders import TextEncoders

PROMPTS_A_PASS = 32
"""Prompts that the text encoders take at a time: what they compute of 20,000, a photo's subject and
class prompt each, fits into no memory."""


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
        self.text = TextEncoders(pipeline, device)
        for module in (*self._encoders, self.network):
            _place(module, device, dtype)
        _place(self._pipeline.vae, device, self._precise)
        # Made here: a copy from the host would make it wait where photos are encoded beside steps.
        self._latent_scale, self._latent_shift = self._latent_constants()

    def make_adaptable(self) -> list[Projections]:
        """Give every attention a processor with places for adapters, as `Family` says."""
        return [
            group
            for processor in make_adaptable(self.network, self._attend)
            for group in processor.groups
        ]

    def text_attentions(self) -> dict[str, TextAttention]:
        """Return the attentions in which the image looks at the text, as `Family` says."""
        return text_attentions(self.network)

    def checkpoint_blocks(self) -> None:
        """Compute the inside of the network's blocks again in a backward pass, as `Family` says."""
        network: Any = self.network
        network.enable_gradient_checkpointing(_call_checkpointed)

    @torch.no_grad()
    def encode_photos(self, pixels_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std [B, C, h, w] of scaled latents; pixels [B, 3, H, W] in [-1, 1]."""
        vae = self._pipeline.vae
        posterior = vae.encode(pixels_bchw.to(vae.device, vae.dtype)).latent_dist
        scale, shift = self._latent_scale, self._latent_shift
        return (posterior.mean - shift) * scale, posterior.std * scale

    @torch.no_grad()
    def decode_latents(self, latents_bchw: Tensor) -> Tensor:
        """Return pixels [B, 3, H, W], about [-1, 1], of latents as the network sees them."""
        vae = self._pipeline.vae
        latents = latents_bchw.to(vae.dtype) / self._latent_scale + self._latent_shift
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels

    @property
    def vae(self) -> nn.Module:
        """What encodes photos and decodes latents."""
        vae: nn.Module = self._pipeline.vae
        return vae

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of pictures of (height, width) pixels."""
        height, width = (side // self._pipeline.vae_scale_factor for side in size)
        return self._pipeline.vae.config.latent_channels, height, width

    def truncated_text(self, prompt: str) -> str | None:
        """Return the end of a prompt that no text encoder reads, as `Family` says.

        It is decoded from the tokens, so case and spaces are the tokenizer's.
        """
        unread: list[str] = []
        for tokenizer, num_tokens in self._tokenizers():
            tokens = tokenizer(self._as_read(tokenizer, prompt), verbose=False).input_ids
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

    def token_blocks(self, prompt: str) -> list[TokenBlock]:
        """Return a prompt's tokens by tokenizer, as `Family` says.

        All CLIPs have the same tokens, and their embeddings lie side by side in one block.
        """
        tokenizers = self._tokenizers()
        clip, others = tokenizers[:1], tokenizers[1:]
        blocks = [*clip, *(each for each in others if not isinstance(each[0], CLIPTokenizer))]
        return [
            TokenBlock(
                tokenizer(
                    self._as_read(tokenizer, prompt),
                    truncation=True,
                    max_length=size,
                    verbose=False,
                ).input_ids,
                size,
            )
            for tokenizer, size in blocks
        ]

    def _as_read(self, tokenizer: Any, prompt: str) -> str:
        """Return what a tokenizer is given: a CLIP's with a word of several vectors written out."""
        return self.text.expand(prompt) if isinstance(tokenizer, CLIPTokenizer) else prompt

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Return the prompts' embeddings, `PROMPTS_A_PASS` at a time, as `Family` says."""
        parts = [
            self._encode_prompts(prompts[start : start + PROMPTS_A_PASS])
            for start in range(0, len(prompts), PROMPTS_A_PASS)
        ]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        tokens = torch.cat([part.tokens for part in parts])
        return PromptEmbeddings(tokens, torch.cat(pooled) if pooled else None)

    def _encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Return `encode_prompts` of a few."""
        raise NotImplementedError

    def prompt_ids(self, prompts: Sequence[str]) -> PromptIds:
        """Return the prompts as the CLIPs' tokens, as `Family` says."""
        return PromptIds(self.text.ids(prompts), None)

    def negative_ids(self) -> PromptIds | None:
        """Return the empty prompt, as `Family` says."""
        return self.prompt_ids([""])

    def weight_bytes(self) -> dict[str, int]:
        """Return the bytes of the weights of each part, as `Family` says."""
        parts: dict[str, list[nn.Module]] = {
            "network": [self.network],
            "text encoders": self._encoders,
            "VAE": [self._pipeline.vae],
        }
        return {name: _num_bytes(modules) for name, modules in parts.items()}

    def release_encoders(self, *, keep_vae: bool = False, keep_text: bool = False) -> None:
        """Give up the text encoders, and move the VAE to host memory, as `Family` says."""
        if not keep_text:
            self.text.release()
        names = [name for name in self._pipeline.components if name.startswith("text_encoder")]
        released = [name for name in names if name not in self.text.clips]
        self._pipeline.register_modules(**dict.fromkeys(released))
        self._encoders[:] = self.text.clips.values()
        if not keep_vae:
            self._pipeline.vae.to("cpu")
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
                yield painter.image_processor.postprocess(self.decode_latents(latents))[0]
        finally:
            vae.to(home)

    def _painter(self) -> Any:
        """Return the stock pipeline without its text encoders, around the network as it is."""
        raise NotImplementedError

    def _latent_constants(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift [C or 1, 1, 1]: the network sees (x - shift) * scale."""
        config = self._pipeline.vae.config
        like = torch.empty((), device=self.device, dtype=self._precise)
        scale = torch.tensor(config.scaling_factor).to(like).view(1, 1, 1)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            shift = torch.tensor(config.latents_mean).to(like).view(-1, 1, 1)
            return scale / torch.tensor(config.latents_std).to(like).view(-1, 1, 1), shift
        return scale, torch.full_like(scale, config.get("shift_factor") or 0.0)


def _call_checkpointed(block: nn.Module, *inputs: Any) -> Any:
    """Call a block so that its inputs alone are kept for the backward pass.

    Nothing in a frozen network draws, so the state of the generators is not kept: it could not be
    read while a CUDA graph is captured.
    """
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def _num_bytes(modules: Sequence[nn.Module]) -> int:
    """Return the bytes of parameters and buffers, each storage once."""
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Freeze a pretrained module and move it."""
    module.requires_grad_(False).eval().to(device)
    if next(module.parameters()).dtype != dtype:
        # Not by diffusers' own method: it warns of modules to keep in float32 where there are none.
        nn.Module.to(module, dtype=dtype)
