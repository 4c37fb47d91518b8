"""Stable Diffusion XL (Podell et al., arXiv 2307.01952).

Shape legend: B batch, N prompts, K text tokens, D text width, C latent channels, h and w latent
height and width, T diffusion timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from PIL import Image
from torch import Tensor, nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import PromptEmbeddings

PREDICTION_TYPES = ("epsilon", "v_prediction")


class StableDiffusionXL:
    """A loaded SDXL pipeline, frozen, its parts placed where training wants them.

    Args:
        pipeline: The pretrained model; its modules are moved and frozen in place.
        model: Where it came from.
        device: Where the network trains.
        dtype: Of the network and the text encoders. The VAE runs in float32 (float64 for float64).

    Raises:
        UserError: the scheduler predicts neither noise nor velocity.
    """

    name = "sdxl"
    repeated_blocks: tuple[str, ...] = ("BasicTransformerBlock",)
    lora_component = "unet"
    kohya_prefix = "lora_unet"
    kohya_model_version = "sdxl_base_v1-0"
    modelspec_architecture = "stable-diffusion-xl-v1-base"

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        model: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction_type: str = scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"model {model.path}: its scheduler predicts {self.prediction_type!r}; "
                f"training knows {' and '.join(PREDICTION_TYPES)}"
            )
        self.model = model
        self.device = device
        self.dtype = dtype
        self._precise = torch.promote_types(dtype, torch.float32)
        self._pipeline = pipeline
        self._encoders: list[nn.Module] = [pipeline.text_encoder, pipeline.text_encoder_2]
        for module in (*self._encoders, pipeline.unet):
            _place(module, device, dtype)
        _place(pipeline.vae, device, self._precise)
        self.network: nn.Module = pipeline.unet
        self.num_timesteps: int = scheduler.config.num_train_timesteps
        self.native_resolution: int = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        num_halvings = len(pipeline.unet.config.block_out_channels) - 1
        self.resolution_step: int = pipeline.vae_scale_factor * 2**num_halvings
        # The scheduler's float32 table is the one the model was trained with, whatever the dtype.
        alphas = scheduler.alphas_cumprod.to(device, self._precise)
        self._signal_t = alphas.sqrt()
        self._noise_t = (1 - alphas).sqrt()

    @torch.no_grad()
    def encode_photos(self, pixels_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std [B, C, h, w] of scaled latents; pixels [B, 3, H, W] in [-1, 1]."""
        vae = self._pipeline.vae
        posterior = vae.encode(pixels_bchw.to(vae.device, vae.dtype)).latent_dist
        scale, shift = self._latent_scale()
        return (posterior.mean - shift) * scale, posterior.std * scale

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
        self, original_size: tuple[int, int], crop: tuple[int, int], resolution: int
    ) -> Tensor:
        """Return [6]: original height and width, crop top and left, target height and width."""
        sizes = (*original_size, *crop, resolution, resolution)
        # Not in bf16, which has no odd numbers past 256: the network embeds them in float32.
        return torch.tensor(sizes, device=self.device, dtype=self._precise)

    def release_encoders(self) -> None:
        """Move the text encoders and the VAE to host memory."""
        for module in (*self._encoders, self._pipeline.vae):
            module.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def draw_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Return [B] int64, uniform over 0..T-1."""
        return torch.randint(
            self.num_timesteps, (batch_size,), generator=generator, device=self.device
        )

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
        """Run the UNet on [B, C, h, w] latents with [B, 6] size conditions."""
        prediction: Tensor = self.network(
            noisy.to(self.dtype),
            timesteps,
            encoder_hidden_states=prompts.tokens,
            added_cond_kwargs={"text_embeds": prompts.pooled, "time_ids": sizes},
            return_dict=False,
        )[0]
        return prediction

    def read_lora_state(self, file: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Read a LoRA file of any form through diffusers' own reader, as `Family` says."""
        state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            str(file),
            unet_config=self._pipeline.unet.config,
            use_safetensors=True,
            return_lora_metadata=True,
        )
        state = convert_unet_state_dict_to_peft(state)
        # diffusers notes an alpha under the name of the down-projection that it came with.
        named = {
            key.removesuffix(".lora_A.weight.alpha"): float(alpha)
            for key, alpha in convert_unet_state_dict_to_peft(alphas or {}).items()
        }
        if metadata and f"{self.lora_component}.lora_alpha" in metadata:
            alpha = float(metadata[f"{self.lora_component}.lora_alpha"])
            named = {key.rpartition(".lora_")[0]: alpha for key in state}
        return state, named

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

        A picture is what `StableDiffusionXLPipeline` draws for the same prompt with the model's own
        scheduler and ``generator=torch.Generator().manual_seed(seed)``. The VAE visits the device
        until the iterator ends.
        """
        vae = self._pipeline.vae
        home = vae.device
        vae.to(self.device)
        scale, shift = self._latent_scale()
        painter = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=self.network,
            scheduler=type(self._pipeline.scheduler).from_config(self._pipeline.scheduler.config),
            force_zeros_for_empty_prompt=self._pipeline.config.force_zeros_for_empty_prompt,
        )
        painter.set_progress_bar_config(disable=True)
        try:
            for row, seed in enumerate(seeds):
                prompt = prompts[row : row + 1]
                latents = painter(
                    prompt_embeds=prompt.tokens,
                    pooled_prompt_embeds=prompt.pooled,
                    negative_prompt_embeds=negative.tokens,
                    negative_pooled_prompt_embeds=negative.pooled,
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

    def _latent_scale(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift [C or 1, 1, 1]: the network sees (x - shift) * scale."""
        config, like = self._pipeline.vae.config, self._noise_t
        scale = torch.tensor(config.scaling_factor).to(like).view(1, 1, 1)
        if config.latents_mean is None or config.latents_std is None:
            return scale, torch.zeros_like(scale)
        shift = torch.tensor(config.latents_mean).to(like).view(-1, 1, 1)
        return scale / torch.tensor(config.latents_std).to(like).view(-1, 1, 1), shift

    @staticmethod
    def _at(table_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return the table's entries of the timesteps, [B, 1, 1, 1]."""
        return table_t[timesteps].view(-1, 1, 1, 1)


def _place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Freeze a pretrained module and move it."""
    module.requires_grad_(False).eval().to(device)
    if next(module.parameters()).dtype != dtype:
        module.to(dtype)
