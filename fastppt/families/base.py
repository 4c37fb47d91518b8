"""What a model family gives to the trainer.

Shape legend: B batch, P photos, N prompts, K text tokens, D text width, C latent channels,
h and w latent height and width, T diffusion timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from fastppt.config import ModelConfig
from fastppt.families.attention import Projections, TextAttention
from fastppt.families.sampling import SamplerTable
from fastppt.families.text_encoders import TextEncoders


@dataclass(frozen=True)
class PromptEmbeddings:
    """Encoded prompts.

    Attributes:
        tokens: [N, K, D], the text that attention reads.
        pooled: [N, W], one vector a prompt, part of the time embedding; None where it has no part.
    """

    tokens: Tensor
    pooled: Tensor | None

    def __getitem__(self, rows: Tensor | slice) -> PromptEmbeddings:
        """Return the prompts of the given rows."""
        pooled = None if self.pooled is None else self.pooled[rows]
        return PromptEmbeddings(self.tokens[rows], pooled)


@dataclass(frozen=True)
class PromptIds:
    """Prompts up to where text encoders that may change begin; made once, on the host.

    Attributes:
        clips: [N, K] int64 by component of the pipeline, what each CLIP reads.
        others: [N, K', D], the tokens of the encoders that never change; None where there are none.
    """

    clips: dict[str, Tensor]
    others: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """All that there is."""
        return [*self.clips.values(), *([] if self.others is None else [self.others])]

    def __getitem__(self, rows: Tensor | slice) -> PromptIds:
        """Return the prompts of the given rows."""
        clips = {component: ids[rows] for component, ids in self.clips.items()}
        return PromptIds(clips, None if self.others is None else self.others[rows])


@dataclass(frozen=True)
class TokenBlock:
    """What one tokenizer makes of a prompt.

    Attributes:
        ids: The tokens that are read, start and end among them, padding left out.
        size: The places for them in `PromptEmbeddings.tokens`, padding included.
    """

    ids: list[int]
    size: int


class Family(Protocol):
    """A loaded pretrained model, seen through what training needs of it."""

    name: str
    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    network: nn.Module
    text: TextEncoders
    """The CLIP text encoders, as adapters and new words see them."""
    num_timesteps: int
    native_resolution: int
    """Side in pixels that the model was trained at."""
    resolution_step: int
    """Photos' sides must be multiples of this many pixels."""
    largest_side: int | None
    """Pixels that a photo's side may have at most, where the network has places for so many."""
    repeated_blocks: tuple[str, ...]
    """Class names of the blocks that regional compilation compiles."""
    lora_component: str
    """Name of the network in the pipeline and in LoRA files, such as `unet`."""
    unread_projections: tuple[str, ...]
    """Attention projections that have no place for an adapter, since nothing reads their output;
    other trainers' LoRA files hold adapters of them. Those of the network by their paths, those of
    text encoders by component and path."""
    second_half: tuple[str, ...]
    """Patterns of the projections that `lora.targets = "up"` stands for."""
    text_weights: tuple[str, ...]
    """Patterns of the parameters that make keys and values of the text."""
    kohya_model_version: str
    """What sd-scripts calls the base model."""
    modelspec_architecture: str
    """What ModelSpec calls the base model."""
    prompt_options: Mapping[str, int]
    """What a call of the diffusers pipeline is to be given so that it reads prompts as here."""
    prediction_type: str
    """`epsilon`, `v_prediction` or `flow`."""
    aligned_blocks: tuple[str, ...]
    """Paths of the blocks whose layers are held to the base's unless a run says which."""
    feature_channel_dim: int
    """Where the features of `feature_layers` have their channels: 1 or -1."""
    indicator_temperature: float
    """How sharply the overfitting indicator answers unless a run says so."""
    sampler: str
    """How class images are drawn unless a run says so: `ddim` or `euler`."""
    sampler_steps: int
    """Steps of the family's diffusers pipeline unless it is given others."""
    sampler_guidance: float
    """Guidance scale of that pipeline, likewise."""

    @property
    def vae(self) -> nn.Module:
        """What encodes photos and decodes latents."""

    def make_adaptable(self) -> list[Projections]:
        """Give every attention a processor with places for adapters.

        Returns:
            The projections that an adapter can change, those that share an input together, in the
            order of the network's modules. A projection whose output nothing reads is left out.
        """

    def checkpoint_blocks(self) -> None:
        """From now on keep only the inputs of the network's blocks for a backward pass.

        What a block computes is computed again there, so whatever a block calls is called twice.
        Passes without gradients are as before.
        """

    def feature_layers(self) -> dict[str, nn.Module]:
        """Return the modules whose outputs are the network's features, by path."""

    def features_of(self, output: Any) -> Tensor:
        """Return the image's features in the output of one of the `feature_layers`."""

    def with_features(self, output: Any, features: Tensor) -> Any:
        """Return an output of one of the `feature_layers` with others for its `features_of`."""

    def text_attentions(self) -> dict[str, TextAttention]:
        """Return the attentions in which the image looks at the text, by path.

        They are there once `make_adaptable` was called.
        """

    def encode_photos(self, pixels_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [B, C, h, w] of the scaled latents' posterior."""

    def decode_latents(self, latents_bchw: Tensor) -> Tensor:
        """Return pixels [B, 3, H, W] of latents [B, C, h, w]; the VAE must be on the device."""

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of pictures of (height, width) pixels."""

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Return the prompts' embeddings on the device, in the network's dtype."""

    def prompt_ids(self, prompts: Sequence[str]) -> PromptIds:
        """Return the prompts on the device, for `encode_ids` to encode as often as wanted."""

    def encode_ids(self, ids: PromptIds) -> PromptEmbeddings:
        """Return what `encode_prompts` returns of the same prompts, with gradients.

        Nothing is read on the host: it can be captured in a CUDA graph.
        """

    def negative_ids(self) -> PromptIds | None:
        """Return what `encode_negative` encodes; None where it is the same whatever encodes."""

    def truncated_text(self, prompt: str) -> str | None:
        """Return the end of a prompt that no text encoder reads; None if all of it is read."""

    def token_blocks(self, prompt: str) -> list[TokenBlock]:
        """Return a prompt's tokens by tokenizer, in the order of `PromptEmbeddings.tokens`."""

    def encode_negative(self) -> PromptEmbeddings:
        """Return the one-row embedding that guidance pushes away from."""

    def size_conditions(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int]
    ) -> Tensor:
        """Return what the network is told of a photo's size, [S]; S is 0 where it is told nothing.

        Args:
            original_size: (height, width) of the photo, pixels.
            crop: (top, left) of what is used, in the scaled photo, pixels.
            target_size: (height, width) of what is used, pixels.
        """

    def weight_bytes(self) -> dict[str, int]:
        """Return the bytes of the weights: `network`, `text encoders`, `VAE`."""

    def release_encoders(self, *, keep_vae: bool = False, keep_text: bool = False) -> None:
        """Free the memory of what encodes, once all is encoded.

        The text encoders are given up: no prompt can be encoded from here on. The VAE, which
        pictures need again, moves to host memory.

        Args:
            keep_vae: Leave the VAE on the device, for photos that are encoded later.
            keep_text: Leave the CLIPs there, for `encode_ids`.
        """

    def draw_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Return [B] int64 in 0..num_timesteps-1, least noise first, as the family draws them."""

    def signal_to_noise(self) -> Tensor | None:
        """Return abar_t / (1 - abar_t) by timestep, [T]; None of a model not trained by DDPM."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents z_t [B, C, h, w]."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network is to predict, [B, C, h, w]."""

    def predict(
        self, noisy: Tensor, timesteps: Tensor, prompts: PromptEmbeddings, sizes: Tensor
    ) -> Tensor:
        """Run the network once; returns its prediction [B, C, h, w] in the network's dtype."""

    def predict_at(
        self, noisy: Tensor, times: Tensor, prompts: PromptEmbeddings, sizes: Tensor
    ) -> Tensor:
        """Run the network as `predict` does, told the time itself, [B] float: between timesteps."""

    def sampler_table(self, sampler: str, steps: int) -> SamplerTable:
        """Return the steps of a sampler, `ddim` or `euler`, by the model's own noise schedule.

        Raises:
            UserError: the model has no such sampler.
        """

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
        """Draw a picture for each prompt and its seed with the model's own scheduler."""
