"""A Stable Diffusion 3 of under four million random parameters, built from real diffusers classes.

Everything that SD3's structure asks of a trainer is there: three text encoders with their
tokenizers (a T5 among them), CLIP's tokens padded to the T5's width, the pooled text in the time
embedding, joint attention whose last block drops the text, latents of sixteen channels with a
shift, the flow-matching scheduler. Only the sizes differ: 64x64 pixel images, 16x16 latents,
24 tokens.
"""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fastppt.mini.parts import LATENT_SIZE, build_vae, clip_text_config
from fastppt.mini.t5_tokenizer import mini_t5_tokenizer
from fastppt.mini.tokenizer import mini_tokenizer

LATENT_CHANNELS = 16
"""As in SD3."""

PATCH_SIZE = 2
"""Latent pixels a side of an image token, as in SD3: 8x8 image tokens."""

MAX_PATCHES = 24
"""Image tokens a side that positions are known for: three times the model's own, as in SD3."""

TEXT_WIDTH, TEXT_WIDTH_2 = 48, 80
"""Widths of the two CLIPs (SD3: 768 and 1280), and of their pooled texts (projections). They differ
because readers of single-file checkpoints tell the encoders apart so."""

T5_WIDTH = 160
"""Width of the T5, more than both CLIPs' side by side (SD3: 4096 and 768 + 1280)."""

NUM_LAYERS = 3
"""Joint blocks; the last one drops the text."""

NUM_HEADS, HEAD_DIM = 6, 16
"""96 channels in all: image and text tokens are of one width."""

LATENT_SCALING = 0.9
"""What latents are multiplied by after the shift. With random weights a latent drawn from the
posterior of the demo photos has a standard deviation of 1.07 to 1.14 (eight seeds, mean 1.10)."""

LATENT_SHIFT = 0.0609
"""What is taken off latents first: SD3's value, so that leaving it out is wrong here as it is
there. Random weights need none (means of -0.12 to 0.04)."""


def build_mini_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """Build a mini SD3 of random weights, in evaluation mode, float32, on the CPU.

    The weights are what diffusers and transformers initialise; nothing is read or downloaded. The
    caller's random state is left as it was.

    Args:
        seed: Decides the weights: the same seed gives the same pipeline, bit for bit.

    Returns:
        A pipeline that draws 64x64 pixel images; under four million parameters in all.
    """
    tokenizer = mini_tokenizer()
    # SD3 pads with "!" (id 0) for its second text encoder.
    tokenizer_2 = mini_tokenizer(pad_token="!")
    tokenizer_3 = mini_t5_tokenizer()
    # devices=[] and the CPU's own generator: CUDA's random state must not move either.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        text_encoder = CLIPTextModelWithProjection(
            clip_text_config(tokenizer, TEXT_WIDTH, "quick_gelu")
        )
        text_encoder_2 = CLIPTextModelWithProjection(
            clip_text_config(tokenizer_2, TEXT_WIDTH_2, "gelu")
        )
        text_encoder_3 = T5EncoderModel(_t5_config(tokenizer_3))
        transformer = _build_transformer()
        vae = build_vae(LATENT_CHANNELS, LATENT_SCALING, LATENT_SHIFT, use_quant_convs=False)
    # diffusers' reader of single-file checkpoints puts the identity here, whatever they hold.
    nn.init.eye_(text_encoder.text_projection.weight)
    for network in (text_encoder, text_encoder_2, text_encoder_3, transformer, vae):
        network.eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _t5_config(tokenizer: T5Tokenizer) -> T5Config:
    """Return the T5's configuration: version 1.1, with its gated activation, as in SD3."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _build_transformer() -> SD3Transformer2DModel:
    """Build the network: image and text tokens in joint blocks."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=PATCH_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=NUM_HEADS * HEAD_DIM,
        # Both CLIPs' pooled text, side by side.
        pooled_projection_dim=TEXT_WIDTH + TEXT_WIDTH_2,
        pos_embed_max_size=MAX_PATCHES,
    )
