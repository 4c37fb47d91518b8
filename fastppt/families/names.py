"""The families and the mini models by name; imports nothing heavy."""

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


def family_of_pipeline(class_name: str) -> str | None:
    """Return the family that trains a diffusers pipeline; None if none does."""
    return next((name for name, classes in PIPELINES.items() if class_name in classes), None)
