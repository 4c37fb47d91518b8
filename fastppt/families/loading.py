"""From what the user calls a model to a loaded family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.names import MINI_MODELS, PIPELINES, family_of_pipeline

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_model(model: ModelConfig) -> None:
    """Refuse what is certain to fail, before anything heavy is imported or read.

    Raises:
        UserError: a pickle, a single file, or a path that is neither a model folder nor a hub id.
    """
    assert model.path is not None
    path = Path(model.path)
    if model.path in MINI_MODELS:
        return
    if path.suffix in PICKLE_SUFFIXES:
        raise UserError(
            f"model {path}: a {path.suffix} file is a pickle, which can run code when it is read. "
            "Use a diffusers folder with .safetensors weights"
        )
    if path.is_file():
        raise UserError(f"model {path}: is a file; give a diffusers folder or a hub id")
    if path.is_dir():
        _pipeline_class(path)
    elif not HUB_ID.fullmatch(model.path):
        raise UserError(
            f"model {model.path}: is no folder, no hub id (owner/name), "
            f"and none of {', '.join(MINI_MODELS)}"
        )


def load_family(model: ModelConfig, dtype: torch.dtype | None = None) -> Family:
    """Load a pretrained model and place it on its device.

    Args:
        model: Which, and in which precision and where.
        dtype: Overrides ``model.precision``; float64 is for checks against exact arithmetic.

    Raises:
        UserError: the model cannot be found or read, or is of no known family.
    """
    check_model(model)
    device = resolve_device(model.device)
    if dtype is None:
        dtype = resolve_dtype(model.precision, device)
    if device.type == "cuda":
        # Events and kernel launches go to the current device, not to that of their tensors.
        torch.cuda.set_device(device)
    pipeline = _load_pipeline(model, dtype)
    name = family_of_pipeline(type(pipeline).__name__)
    if name is None:
        raise UserError(_unknown_pipeline(str(model.path), type(pipeline).__name__))
    return make_family(name, pipeline, model, device, dtype)


def make_family(
    name: str, pipeline: Any, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Family:
    """Return the family of that name around a loaded pipeline."""
    match name:
        case "sd":
            from fastppt.families.sd import StableDiffusion

            return StableDiffusion(pipeline, model, device, dtype)
        case "sdxl":
            from fastppt.families.sdxl import StableDiffusionXL

            return StableDiffusionXL(pipeline, model, device, dtype)
        case "sd3":
            from fastppt.families.sd3 import StableDiffusion3

            return StableDiffusion3(pipeline, model, device, dtype)
    raise AssertionError(name)


def resolve_device(name: str) -> torch.device:
    """Return the device for ``model.device``; auto is the GPU where there is one.

    Raises:
        UserError: a GPU is asked for and there is none of that number.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"model.device {name}: torch sees {torch.cuda.device_count()} GPUs here; "
            "pass --device cpu, or install a torch built for your GPU"
        )
    return device


def resolve_resolution(resolution: int | None, family: Family) -> int:
    """Return the side of pictures in pixels; None is the model's own.

    Raises:
        UserError: not a multiple of what the network needs.
    """
    side = resolution or family.native_resolution
    if side % family.resolution_step:
        near = max(1, round(side / family.resolution_step)) * family.resolution_step
        raise UserError(
            f"resolution must be a multiple of {family.resolution_step} for {family.model.path}, "
            f"got {side}; the nearest is {near}"
        )
    return side


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype for ``model.precision``; auto is bf16 on a GPU and fp32 on the CPU."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {name: dtype for dtype, name in PRECISIONS.items()}[precision]


def resolve_path(path: str) -> str:
    """Return a model folder's absolute path; the name of a mini model or a hub id as it is."""
    return path if path in MINI_MODELS or not Path(path).is_dir() else str(Path(path).absolute())


def _load_pipeline(model: ModelConfig, dtype: torch.dtype) -> Any:
    if model.path in MINI_MODELS:
        from fastppt.mini import build_mini

        return build_mini(model.path)
    from diffusers import DiffusionPipeline

    try:
        # The VAE is kept in float32: bf16 latents are visibly coarser.
        return DiffusionPipeline.from_pretrained(
            model.path,
            revision=model.revision,
            dtype={"vae": torch.promote_types(dtype, torch.float32), "default": dtype},
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model {model.path}: cannot be loaded ({reason})") from error


def _pipeline_class(folder: Path) -> str:
    index = folder / "model_index.json"
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except FileNotFoundError:
        raise UserError(f"model {folder}: is no diffusers folder (no model_index.json)") from None
    except (OSError, ValueError, AttributeError):
        raise UserError(f"model {folder}: {index.name} cannot be read as JSON") from None
    if family_of_pipeline(str(name)) is None:
        raise UserError(_unknown_pipeline(str(folder), name))
    return str(name)


def _unknown_pipeline(model: str, name: object) -> str:
    trained = ", ".join(name for names in PIPELINES.values() for name in names)
    return f"model {model}: is a {name}, which fastppt does not train (it trains {trained})"
