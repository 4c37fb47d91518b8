"""A Stable Diffusion 1.5 of under four million random parameters, of real diffusers classes.

Everything that its structure asks of a trainer is there: one text encoder, cross-attention at the
three upper of four resolutions, convolutions around the transformers, a VAE, the PNDM scheduler.
Only the sizes differ: 64x64 pixel images, 16x16 latents of four channels, 24 tokens. The same in
the manner of Stable Diffusion 2.1 has linear projections and predicts velocity.
"""

from typing import Literal

import torch
from diffusers import (
    DDIMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from fastppt.mini.parts import LATENT_SIZE, build_vae, clip_text_config
from fastppt.mini.tokenizer import END_TOKEN, mini_tokenizer

LATENT_CHANNELS = 4
"""As in SD."""

TEXT_WIDTH = 64
"""Width of the text encoder (SD 1.5: 768, 2.1: 1024)."""

LATENT_SCALING = 1.0
"""What latents are multiplied by. With random weights a latent drawn from the posterior of the
demo photos has a standard deviation of 0.93 to 1.11 (eight seeds, mean 1.05), so nothing needs
scaling. Most of it is the posterior's own noise; its mean varies by 0.17 to 0.34 only."""

Version = Literal["1.5", "2.1"]


def build_mini_sd(seed: int = 0, *, version: Version = "1.5") -> StableDiffusionPipeline:
    """Build a mini SD of random weights, in evaluation mode, float32, on the CPU.

    The weights are what diffusers and transformers initialise; nothing is read or downloaded. The
    caller's random state is left as it was.

    Args:
        seed: Decides the weights: the same seed gives the same pipeline, bit for bit.
        version: Which SD it is like: 1.5, or 2.1 (of 768 pixels, which predicts velocity).

    Returns:
        A pipeline that draws 64x64 pixel images; under four million parameters in all.
    """
    # SD 2 pads with "!" (id 0), as OpenCLIP does.
    tokenizer = mini_tokenizer(pad_token=END_TOKEN if version == "1.5" else "!")
    activation = "quick_gelu" if version == "1.5" else "gelu"
    # devices=[] and the CPU's own generator: CUDA's random state must not move either.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        text_encoder = CLIPTextModel(clip_text_config(tokenizer, TEXT_WIDTH, activation))
        unet = _build_unet(version)
        vae = build_vae(LATENT_CHANNELS, LATENT_SCALING)
    for network in (text_encoder, unet, vae):
        network.eval()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_build_scheduler(version),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _build_scheduler(version: Version) -> SchedulerMixin:
    """Return the scheduler with the settings that the model is published with."""
    noise = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    if version == "1.5":
        return PNDMScheduler(**noise, prediction_type="epsilon", skip_prk_steps=True)
    return DDIMScheduler(**noise, prediction_type="v_prediction", clip_sample=False)


def _build_unet(version: Version) -> UNet2DConditionModel:
    """Build the UNet: cross-attention of one layer at 16x16, 8x8 and 4x4, none at 2x2."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 48, 64, 64),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        layers_per_block=1,
        norm_num_groups=8,
        # In a UNet's configuration this name means the number of heads: as many everywhere in
        # SD 1, heads of one width (16 channels) everywhere in SD 2.
        attention_head_dim=4 if version == "1.5" else (2, 3, 4, 4),
        use_linear_projection=version == "2.1",
        cross_attention_dim=TEXT_WIDTH,
    )
