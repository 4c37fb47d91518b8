"""The LoRA files of a run: written when it ends, found and read when another starts from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.lora_keys import Detection, has_kohya_form
from fastppt.outputs.adapters import DTYPES, Adapter, Form, LoraFile
from fastppt.outputs.lora_forms import is_peft_folder, read_lora, write_lora
from fastppt.outputs.lora_metadata import run_metadata
from fastppt.trainables.lora import LoraAdapters

CONFIG_FILE = "config.toml"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

logger = logging.getLogger(__name__)


def write_lora_files(
    folder: Path,
    config: RunConfig,
    family: Family,
    adapters: LoraAdapters,
    photo_counts: Mapping[tuple[int, int], int],
) -> list[Path]:
    """Write the adapters for diffusers and, with all metadata, for other programs.

    The second file has the kohya form where the family has one, else the diffusers form again.

    Args:
        folder: Where to.
        config: The run's, resolved.
        family: Whose network was trained.
        adapters: What was trained.
        photo_counts: Number of photos that were trained at each (height, width), pixels.

    Returns:
        The files' paths, diffusers' first.
    """
    diffusers_file, named_file = folder / DIFFUSERS_FILE, folder / f"{run_name(config)}.safetensors"
    write_diffusers_file(diffusers_file, family, adapters, config.save_dtype)
    form: Form = "kohya" if has_kohya_form(family.name) else "diffusers"
    # Other programs than diffusers take alpha for the rank in its form: there it is folded.
    alpha = adapters.alpha if form == "kohya" else float(adapters.rank)
    metadata = run_metadata(config, family, adapters.rank, alpha, run_name(config), photo_counts)
    lora = lora_of_run(family, adapters, metadata)
    lora = lora if form == "kohya" else lora.folded()
    write_lora(named_file, lora.cast(DTYPES[config.save_dtype]), form)
    return [diffusers_file, named_file]


def write_diffusers_file(
    path: Path, family: Family, adapters: LoraAdapters, save_dtype: str
) -> None:
    """Write the adapters in the diffusers form, alpha folded into the up side."""
    lora = lora_of_run(family, adapters, {}).folded().cast(DTYPES[save_dtype])
    write_lora(path, lora, "diffusers")


def lora_of_run(family: Family, adapters: LoraAdapters, metadata: dict[str, str]) -> LoraFile:
    """Return a run's adapters as a file in memory, on the host."""
    copies = {
        (family.lora_component, pair.name): Adapter(
            _to_host(pair.down), _to_host(pair.up), adapters.alpha
        )
        for pair in adapters.pairs
    }
    return LoraFile(copies, metadata, "diffusers", Detection(family.name, "the run's model"))


def run_name(config: RunConfig) -> str:
    """Return the name of the run's LoRA file: the config's, or that of the output folder."""
    assert config.output is not None
    return config.name or config.output.resolve().name or "lora"


def find_lora_file(path: Path) -> Path:
    """Return what to read for what the user calls a LoRA: a file, a run's folder, or peft's.

    Of a run's folder it is the file with the metadata, where alpha is not folded if its form has a
    place for it.

    Raises:
        UserError: there is none, or it is not a .safetensors file.
    """
    if is_peft_folder(path):
        return path
    file = path
    if path.is_dir():
        file = path / DIFFUSERS_FILE
        if (path / CONFIG_FILE).is_file():
            config = build_config(file=path / CONFIG_FILE)
            named = path / f"{run_name(config)}.safetensors" if config.output else file
            file = named if named.is_file() else file
    if not file.is_file():
        raise UserError(f"LoRA {path}: there is no file {file}; is the run finished?")
    if file.suffix != ".safetensors":
        raise UserError(f"LoRA {path}: must be a .safetensors file (others can run code when read)")
    return file


def read_lora_file(path: Path, family: Family) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Read a LoRA of any form for a family's network.

    Args:
        path: The file, the folder of a run, or a folder of peft's.
        family: Whose network it is for.

    Returns:
        For each projection's module path: down [r, I], up [O, r], scale; float32 at least.

    Raises:
        UserError: it cannot be read, is of another family, or adapts more than the network.
    """
    file = find_lora_file(path)
    lora = read_lora(file)
    told = lora.detection
    if told.family not in (None, family.name):
        raise UserError(
            f"LoRA {file}: is of the family {told.family} ({told.evidence}), and the model "
            f"{family.model.path} is of the family {family.name}; use a model of its own family"
        )
    weights = {}
    for (component, name), one in lora.adapters.items():
        if component != family.lora_component:
            raise UserError(
                f"LoRA {file}: {component}.{name} is not LoRA of the {family.lora_component}, "
                "the one part that fastppt adapts; a file without it is needed"
            )
        if name in family.unread_projections:
            logger.warning(
                "LoRA %s: the adapter of %s is left out: nothing reads that layer's output",
                file,
                name,
            )
            continue
        precise = torch.promote_types(one.down.dtype, torch.float32)
        weights[name] = (one.down.to(precise), one.up.to(precise), one.scale)
    if not weights:
        raise UserError(f"LoRA {file}: adapts no layer that fastppt could adapt")
    return weights


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous().clone()
