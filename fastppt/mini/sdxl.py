"""A Stable Diffusion XL of four million parameters, built from real diffusers classes.

Everything that SDXL's structure asks of a trainer is there: two text encoders and tokenizers, the
pooled text and six size numbers in the time embedding, cross-attention at two resolutions with a
different depth at each, a VAE, the Euler scheduler. Only the sizes differ: 64x64 pixel images,
16x16 latents, 24 tokens. Two settings differ as well, because the model is so small: latents have
eight channels, for sharper pictures, and the network predicts the velocity, which it learns faster.

The package brings along its weights, trained on the mini world by `fastppt.mini.pretrain`.
"""

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastppt.errors import UserError
from fastppt.families.checkpoints import (
    LOADING_ERRORS,
    check_configs,
    check_folder,
    check_weights,
    without_bars,
)
from fastppt.families.names import COMPONENTS
from fastppt.mini.parts import LATENT_SIZE, build_vae, clip_text_config
from fastppt.mini.tokenizer import mini_tokenizer

WEIGHTS = Path(__file__).parent / "weights" / "mini-sdxl"
"""Diffusers folder of the trained model."""

LATENT_CHANNELS = 8
"""SDXL: 4, at pictures 16 times as wide. At 64 pixels a latent of four loses what a subject is made
of."""

TEXT_WIDTH, TEXT_WIDTH_2 = 48, 80
"""Widths of the two text encoders (SDXL: 768 and 1280); the pooled text (projection) has that of
the second. They differ because readers of single-file checkpoints tell the encoders apart so."""

TIME_ID_WIDTH = 32
"""Width of the sinusoidal embedding of each of the six size numbers (SDXL: 256)."""

NUM_TIME_IDS = 6
"""Original size, crop corner and target size, two numbers each."""

LATENT_SCALING = 1.0
"""What latents are multiplied by: nothing needs scaling. The trained VAE has it in the convolutions
on both sides of the latents. With random weights a latent drawn from the posterior of the demo
photos has a standard deviation of 1.01 to 1.07 (eight seeds, mean 1.04); most of it is the
posterior's own noise, and its mean varies by 0.18 to 0.31 only."""


def load_mini_sdxl(folder: Path = WEIGHTS) -> StableDiffusionXLPipeline:
    """Load the trained mini SDXL, in evaluation mode, float32, on the CPU.

    Nothing is downloaded. The caller's random state is left as it was.

    Args:
        folder: Diffusers folder that `fastppt.mini.save.save_weights` wrote, in float16.

    Returns:
        A pipeline that draws 64x64 pixel images of the mini world; under four million parameters in
        all.

    Raises:
        UserError: the folder is not there, or a file in it is missing or damaged.
    """
    used = COMPONENTS["sdxl"]
    try:
        check_configs(folder, used)
        num_values = check_folder(folder, used, variant=None)
        with without_bars(), torch.random.fork_rng(devices=[]):
            pipeline: StableDiffusionXLPipeline = StableDiffusionXLPipeline.from_pretrained(
                str(folder),
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                add_watermarker=False,
            )
        networks = {name: pipeline.components[name] for name in num_values}
        check_weights(f"model {folder}", networks, num_values)
    except (UserError, *LOADING_ERRORS) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"mini-sdxl: the weights of the package cannot be loaded ({reason}); install it again, "
            "or take random ones: python -m fastppt.mini export DIR --seed 0"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_mini_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """Build a mini SDXL of random weights, in evaluation mode, float32, on the CPU.

    The weights are what diffusers and transformers initialise; nothing is read or downloaded. The
    caller's random state is left as it was.

    Args:
        seed: Decides the weights: the same seed gives the same pipeline, bit for bit.

    Returns:
        A pipeline that draws 64x64 pixel images; under four million parameters in all.
    """
    tokenizer = mini_tokenizer()
    # SDXL pads with "!" (id 0) for its second text encoder.
    tokenizer_2 = mini_tokenizer(pad_token="!")
    # devices=[] and the CPU's own generator: CUDA's random state must not move either.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        text_encoder = CLIPTextModel(clip_text_config(tokenizer, TEXT_WIDTH, "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(
            clip_text_config(tokenizer_2, TEXT_WIDTH_2, "gelu")
        )
        unet = _build_unet()
        vae = build_vae(LATENT_CHANNELS, LATENT_SCALING)
    for network in (text_encoder, text_encoder_2, unet, vae):
        network.eval()
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _build_unet() -> UNet2DConditionModel:
    """Build the UNet: cross-attention at 16x16 (one layer deep) and 8x8 (two; SDXL: 2 and 10).

    SDXL has none at its highest resolution, where latents are 128 pixels wide. Here the highest is
    the only one at which the parts of an object are more than a pixel, so an adapter of attention
    could not learn a subject without it.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        # The last number is the depth of the middle block, at 4x4.
        transformer_layers_per_block=(1, 2, 1),
        # In a UNet's configuration this name means the number of heads, each of 16 channels: one
        # width everywhere, as in SDXL.
        attention_head_dim=(3, 4, 6),
        use_linear_projection=True,
        # Both text encoders' tokens, side by side.
        cross_attention_dim=TEXT_WIDTH + TEXT_WIDTH_2,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=NUM_TIME_IDS * TIME_ID_WIDTH + TEXT_WIDTH_2,
    )
