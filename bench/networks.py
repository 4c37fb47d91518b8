"""The published models in full size, built from their configurations with random weights.

A step's time, launches and memory depend on shapes alone. So that no download is needed, weights
are random and the tokenizers are the mini models' own, padded to the lengths of the real ones.
Text encoders that no trainer runs in a step are cut to two layers: only their widths matter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from fastppt.mini.t5_tokenizer import mini_t5_tokenizer
from fastppt.mini.tokenizer import END_TOKEN, mini_tokenizer

FullModel = Literal["sd15", "sdxl", "sd3-medium"]
FULL_MODELS: tuple[str, ...] = get_args(FullModel)
FAMILY_OF = {"sd15": "sd", "sdxl": "sdxl", "sd3-medium": "sd3"}

CLIP_TOKENS = 77

# What each unet/config.json or transformer/config.json says, where it is not the class's default.
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_TRANSFORMER: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
# All three have the same VAE in structure, SD3's with more latent channels and without the
# convolutions on both sides of them.
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SD15_VAE = VAE | {"sample_size": 512, "scaling_factor": 0.18215}
SDXL_VAE = VAE | {"sample_size": 1024, "scaling_factor": 0.13025}
SD3_VAE = VAE | {
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L = {"hidden_size": 768, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
CLIP_G = {"hidden_size": 1280, "num_attention_heads": 20, "hidden_act": "gelu"}
CLIP_L_LAYERS, CACHED_LAYERS = 12, 2
T5_WIDTH = 4096

# scheduler/scheduler_config.json.
DDPM_NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def build_network(name: FullModel, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the UNet or the transformer alone, of random weights; "meta" costs no memory."""
    with torch.device(device), _default_dtype(dtype):
        match name:
            case "sd15":
                return UNet2DConditionModel(**SD15_UNET).eval()
            case "sdxl":
                return UNet2DConditionModel(**SDXL_UNET).eval()
            case "sd3-medium":
                return SD3Transformer2DModel(**SD3_TRANSFORMER).eval()


def build_pipeline(
    name: FullModel, device: str, dtype: torch.dtype, seed: int = 0
) -> DiffusionPipeline:
    """Return the whole pipeline, of random weights made on the device; its VAE is in float32.

    Args:
        name: Which model.
        device: Where its weights are made: gigabytes that need not pass through host memory.
        dtype: Of the network.
        seed: Decides the weights. Torch's own random state is left as it was.
    """
    devices = [torch.cuda.current_device()] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        network = build_network(name, device, dtype)
        # Schedulers keep their tables on the host.
        scheduler = _scheduler(name)
        with torch.device(device):
            match name:
                case "sd15":
                    return _build_sd15(network, scheduler)
                case "sdxl":
                    return _build_sdxl(network, scheduler)
                case "sd3-medium":
                    return _build_sd3(network, scheduler)


def _scheduler(name: FullModel) -> SchedulerMixin:
    match name:
        case "sd15":
            return PNDMScheduler(**DDPM_NOISE, set_alpha_to_one=False, skip_prk_steps=True)
        case "sdxl":
            return EulerDiscreteScheduler(**DDPM_NOISE, timestep_spacing="leading")
        case "sd3-medium":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


def _build_sd15(unet: nn.Module, scheduler: SchedulerMixin) -> StableDiffusionPipeline:
    tokenizer = _tokenizer(END_TOKEN)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**SD15_VAE).eval(),
        text_encoder=CLIPTextModel(_clip(tokenizer, CLIP_L, CLIP_L_LAYERS)).eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _build_sdxl(unet: nn.Module, scheduler: SchedulerMixin) -> StableDiffusionXLPipeline:
    tokenizer, tokenizer_2 = _tokenizer(END_TOKEN), _tokenizer("!")
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**SDXL_VAE).eval(),
        text_encoder=CLIPTextModel(_clip(tokenizer, CLIP_L, CACHED_LAYERS)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(
            _clip(tokenizer_2, CLIP_G, CACHED_LAYERS)
        ).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _build_sd3(transformer: nn.Module, scheduler: SchedulerMixin) -> StableDiffusion3Pipeline:
    tokenizer, tokenizer_2, tokenizer_3 = (
        _tokenizer(END_TOKEN),
        _tokenizer("!"),
        mini_t5_tokenizer(),
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_3),
        d_model=T5_WIDTH,
        d_kv=64,
        d_ff=64,
        num_layers=CACHED_LAYERS,
        num_heads=1,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        eos_token_id=tokenizer_3.eos_token_id,
        pad_token_id=tokenizer_3.pad_token_id,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=AutoencoderKL(**SD3_VAE).eval(),
        text_encoder=CLIPTextModelWithProjection(_clip(tokenizer, CLIP_L, CACHED_LAYERS)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(
            _clip(tokenizer_2, CLIP_G, CACHED_LAYERS)
        ).eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_3=T5EncoderModel(t5).eval(),
        tokenizer_3=tokenizer_3,
    )


def _tokenizer(pad_token: str) -> CLIPTokenizer:
    tokenizer = mini_tokenizer(pad_token=pad_token)
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def _clip(tokenizer: CLIPTokenizer, kind: dict[str, Any], num_layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        **kind,
        vocab_size=len(tokenizer),
        intermediate_size=4 * kind["hidden_size"],
        projection_dim=kind["hidden_size"],
        num_hidden_layers=num_layers,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
