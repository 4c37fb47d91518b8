"""From what the user calls a model to a loaded family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.checkpoints import LOADING_ERRORS, check_checkpoint, family_of_checkpoint
from fastppt.families.names import LARGE_TEXT_ENCODERS, MINI_MODELS, PIPELINES, family_of_pipeline
from fastppt.families.sources import (
    HUB_HINT,
    INDEX,
    Source,
    cannot_load,
    load_pipeline,
    outline_pipeline,
    read_index,
    source_of,
)

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# The sources of a model that a key of its table belongs to; all others refuse it.
SOURCES_OF_KEY: dict[str, tuple[Source, ...]] = {
    "revision": ("hub id",),
    "variant": ("hub id", "diffusers folder"),
    "config_folder": ("single file",),
}


def check_model(model: ModelConfig) -> None:
    """Refuse what is certain to fail, before anything is imported or read.

    Raises:
        UserError: a pickle, a path that is no model, or keys that do not go together.
    """
    assert model.path is not None
    source = source_of(model.path)
    for key, sources in SOURCES_OF_KEY.items():
        if getattr(model, key) is not None and source not in sources:
            raise UserError(
                f"model.{key}: goes with a {' or a '.join(sources)}, "
                f"and model {model.path} is a {source}; leave it out"
            )
    if source == "diffusers folder":
        _family_of_folder(Path(model.path))
    if model.config_folder is not None:
        _family_of_folder(model.config_folder)


def detect_family(model: ModelConfig) -> str:
    """Check a model as far as that goes without reading its weights, and name its family.

    A hub id costs a look at the hub, or at its cache.

    Raises:
        UserError: it cannot be found, is of no known family, or does not fit its other keys.
    """
    check_model(model)
    assert model.path is not None
    path = Path(model.path)
    match source_of(model.path):
        case "mini model":
            name = MINI_MODELS[model.path]
        case "single file":
            name = family_of_checkpoint(path)
            check_checkpoint(path, name, model)
        case "diffusers folder":
            name = _family_of_folder(path)
        case "hub id":
            name = _hub_family(model)
    if model.config_folder is not None:
        configured = _family_of_folder(model.config_folder)
        if configured != name:
            raise UserError(
                f"model.config_folder {model.config_folder}: is of {configured}, "
                f"and model {path} is {name}; give the folder of the same model"
            )
    choices = {
        "large_text_encoder": not model.large_text_encoder,
        "max_tokens": model.max_tokens is not None,
    }
    for key, given in choices.items():
        if given and name not in LARGE_TEXT_ENCODERS:
            raise UserError(
                f"model.{key}: is for {', '.join(LARGE_TEXT_ENCODERS)}, "
                f"and model {path} is {name}; leave it out"
            )
    return name


def load_family(model: ModelConfig, dtype: torch.dtype | None = None) -> Family:
    """Load a pretrained model and place it on its device.

    Args:
        model: Which, and in which precision and where.
        dtype: Overrides ``model.precision``; float64 is for checks against exact arithmetic.

    Raises:
        UserError: the model cannot be found or read, is not whole, or is of no known family.
    """
    name = detect_family(model)
    device = resolve_device(model.device)
    if dtype is None:
        dtype = resolve_dtype(model.precision, device)
    if device.type == "cuda":
        # Events and kernel launches go to the current device, not to that of their tensors.
        torch.cuda.set_device(device)
    return make_family(name, load_pipeline(model, name, dtype), model, device, dtype)


def outline_family(model: ModelConfig, dtype: torch.dtype) -> Family | None:
    """Return a model's family on the meta device, without reading a weight.

    It encodes, predicts and trains as the loaded one does, in shapes alone.

    Args:
        model: Which.
        dtype: Of the network and the text encoders.

    Returns:
        None where the model's configuration is not on this machine: that of a hub id which is not
        in the cache, or of a single file without ``model.config_folder``.

    Raises:
        UserError: the model cannot be found or read, or is of no known family.
    """
    from fastppt.families.weights import cached_folder

    name = detect_family(model)
    assert model.path is not None
    folder: Path | None = None
    match source_of(model.path):
        case "single file":
            folder = model.config_folder
        case "diffusers folder":
            folder = Path(model.path)
        case "hub id":
            folder = cached_folder(model.path, model.revision)
    if folder is None and name != MINI_MODELS.get(model.path):
        return None
    pipeline = outline_pipeline(model, folder, name)
    return make_family(name, pipeline, model, torch.device("meta"), dtype)


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
        UserError: not a multiple of what the network needs, or more than it has places for.
    """
    side = resolution or family.native_resolution
    if family.largest_side is not None and side > family.largest_side:
        raise UserError(
            f"resolution must be at most {family.largest_side} for {family.model.path}, got {side}"
        )
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
    """Return the absolute path of a file or folder; the name of a mini model or hub id as it is."""
    return path if path in MINI_MODELS or not Path(path).exists() else str(Path(path).absolute())


def _family_of_folder(folder: Path) -> str:
    return _family_of(str(folder), read_index(folder).get("_class_name"))


def _hub_family(model: ModelConfig) -> str:
    from huggingface_hub import hf_hub_download

    assert model.path is not None
    try:
        file = hf_hub_download(model.path, INDEX, revision=model.revision)
    except LOADING_ERRORS as error:
        raise cannot_load(model, error, HUB_HINT) from error
    return _family_of_folder(Path(file).parent)


def _family_of(model: str, class_name: object) -> str:
    name = family_of_pipeline(str(class_name))
    if name is None:
        trained = ", ".join(name for names in PIPELINES.values() for name in names)
        raise UserError(
            f"model {model}: is a {class_name}, which fastppt does not train (it trains {trained})"
        )
    return name
