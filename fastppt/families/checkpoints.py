"""Checks of model files before they are loaded, and of the weights that they gave."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.names import LARGE_TEXT_ENCODERS

SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# What the libraries raise for a model that is not as it should be.
LOADING_ERRORS = (OSError, ValueError, LookupError, AttributeError, RuntimeError, ImportError)
# What a component's configuration is called, by the first word of its name; config.json otherwise.
CONFIG_NAMES = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
# Names that diffusers and transformers give weight files: NAME[.VARIANT][-N-of-M].safetensors, and
# an older form with the variant last.
WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?"
    r"(?:\.(?P<old_variant>[\w-]+))?\.safetensors"
)
# Tensors in one file: the largest models have 4,000. Each costs microseconds to look at.
MOST_TENSORS = 20_000
LORA_KEY = re.compile(r"\.lora_(down|up|A|B)\.|\.lora\.(down|up)\.|\.hada_w\d|\.lokr_w\d")

# Keys of single-file checkpoints, as their authors published them.
NETWORK = "model.diffusion_model."
FIRST_CONVOLUTION = f"{NETWORK}input_blocks.0.0.weight"
LAST_CONVOLUTION = f"{NETWORK}out.2.weight"
FIRST_CROSS_ATTENTION = f"{NETWORK}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
ADDED_CONDITIONS = f"{NETWORK}label_emb.0.0.weight"
JOINT_BLOCK = "joint_blocks.0.context_block.adaLN_modulation.1.bias"
VAE_PREFIXES = ("first_stage_model.", "vae.")
TEXT_ENCODER_PREFIXES = ("text_encoders.clip_l.", "text_encoders.clip_g.")
LARGE_TEXT_ENCODER_PREFIX = "text_encoders.t5xxl."
VELOCITY_MARK = "v_pred"
ZERO_SNR_MARK = "ztsnr"
SCALED_SUFFIXES = (".scale_weight", ".weight_scale")
EDM_MARK = "edm_mean"
# Text width of the second generation, whose checkpoints exist for noise and for velocity.
AMBIGUOUS_TEXT_WIDTH = 1024

Shapes = dict[str, tuple[int, ...]]


def read_shapes(file: Path) -> Shapes:
    """Return the shape of each tensor in a .safetensors file; reads its header alone.

    Raises:
        UserError: it is a pickle, cannot be read, or is not whole.
    """
    refuse_pickle(file)
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            if len(names) > MOST_TENSORS:
                raise UserError(f"{file}: holds {len(names)} tensors; no model has so many")
            return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise UserError(
            f"{file}: is truncated, or no {SUFFIX} file ({error}); download or copy it again"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def refuse_pickle(file: Path) -> None:
    """Refuse a file that can run code when it is read.

    Raises:
        UserError: its suffix is that of a pickle.
    """
    if file.suffix in PICKLE_SUFFIXES:
        raise UserError(
            f"{file}: a {file.suffix} file is a pickle, which can run code when it is read. "
            f"Use a diffusers folder with {SUFFIX} weights, or a {SUFFIX} checkpoint"
        )


def family_of_checkpoint(file: Path) -> str:
    """Return the family of a single-file checkpoint, from the keys and shapes in its header.

    Raises:
        UserError: it is not whole, or no checkpoint of a model that can be trained.
    """
    shapes = read_shapes(file)
    if any(LORA_KEY.search(key) for key in shapes):
        raise UserError(
            f"model {file}: is a LoRA, not a model; to go on training it, pass --init-lora and "
            "give --model the model that it belongs to"
        )
    if any(key.endswith(SCALED_SUFFIXES) for key in shapes):
        raise UserError(
            f"model {file}: holds scaled 8-bit weights, which fastppt does not read; "
            "take the bf16 or fp16 file of the same model"
        )
    if any(prefix + JOINT_BLOCK in shapes for prefix in ("", NETWORK)):
        return "sd3"
    if FIRST_CONVOLUTION not in shapes:
        raise UserError(f"model {file}: {_what_else(shapes)}")
    if LAST_CONVOLUTION not in shapes:
        raise UserError(f"model {file}: lacks {LAST_CONVOLUTION}; is it complete?")
    num_read, num_written = shapes[FIRST_CONVOLUTION][1], shapes[LAST_CONVOLUTION][0]
    if num_read != num_written:
        raise UserError(
            f"model {file}: its network reads {num_read} channels and writes {num_written}, as for "
            "inpainting or editing; fastppt trains text-to-image models, which read what they write"
        )
    if EDM_MARK in shapes:
        raise UserError(f"model {file}: is trained by EDM (key {EDM_MARK}), not by DDPM")
    has_conditions = ADDED_CONDITIONS in shapes
    if has_conditions and _holds(shapes, "conditioner.embedders.1."):
        return "sdxl"
    if not has_conditions and _holds(shapes, "cond_stage_model."):
        return "sd"
    raise UserError(
        f"model {file}: holds a network, but not the text encoders of a text-to-image model that "
        "fastppt trains; give a full checkpoint (no refiner, no network alone)"
    )


def check_checkpoint(file: Path, family: str, model: ModelConfig) -> None:
    """Refuse a checkpoint that needs another file, or another setting, which is not given.

    Args:
        file: One that `family_of_checkpoint` knows.
        family: What it said.
        model: What goes with the file.

    Raises:
        UserError: names what is missing and the flag for it.
    """
    shapes = read_shapes(file)
    if model.vae is None and not any(_holds(shapes, prefix) for prefix in VAE_PREFIXES):
        raise UserError(f"model {file}: holds no VAE; pass one with --vae")
    text_width = shapes.get(FIRST_CROSS_ATTENTION, (0,))[-1]
    if model.config_folder is None and text_width == AMBIGUOUS_TEXT_WIDTH:
        raise UserError(
            f"model {file}: does not say whether it predicts noise or velocity; "
            "pass --model-config with the diffusers folder of its model"
        )
    if family not in LARGE_TEXT_ENCODERS:
        return
    for prefix in TEXT_ENCODER_PREFIXES:
        if not _holds(shapes, prefix):
            raise UserError(
                f"model {file}: holds no text encoders (no keys {prefix}...); "
                "take the file that includes them, or a diffusers folder"
            )
    if model.large_text_encoder and not _holds(shapes, LARGE_TEXT_ENCODER_PREFIX):
        raise UserError(
            f"model {file}: holds no T5 (no keys {LARGE_TEXT_ENCODER_PREFIX}...); take the file "
            "that includes it, or do without: --set model.large_text_encoder=false"
        )


def check_marks(file: Path, scheduler: Mapping[str, object]) -> None:
    """Refuse a checkpoint whose marks say otherwise than the configuration of its scheduler.

    Args:
        file: May have the mark of velocity, and that of noise which ends at a signal of zero.
        scheduler: Its configuration.

    Raises:
        UserError: names the key in the file and the one in the configuration.
    """
    shapes = read_shapes(file)
    wanted = "pass --model-config with a diffusers folder whose scheduler/scheduler_config.json has"
    prediction_type = scheduler.get("prediction_type")
    if VELOCITY_MARK in shapes and prediction_type != "v_prediction":
        raise UserError(
            f"model {file}: predicts velocity (it has the key {VELOCITY_MARK}), but its "
            f'configuration says {prediction_type}; {wanted} "prediction_type": "v_prediction"'
        )
    if ZERO_SNR_MARK in shapes and not scheduler.get("rescale_betas_zero_snr"):
        raise UserError(
            f"model {file}: is trained up to pure noise (it has the key {ZERO_SNR_MARK}), but its "
            f'configuration is not; {wanted} "rescale_betas_zero_snr": true'
        )


def check_configs(folder: Path, components: Collection[str]) -> None:
    """Check that a diffusers folder has the configuration of each component.

    Raises:
        UserError: names the file that is missing.
    """
    for name in components:
        file = folder / name / CONFIG_NAMES.get(name.split("_")[0], "config.json")
        if not file.is_file():
            raise UserError(f"model {folder}: has no {file.relative_to(folder)}; is it complete?")


def check_folder(folder: Path, components: Collection[str], variant: str | None) -> dict[str, int]:
    """Check that a diffusers folder has its weights, in whole files, by their headers alone.

    Args:
        folder: Passed `check_configs`.
        components: Those to look at.
        variant: Of the weight files; a component that lacks it is taken plain, as diffusers does.

    Returns:
        For each component with weights, how many values its files hold.

    Raises:
        UserError: names the folder or file that is missing or not whole.
    """
    modules = [name for name in components if name.split("_")[0] not in CONFIG_NAMES]
    found = {each for name in modules for each in _variants(folder / name).values()}
    if variant is not None and variant not in found:
        others = ", ".join(sorted(each for each in found if each)) or "the plain ones alone"
        raise UserError(
            f"model {folder}: has no weights of the variant {variant} (it has: {others})"
        )
    num_values = {}
    for name in modules:
        shapes = [read_shapes(file) for file in weight_files(folder / name, variant)]
        num_values[name] = sum(prod(shape) for each in shapes for shape in each.values())
    return num_values


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the .safetensors files of one component: of the variant, or the plain ones.

    Raises:
        UserError: there are none; says what there is instead.
    """
    variants = _variants(folder)
    for wanted in (variant, None):
        files = sorted(file for file, found in variants.items() if found == wanted)
        if files:
            return files
    if variants:
        others = sorted({str(found) for found in variants.values()})
        raise UserError(
            f"{folder}: has weights of the variant {', '.join(others)} alone; "
            f"pass --variant {others[0]}"
        )
    if any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise UserError(
            f"{folder}: has no {SUFFIX} weights, but pickles, which can run code when they are "
            f"read; convert them to {SUFFIX}"
        )
    raise UserError(f"{folder}: has no {SUFFIX} weights; is the download complete?")


def check_weights(
    origin: str, modules: Mapping[str, nn.Module], num_values: Mapping[str, int]
) -> None:
    """Refuse modules that were not filled whole, or hold a value that is no finite number.

    Reads every value once: 0.06 s a GB on one thread of a server's CPU, measured.

    Args:
        origin: Where they came from, for the message.
        modules: By component, on the CPU.
        num_values: How many values the files of a component hold, where that is known. The
            libraries fill what files lack with random numbers or leave it out.

    Raises:
        UserError: names the component and the tensor.
    """
    for component, module in modules.items():
        for name, tensor in module.state_dict().items():
            if tensor.is_meta:
                raise UserError(f"{origin}: {component} lacks the tensor {name}; is it complete?")
            if tensor.is_floating_point() and not _is_finite(tensor):
                hint = " (fp16 ends at 65504: try --precision bf16)"
                raise UserError(
                    f"{origin}: {component} has NaN or infinite values in {name}"
                    f"{hint if tensor.dtype == torch.float16 else ''}"
                )
        wanted = sum(parameter.numel() for parameter in module.parameters())
        found = num_values.get(component, wanted)
        if found < wanted:
            raise UserError(
                f"{origin}: {component} needs {wanted:,} values and its files hold {found:,}; "
                "is it complete?"
            )


@contextmanager
def without_cast_warnings() -> Iterator[None]:
    """Keep diffusers from warning of its own casts, that it should keep no modules in float32."""

    def is_of_use(record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addFilter(is_of_use)
    try:
        yield
    finally:
        logger.removeFilter(is_of_use)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep diffusers and transformers from drawing a bar of their own for each part of a model."""
    # Not above: checks of files do without the libraries, which take seconds to import.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _is_finite(tensor: torch.Tensor) -> bool:
    # aminmax hands NaN on, and is 12 to 20 times faster than isfinite (measured): no temporaries.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _variants(folder: Path) -> dict[Path, str | None]:
    """Return the variant of each weight file in a component's folder."""
    matches = {path: WEIGHT_FILE.fullmatch(path.name) for path in folder.iterdir()}
    return {
        path: match["variant"] or match["old_variant"] for path, match in matches.items() if match
    }


def _holds(shapes: Shapes, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in shapes)


def _what_else(shapes: Shapes) -> str:
    if _holds(shapes, "decoder.") or any(_holds(shapes, prefix) for prefix in VAE_PREFIXES):
        return "is a VAE, not a model; pass it with --vae"
    if any(_holds(shapes, prefix) for prefix in ("down_blocks.", "transformer_blocks.")):
        return "holds one component; give the folder above it, which has a model_index.json"
    return "holds no model that fastppt knows"
