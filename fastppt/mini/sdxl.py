"""A Stable Diffusion XL of under four million random parameters, built from real diffusers classes.

Everything that SDXL's structure asks of a trainer is there: two text encoders and tokenizers, the
pooled text and six size numbers in the time embedding, cross-attention at two resolutions with a
different depth at each, a VAE, the Euler scheduler. Only the sizes differ: 64x64 pixel images,
16x16 latents of four channels, 24 tokens.
"""

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastppt.mini.tokenizer import MODEL_MAX_LENGTH, mini_tokenizer

IMAGE_SIZE = 64
"""Pixels a side of the images the mini model draws."""

LATENT_SIZE = 16
"""Latent pixels a side: `IMAGE_SIZE` over the VAE's factor of 4."""

LATENT_CHANNELS = 4
"""As in SDXL."""

TEXT_WIDTH = 64
"""Width of each text encoder; also of the pooled text (projection) of the second."""

TIME_ID_WIDTH = 32
"""Width of the sinusoidal embedding of each of the six size numbers (SDXL: 256)."""

NUM_TIME_IDS = 6
"""Original size, crop corner and target size, two numbers each."""

LATENT_SCALING = 1.0
"""What latents are multiplied by. With random weights a latent drawn from the posterior of the
demo photos has a standard deviation of 0.90 to 1.14 (eight seeds, mean 1.01), so nothing needs
scaling. Most of it is the posterior's own noise; its mean varies by 0.21 to 0.28 only."""


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
        text_encoder = CLIPTextModel(_text_config(tokenizer, "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer_2, "gelu"))
        unet = _build_unet()
        vae = _build_vae()
    for network in (text_encoder, text_encoder_2, unet, vae):
        network.eval()
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
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


def _text_config(tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    """Return the text encoders' configuration; they differ in the activation and the padding."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MODEL_MAX_LENGTH,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _build_unet() -> UNet2DConditionModel:
    """Build the UNet: cross-attention at 8x8 (one layer deep) and at 4x4 (two; SDXL: 2 and 10)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(40, 64, 80),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        transformer_layers_per_block=(1, 1, 2),
        # In a UNet's configuration this name means the number of heads: 4 and 5 heads of 16
        # channels, one width everywhere as in SDXL. The first block has no attention.
        attention_head_dim=(2, 4, 5),
        use_linear_projection=True,
        # Both text encoders' tokens, side by side.
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=NUM_TIME_IDS * TIME_ID_WIDTH + TEXT_WIDTH,
    )


def _build_vae() -> AutoencoderKL:
    """Build the VAE: three resolutions, so latents are smaller than images by a factor of 4."""
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        scaling_factor=LATENT_SCALING,
        # Small random weights stay far inside float16's range.
        force_upcast=False,
    )
