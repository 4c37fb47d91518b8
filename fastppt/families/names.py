"""The families and the mini models by name, and what their models consist of.

Imports nothing heavy.
"""

from __future__ import annotations

# Each family, and the diffusers pipelines that it trains.
PIPELINES: dict[str, tuple[str, ...]] = {
    "sd": ("StableDiffusionPipeline",),
    "sdxl": ("StableDiffusionXLPipeline",),
    "sd3": ("StableDiffusion3Pipeline",),
}
FAMILY_NAMES = tuple(PIPELINES)
# Each embedded model, and its family.
MINI_MODELS: dict[str, str] = {"mini-sd": "sd", "mini-sdxl": "sdxl", "mini-sd3": "sd3"}
# The one of them that is trained: on the mini world, whose judge can read its pictures alone.
WORLD_MODEL = "mini-sdxl"

# The components of its pipeline that a family uses; all others are left out when it is loaded.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "sd": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": (
        *("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        "scheduler",
    ),
    "sd3": (
        *("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"),
    ),
}
# What a family can do without: its largest text encoder, and that one's tokenizer.
LARGE_TEXT_ENCODERS: dict[str, tuple[str, ...]] = {"sd3": ("text_encoder_3", "tokenizer_3")}
# What a pipeline has to be told when components are left out.
PIPELINE_OPTIONS: dict[str, dict[str, bool]] = {"sd": {"requires_safety_checker": False}}


def family_of_pipeline(class_name: str) -> str | None:
    """Return the family that trains a diffusers pipeline; None if none does."""
    return next((name for name, classes in PIPELINES.items() if class_name in classes), None)
