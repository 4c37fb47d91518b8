"""Adapters in the files of the peft library, and DoRA in a LoRA file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastppt.errors import UserError
from fastppt.trainables.peft_tuners import PeftAdapters
from fastppt.trainables.rotations import Boft, Oft
from fastppt.trainables.tuners import Dora, Loha, Lokr, Tuner

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# What peft puts before the module paths of the model that it wraps.
PREFIX = "base_model.model."


def adapter_files(
    adapters: PeftAdapters, dtype: torch.dtype, metadata: Mapping[str, str]
) -> dict[str, bytes]:
    """Return the files of a folder that `PeftModel.from_pretrained(network, folder)` reads.

    What OFT's constraint held is written as it is, without the constraint: peft's own has no place
    for it.

    Args:
        adapters: As they are now.
        dtype: Of the tensors in the file.
        metadata: For the head of the file with the weights.

    Returns:
        The contents of the settings and of the weights, by name.
    """
    tensors = {
        f"{PREFIX}{name}": tensor.to("cpu", dtype).contiguous()
        for name, tensor in adapters.tensors.items()
    }
    settings = _peft_config(adapters).to_dict()
    listed = {key: sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    return {
        CONFIG_FILE: (json.dumps(listed, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS_FILE: save(tensors, {"format": "pt", **metadata}),
    }


def dora_file(adapters: PeftAdapters, component: str) -> dict[str, Tensor]:
    """Return DoRA adapters under the keys that a pipeline's `load_lora_weights` reads.

    Such a file knows no strength: alpha / rank becomes part of the up-projections.

    Args:
        adapters: Those of a `Dora`.
        component: Of the pipeline, such as `unet`.
    """
    assert isinstance(adapters.tuner, Dora)
    scales = {"lora_B.weight": adapters.tuner.scale}
    return {
        f"{component}.{name}.{part}": (scales.get(part, 1.0) * value.detach()).cpu()
        for name, values in adapters.values.items()
        for part, value in values.items()
    }


def load_adapter(network: nn.Module, folder: Path) -> None:
    """Put the adapters of a folder that `adapter_files` wrote into a network, in place.

    The layers are peft's, in float32, whatever the network's dtype. BOFT, for which peft needs a
    CUDA extension, becomes part of the network's weights, rounded to their dtype.

    Args:
        network: As diffusers has it, without adapters.
        folder: With the two files.

    Raises:
        UserError: a file is damaged, or was made for another network.
    """
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"adapters {folder}: cannot be read ({error}); copy them anew") from None
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    tuner = _tuner_of(config, folder)
    every_linear = {n: each for n, each in network.named_modules() if isinstance(each, nn.Linear)}
    missing = [name for name in config.target_modules or () if name not in every_linear]
    if missing:
        raise UserError(
            f"adapters {folder}: this model has no linear layer {missing[0]}; they were made for "
            "another one"
        )
    linears = {name: every_linear[name] for name in sorted(config.target_modules or ())}
    _check_shapes(linears, tuner, tensors, folder)
    if isinstance(tuner, Boft):
        _merge_(linears, tuner, tensors)
        return
    peft.inject_adapter_in_model(config, network)
    # In the network's dtype, as they are made, small rotations and magnitudes would be rounded off.
    peft.tuners.tuners_utils.cast_adapter_dtype(network, "default")
    peft.set_peft_model_state_dict(network, tensors)
    network.requires_grad_(False)


def _peft_config(adapters: PeftAdapters) -> PeftConfig:
    """Return peft's settings of the same adapters."""
    import peft

    common: dict[str, Any] = {"target_modules": [*adapters.values], "inference_mode": True}
    match adapters.tuner:
        case Dora(rank, scale):
            common |= {"r": rank, "lora_alpha": scale * rank, "use_dora": True}
            return peft.LoraConfig(**common)
        case Loha(rank, scale):
            common |= {"r": rank, "alpha": scale * rank}
            return peft.LoHaConfig(**common)
        case Lokr(rank, scale, largest_side):
            common |= {"r": rank, "alpha": scale * rank, "decompose_factor": largest_side or -1}
            return peft.LoKrConfig(**common)
        case Oft(block_size, num_blocks):
            return peft.OFTConfig(
                r=num_blocks or 0,
                oft_block_size=block_size or 0,
                use_cayley_neumann=False,
                **common,
            )
        case Boft(block_size, factors):
            return peft.BOFTConfig(
                boft_block_size=block_size, boft_n_butterfly_factor=factors, **common
            )
        case tuner:
            raise AssertionError(type(tuner).__name__)


def _tuner_of(config: PeftConfig, folder: Path) -> Tuner:
    """Return the kind of adapters that peft's settings describe."""
    import peft

    match config:
        case peft.LoraConfig() if config.use_dora:
            return Dora(config.r, config.lora_alpha / config.r)
        case peft.LoHaConfig():
            return Loha(config.r, config.alpha / config.r)
        case peft.LoKrConfig():
            side = config.decompose_factor
            return Lokr(config.r, config.alpha / config.r, None if side == -1 else side)
        case peft.OFTConfig() if not config.use_cayley_neumann:
            return Oft(config.oft_block_size or None, config.r or None)
        case peft.BOFTConfig():
            return Boft(config.boft_block_size, config.boft_n_butterfly_factor)
        case _:
            raise UserError(
                f"adapters {folder}: {CONFIG_FILE} is none that was written here; load the folder "
                "by peft.PeftModel.from_pretrained"
            )


def _check_shapes(
    linears: Mapping[str, nn.Linear], tuner: Tuner, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    """Refuse tensors that are not all those of the linear layers."""
    shapes = {
        f"{name}.{part}": shape
        for name, linear in linears.items()
        for part, shape in tuner.shapes(linear).items()
    }
    for name in sorted(shapes.keys() | tensors.keys()):
        here = shapes.get(name)
        there = tuple(tensors[name].shape) if name in tensors else None
        if here != there:
            raise UserError(
                f"adapters {folder}: {name} has the shape {there} in the file and {here} in this "
                "model; they were made for another one"
            )


@torch.no_grad()
def _merge_(linears: Mapping[str, nn.Linear], tuner: Tuner, tensors: Mapping[str, Tensor]) -> None:
    """Make adapters part of the weights."""
    for name, linear in linears.items():
        weight = linear.weight.to(torch.promote_types(linear.weight.dtype, torch.float32))
        values = {part: tensors[f"{name}.{part}"].to(weight) for part in tuner.shapes(linear)}
        identity = torch.eye(linear.in_features, device=weight.device, dtype=weight.dtype)
        linear.weight.copy_(tuner.project(identity, weight, None, values).T)
