"""What the mini models share: the size of their pictures, their CLIP text encoders, their VAE."""

from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTokenizer

from fastppt.mini.tokenizer import MODEL_MAX_LENGTH

IMAGE_SIZE = 64
"""Pixels a side of the images the mini models draw."""

LATENT_SIZE = 16
"""Latent pixels a side: `IMAGE_SIZE` over the VAE's factor of 4."""

TEXT_HEAD_WIDTH = 16
"""Channels of an attention head of the text encoders (CLIP: 64)."""


def clip_text_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    """Return the configuration of a two-layer CLIP text encoder.

    Args:
        tokenizer: Whose tokens it reads; decides the vocabulary and the special tokens.
        width: Of its tokens, and of the pooled text (projection); a multiple of
            `TEXT_HEAD_WIDTH`.
        activation: ``quick_gelu`` as OpenAI's CLIP has it, or ``gelu`` as OpenCLIP.
    """
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // TEXT_HEAD_WIDTH,
        max_position_embeddings=MODEL_MAX_LENGTH,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_vae(
    latent_channels: int,
    scaling_factor: float,
    shift_factor: float | None = None,
    *,
    use_quant_convs: bool = True,
) -> AutoencoderKL:
    """Build a VAE of three resolutions, so latents are smaller than images by a factor of 4.

    Args:
        latent_channels: Channels of the latents.
        scaling_factor: What the pipeline multiplies latents by.
        shift_factor: What it takes off them before.
        use_quant_convs: Have the convolutions on both sides of the latents that VAEs inherited
            from vector quantisation.
    """
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=use_quant_convs,
        use_post_quant_conv=use_quant_convs,
        # Activations stay far inside float16's range, of random weights and of trained ones.
        force_upcast=False,
    )
