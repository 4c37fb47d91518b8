"""From the keys and tensors of a LoRA file to adapters by layer. Every key is read or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastppt.errors import UserError
from fastppt.families.checkpoints import MOST_TENSORS
from fastppt.families.lora_keys import COMPONENTS, LayerName, canonical_path, parse_kohya_name
from fastppt.outputs.adapters import Adapter

KOHYA_PREFIXES = ("lora_unet_", "lora_te")
PEFT_PREFIX = "base_model.model."
DOTTED_KEY = re.compile(rf"({'|'.join(COMPONENTS)})\.(.+)")
# What a key ends with, and the part of an adapter that it is.
KOHYA_ENDINGS = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}
DOTTED_ENDINGS = {".lora_A.weight": "down", ".lora_B.weight": "up", ".alpha": "alpha"}
# Parts of keys of what looks like LoRA and is something else.
OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
}

LONGEST_KEY = 1000
"""Letters; the longest that any trainer writes has 120."""

# What adapters are stored in.
FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)

Parts = dict[LayerName, dict[str, Tensor]]
"""Of each layer its `down`, its `up`, and its `alpha` if the file gives one."""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors (on the host) and its metadata.

    Raises:
        UserError: it is no whole .safetensors file, or holds nothing.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            keys = file.keys()
            if len(keys) > MOST_TENSORS or any(len(key) > LONGEST_KEY for key in keys):
                raise UserError(
                    f"LoRA {path}: holds {len(keys)} tensors, or names of over {LONGEST_KEY} "
                    f"letters; a LoRA has at most {MOST_TENSORS}, of shorter names"
                )
            tensors = {key: file.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise UserError(f"LoRA {path}: cannot be read ({error}); is the file whole?") from None
    if not tensors:
        raise UserError(f"LoRA {path}: cannot be read (it holds no tensor)")
    return tensors, metadata


def is_kohya(keys: Iterable[str]) -> bool:
    """Return whether the keys are of the kohya form."""
    return any(key.startswith(KOHYA_PREFIXES) for key in keys)


def parse_kohya(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Parts, list[str]]:
    """Return the parts of each layer, and the layers' names in the file.

    Raises:
        UserError: a key is none of a plain LoRA in the kohya form.
    """
    parts: Parts = {}
    names = []
    for key, tensor in tensors.items():
        name, part = _split_ending(path, key, KOHYA_ENDINGS)
        _refuse_convolution(path, key, tensor)
        layer = parse_kohya_name(name)
        if layer is None:
            raise UserError(
                f"LoRA {path}: key {key} names no layer of a UNet or a CLIP text encoder, which "
                "are all that fastppt reads in the kohya form. Files for transformers are read in "
                "the diffusers form: convert it with the program that wrote it"
            )
        names.append(name)
        _put(path, parts, layer, part, key, tensor)
    return parts, names


def parse_dotted(path: Path, tensors: Mapping[str, Tensor]) -> Parts:
    """Return the parts of each layer of a file in the diffusers form, the older names too.

    Raises:
        UserError: a key is none of a plain LoRA in that form.
    """
    by_component: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(PEFT_PREFIX):
            raise UserError(
                f"LoRA {path}: key {key} is of peft's own form, which does not say what model it "
                "adapts; give the folder with the file and its adapter_config.json"
            )
        match = DOTTED_KEY.fullmatch(key)
        if match is None:
            _refuse_other_methods(path, key)
            raise UserError(
                f"LoRA {path}: key {key} is not LoRA: it begins with none of "
                f"{', '.join(f'{name}.' for name in COMPONENTS)}"
            )
        by_component.setdefault(match[1], {})[match[2]] = tensor
    parts: Parts = {}
    for component, state in by_component.items():
        for key, tensor in _modern_names(component, state).items():
            name, part = _split_ending(path, f"{component}.{key}", DOTTED_ENDINGS)
            layer = canonical_path(component, name.removeprefix(f"{component}."))
            _put(path, parts, (component, layer), part, f"{component}.{key}", tensor)
    return parts


def parse_peft(path: Path, component: str, tensors: Mapping[str, Tensor]) -> Parts:
    """Return the parts of each layer of one component's file in the peft form.

    Raises:
        UserError: a key is none of a plain LoRA in that form.
    """
    parts: Parts = {}
    for key, tensor in tensors.items():
        name, part = _split_ending(path, key, DOTTED_ENDINGS)
        if not name.startswith(PEFT_PREFIX):
            raise UserError(f"LoRA {path}: key {key} does not begin with {PEFT_PREFIX}")
        layer = canonical_path(component, name.removeprefix(PEFT_PREFIX))
        _put(path, parts, (component, layer), part, key, tensor)
    return parts


def build_adapters(
    path: Path, parts: Parts, alpha_of: Callable[[LayerName], float | None]
) -> dict[LayerName, Adapter]:
    """Put the parts together.

    Args:
        path: The file, for messages.
        parts: Of each layer.
        alpha_of: What is said of a layer's alpha outside the tensors; None means the rank.

    Raises:
        UserError: a part is missing, or the shapes are not those of LoRA on a linear layer or a
            1x1 convolution, or an alpha is no number.
    """
    adapters = {}
    for layer, stored in parts.items():
        name = ".".join(layer)
        if "down" not in stored or "up" not in stored:
            side = "down" if "up" in stored else "up" if "down" in stored else "down and up"
            raise UserError(f"LoRA {path}: {name} has no {side} side; is the file whole?")
        down, up = stored["down"], stored["up"]
        _check_shapes(path, name, down, up)
        alpha = stored["alpha"].item() if "alpha" in stored else alpha_of(layer)
        if isinstance(alpha, complex) or (alpha is not None and not math.isfinite(alpha)):
            raise UserError(f"LoRA {path}: {name} has the alpha {alpha}, which is no real number")
        adapters[layer] = Adapter(down, up, float(down.shape[0] if alpha is None else alpha))
    return adapters


def _check_shapes(path: Path, name: str, down: Tensor, up: Tensor) -> None:
    shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and down.shape[0] == up.shape[1]
    if not fits or up.shape[2:] != down.shape[2:]:
        raise UserError(f"LoRA {path}: {name} has sides of shapes {shapes}, which do not fit")
    if not (down.numel() and up.numel()):
        raise UserError(f"LoRA {path}: {name} has sides of shapes {shapes}, which hold nothing")
    if down.dtype not in FLOATS or up.dtype not in FLOATS:
        raise UserError(f"LoRA {path}: {name} holds {down.dtype} and {up.dtype}, no real numbers")


def _put(path: Path, parts: Parts, layer: LayerName, part: str, key: str, tensor: Tensor) -> None:
    _refuse_convolution(path, key, tensor)
    stored = parts.setdefault(layer, {})
    if part in stored:
        raise UserError(f"LoRA {path}: key {key} gives {'.'.join(layer)} a second time")
    if part == "alpha" and tensor.numel() != 1:
        raise UserError(
            f"LoRA {path}: key {key} must be one number, has shape {tuple(tensor.shape)}"
        )
    stored[part] = tensor


def _split_ending(path: Path, key: str, endings: Mapping[str, str]) -> tuple[str, str]:
    _refuse_other_methods(path, key)
    for ending, part in endings.items():
        if key.endswith(ending):
            return key.removesuffix(ending), part
    raise UserError(
        f"LoRA {path}: key {key} is not LoRA: it ends with none of {', '.join(endings)}"
    )


def _refuse_other_methods(path: Path, key: str) -> None:
    for part, method in OTHER_METHODS.items():
        if part in key:
            raise UserError(
                f"LoRA {path}: key {key} is {method}, which fastppt does not read (plain LoRA only)"
            )


def _refuse_convolution(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.ndim == 4 and tensor.shape[2:] != (1, 1):
        raise UserError(
            f"LoRA {path}: key {key} is LoCon, a LoRA of a {tensor.shape[2]}x{tensor.shape[3]} "
            "convolution, which fastppt does not read"
        )


def _modern_names(component: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state under the names that diffusers writes today, by diffusers' own tables."""
    if all(key.endswith(tuple(DOTTED_ENDINGS)) for key in state):
        return state
    if not component.startswith("text_encoder"):
        converted = convert_unet_state_dict_to_peft(state)
    elif any("to_out_lora" in key or "lora_linear_layer" in key for key in state):
        converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    else:
        return state
    return dict(converted)
