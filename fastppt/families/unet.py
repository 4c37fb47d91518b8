"""What the families with a UNet share: DDPM noise, uniform timesteps, one block to compile.

Shape legend: B batch, C latent channels, h and w latent height and width, T diffusion timesteps.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import PromptEmbeddings
from fastppt.families.networks import (
    UNET_CHANNEL_DIM,
    unet_feature_layers,
    unet_features_of,
    with_unet_features,
)
from fastppt.families.pipeline import PipelineFamily
from fastppt.families.sampling import SamplerTable, ddim_table, euler_table

PREDICTION_TYPES = ("epsilon", "v_prediction")


class UNetFamily(PipelineFamily):
    """A pipeline around a UNet that was trained by DDPM (Ho et al., arXiv 2006.11239).

    Args:
        pipeline: As of `PipelineFamily`, and so the others.
        model: Where it came from.
        device: Where the network trains.
        dtype: Of the network and the text encoders.

    Raises:
        UserError: the scheduler's noise is not that of DDPM, or it predicts neither noise nor
            velocity.
    """

    repeated_blocks: tuple[str, ...] = ("BasicTransformerBlock",)
    largest_side: int | None = None
    second_half: tuple[str, ...] = ("up_blocks.*",)
    # Custom Diffusion (arXiv 2212.04488), section 3.2.
    text_weights: tuple[str, ...] = ("*.attn2.to_k.weight", "*.attn2.to_v.weight")
    feature_channel_dim = UNET_CHANNEL_DIM
    sampler_steps = 50

    def __init__(
        self, pipeline: Any, model: ModelConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        # Those of EDM and of flow matching have none; DDPM's own default would take their place.
        if "beta_schedule" not in pipeline.scheduler.config:
            raise UserError(
                f"model {model.path}: its scheduler is a {type(pipeline.scheduler).__name__}, "
                "which has no beta_schedule; training adds noise as DDPM does, so this model "
                "cannot be trained. If it is a DDPM model, put the scheduler that it was published "
                "with into scheduler/scheduler_config.json"
            )
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction_type: str = scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"model {model.path}: its scheduler predicts {self.prediction_type!r}; "
                f"training knows {' and '.join(PREDICTION_TYPES)}"
            )
        self.network: nn.Module = pipeline.unet
        super().__init__(pipeline, model, device, dtype)
        self.num_timesteps: int = scheduler.config.num_train_timesteps
        self.native_resolution: int = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        num_halvings = len(pipeline.unet.config.block_out_channels) - 1
        self.resolution_step: int = pipeline.vae_scale_factor * 2**num_halvings
        # The scheduler's float32 table is the one the model was trained with, whatever the dtype.
        alphas = scheduler.alphas_cumprod.to(device, self._precise)
        self._signal_t = alphas.sqrt()
        self._noise_t = (1 - alphas).sqrt()
        self._signal_to_noise_t: Tensor = alphas / (1 - alphas)

    def feature_layers(self) -> dict[str, nn.Module]:
        """Return what ends each layer of a block, a resnet or the attention after it, by path."""
        return unet_feature_layers(self.network)

    def features_of(self, output: Any) -> Tensor:
        """Return [B, C, h, w]: a resnet's output, or what stands first in an attention's."""
        return unet_features_of(output)

    def with_features(self, output: Any, features: Tensor) -> Any:
        """Return a layer's output with other features, a tuple where it was one."""
        return with_unet_features(output, features)

    def draw_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Return [B] int64, uniform over 0..T-1."""
        return torch.randint(
            self.num_timesteps, (batch_size,), generator=generator, device=self.device
        )

    def signal_to_noise(self) -> Tensor:
        """Return abar_t / (1 - abar_t) by timestep, [T], float32 (float64 of a float64 network)."""
        return self._signal_to_noise_t

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return z_t = sqrt(abar_t) z + sqrt(1 - abar_t) e (DDPM, arXiv 2006.11239, eq. 4)."""
        return self._at(self._signal_t, timesteps) * latents + (
            self._at(self._noise_t, timesteps) * noise
        )

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise e, or the velocity sqrt(abar_t) e - sqrt(1 - abar_t) z.

        Source: DDPM (arXiv 2006.11239); Salimans and Ho (arXiv 2202.00512), appendix D.
        """
        if self.prediction_type == "epsilon":
            return noise
        return self._at(self._signal_t, timesteps) * noise - (
            self._at(self._noise_t, timesteps) * latents
        )

    def predict(
        self, noisy: Tensor, timesteps: Tensor, prompts: PromptEmbeddings, sizes: Tensor
    ) -> Tensor:
        """Run the UNet on [B, C, h, w] latents; it is told the timesteps as they are."""
        return self.predict_at(noisy, timesteps, prompts, sizes)

    def predict_at(
        self, noisy: Tensor, times: Tensor, prompts: PromptEmbeddings, sizes: Tensor
    ) -> Tensor:
        """Run the UNet, as `Family` says."""
        raise NotImplementedError

    def sampler_table(self, sampler: str, steps: int) -> SamplerTable:
        """Return the steps of DDIM or of Euler's method, as `Family` says."""
        table = {"ddim": ddim_table, "euler": euler_table}[sampler]
        return table(self._pipeline.scheduler.config, steps)

    @staticmethod
    def _at(table_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return the table's entries of the timesteps, [B, 1, 1, 1]."""
        return table_t[timesteps].view(-1, 1, 1, 1)
