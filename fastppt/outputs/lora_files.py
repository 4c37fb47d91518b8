"""LoRA files in the two forms that the field reads, and back.

diffusers form: ``unet.<path>.lora_A.weight``, ``.lora_B.weight``; alpha is folded into B, since the
form has no place for it.
kohya form: ``lora_unet_<path with underscores>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``;
read by ComfyUI, A1111, Forge and sd-scripts, and by diffusers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.data.prompts import subject_words
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.outputs.files import write_file
from fastppt.trainables.lora import LoraAdapters, LoraPair

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def write_lora_files(
    folder: Path, config: RunConfig, family: Family, adapters: LoraAdapters, num_photos: int
) -> list[Path]:
    """Write the adapters in both forms; returns the files' paths, diffusers form first."""
    diffusers_file, kohya_file = folder / DIFFUSERS_FILE, folder / f"{run_name(config)}.safetensors"
    write_diffusers_file(diffusers_file, family, adapters)
    tensors = kohya_tensors(adapters.pairs, family.kohya_prefix, adapters.alpha)
    metadata = kohya_metadata(config, family, adapters, num_photos)
    metadata["modelspec.hash_sha256"] = f"0x{hashlib.sha256(save(tensors)).hexdigest()}"
    write_file(kohya_file, save(tensors, metadata=metadata))
    return [diffusers_file, kohya_file]


def write_diffusers_file(path: Path, family: Family, adapters: LoraAdapters) -> None:
    """Write the adapters in the diffusers form."""
    tensors = diffusers_tensors(adapters.pairs, family.lora_component)
    write_file(path, save(tensors, metadata={"format": "pt"}))


def run_name(config: RunConfig) -> str:
    """Return the name of the run's LoRA file: the config's, or that of the output folder."""
    assert config.output is not None
    return config.name or config.output.resolve().name or "lora"


def diffusers_tensors(pairs: Iterable[LoraPair], component: str) -> dict[str, Tensor]:
    """Return the keys and tensors (host, contiguous) of the diffusers form."""
    tensors = {}
    for pair in pairs:
        up = pair.up if pair.scale == 1 else pair.up * pair.scale
        tensors[f"{component}.{pair.name}.lora_A.weight"] = _to_host(pair.down)
        tensors[f"{component}.{pair.name}.lora_B.weight"] = _to_host(up)
    return tensors


def kohya_tensors(pairs: Iterable[LoraPair], prefix: str, alpha: float) -> dict[str, Tensor]:
    """Return the keys and tensors (host, contiguous) of the kohya form."""
    tensors = {}
    for pair in pairs:
        key = f"{prefix}_{pair.name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = _to_host(pair.down)
        tensors[f"{key}.lora_up.weight"] = _to_host(pair.up)
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=pair.down.dtype)
    return tensors


def kohya_metadata(
    config: RunConfig, family: Family, adapters: LoraAdapters, num_photos: int
) -> dict[str, str]:
    """Return what model managers show: ``ss_*`` as sd-scripts writes, ``modelspec.*`` as specified.

    Source: the keys of sd-scripts' ``train_network.py``; Stability AI's ModelSpec 1.0.0.
    """
    stage = config.stage[-1]
    assert stage.trainables.lora is not None
    side = config.photos.resolution
    subject = subject_words(config.prompts)
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapters.rank),
        "ss_network_alpha": f"{adapters.alpha:g}",
        "ss_base_model_version": family.kohya_model_version,
        "ss_sd_model_name": str(config.model.path),
        "ss_v2": "False",
        "ss_output_name": run_name(config),
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(num_photos),
        "ss_tag_frequency": json.dumps({subject: {subject: num_photos}}),
        "ss_steps": str(sum(stage.steps for stage in config.stage)),
        "ss_max_train_steps": str(sum(stage.steps for stage in config.stage)),
        "ss_batch_size_per_device": str(stage.batch_size),
        "ss_gradient_accumulation_steps": str(stage.gradient_accumulation),
        "ss_learning_rate": f"{stage.trainables.lora.learning_rate:g}",
        "ss_unet_lr": f"{stage.trainables.lora.learning_rate:g}",
        "ss_lr_scheduler": stage.schedule,
        "ss_lr_warmup_steps": str(stage.warmup_steps),
        "ss_optimizer": "fastppt_kernels.AnchoredAdamW",
        "ss_max_grad_norm": f"{stage.optimizer.max_grad_norm:g}",
        "ss_mixed_precision": {torch.bfloat16: "bf16"}.get(family.dtype, "no"),
        "ss_seed": str(config.seed),
        "ss_training_comment": f"fastppt, {config.method}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family.modelspec_architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": run_name(config),
        "modelspec.description": f"{subject}, learned by fastppt ({config.method})",
        "modelspec.trigger_phrase": subject,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[
            family.prediction_type
        ],
    }


def find_lora_file(path: Path) -> Path:
    """Return the file for what the user calls a LoRA: the file, or the folder of a run.

    Raises:
        UserError: there is none, or it is not a .safetensors file.
    """
    file = path / DIFFUSERS_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"LoRA {path}: there is no file {file}; is the run finished?")
    if file.suffix != ".safetensors":
        raise UserError(f"LoRA {path}: must be a .safetensors file (others can run code when read)")
    return file


def read_lora_file(path: Path, family: Family) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Read a LoRA file of either form through diffusers' own reader.

    Args:
        path: The file, or the folder of a run.
        family: Whose network it is for.

    Returns:
        For each projection's module path: down [r, I], up [O, r], scale.

    Raises:
        UserError: the file cannot be read, or holds something else than LoRA of the network.
    """
    file = find_lora_file(path)
    try:
        state, alphas = family.read_lora_state(file.resolve())
    # diffusers looks keys up that a damaged file lacks.
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"LoRA {file}: cannot be read ({error})") from None
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, side = _split_key(key, family.lora_component)
        if side is None:
            raise UserError(f"LoRA {file}: key {key} is not LoRA of the {family.lora_component}")
        (downs if side == "down" else ups)[name] = tensor
    if not downs or downs.keys() != ups.keys():
        raise UserError(f"LoRA {file}: has no complete down and up pairs; is the file whole?")
    return {
        name: (down, ups[name], _scale(alphas, f"{family.lora_component}.{name}", down.shape[0]))
        for name, down in downs.items()
    }


def _scale(alphas: Mapping[str, float], name: str, rank: int) -> float:
    return alphas[name] / rank if name in alphas else 1.0


def _split_key(key: str, component: str) -> tuple[str, str | None]:
    """Return the module path and whether it is its down or its up side (None: neither)."""
    for ending, side in ((".lora_A.weight", "down"), (".lora_B.weight", "up")):
        if key.startswith(f"{component}.") and key.endswith(ending):
            return key.removeprefix(f"{component}.").removesuffix(ending), side
    return key, None


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous().clone()
