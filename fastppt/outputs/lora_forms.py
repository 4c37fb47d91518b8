"""LoRA files in the forms that the field has: one reader for all, one writer each.

kohya: ``lora_unet_<path with underscores>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``; read
by ComfyUI, A1111, Forge and sd-scripts, and by diffusers. Source: sd-scripts' ``networks/lora.py``.
diffusers: ``<component>.<path>.lora_A.weight``, ``.lora_B.weight``; an alpha that is not the rank
stands in the metadata, where diffusers reads it and other programs do not.
peft: a folder with a subfolder for each component, as ``PeftModel.save_pretrained`` writes it.

Nothing here computes: tensors and alphas go through bit for bit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastppt.errors import UserError
from fastppt.families.lora_keys import (
    COMPONENTS,
    LayerName,
    detect_family,
    kohya_name,
    module_path,
)
from fastppt.outputs.adapters import Adapter, Form, LoraFile
from fastppt.outputs.files import rename, write_file
from fastppt.outputs.lora_metadata import TRAINABLE_KEY, file_content
from fastppt.outputs.lora_parsing import (
    PEFT_PREFIX,
    build_adapters,
    is_kohya,
    parse_dotted,
    parse_kohya,
    parse_peft,
    read_safetensors,
)
from fastppt.outputs.peft_form import (
    CONFIG_FILE,
    METADATA_KEY,
    WEIGHTS_FILE,
    PeftTables,
    config_file,
    metadata_entry,
    read_json,
)


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA of any form: a .safetensors file, or a folder as peft saves it.

    Raises:
        UserError: it cannot be read, or holds a key that is no plain LoRA; nothing is left out.
    """
    if path.is_dir():
        return _read_peft(path)
    _refuse_other_kinds(path)
    tensors, metadata = read_safetensors(path)
    metadata.pop("format", None)
    entry = metadata.pop(METADATA_KEY, None)
    if is_kohya(tensors):
        parts, names = parse_kohya(path, tensors)
        adapters = build_adapters(path, parts, lambda layer: None)
        return LoraFile(adapters, metadata, "kohya", detect_family(adapters, metadata, names))
    tables = PeftTables.from_metadata(path, entry)
    adapters = build_adapters(path, parse_dotted(path, tensors), tables.alpha)
    return LoraFile(adapters, metadata, "diffusers", detect_family(adapters, metadata))


def _refuse_other_kinds(path: Path) -> None:
    """Refuse what a run has left that is no LoRA, before all of it is read."""
    try:
        with safe_open(path, "pt") as file:
            kind = (file.metadata() or {}).get(TRAINABLE_KEY)
    except (OSError, SafetensorError):
        # Which the reader says better.
        return
    if kind is not None:
        raise UserError(
            f"LoRA {path}: holds {kind} of a fastppt run, no LoRA; `fastppt generate --run OUT` "
            "draws with the run, and fastppt.load(pipe, OUT) puts it into a pipeline of diffusers"
        )


def write_lora(path: Path, lora: LoraFile, form: Form) -> None:
    """Write a LoRA in a form: a file, or a folder for peft. It is whole or not there.

    Hashes that the metadata give of the file are computed anew.

    Raises:
        UserError: the form cannot hold the layers, or nothing can be written there.
    """
    if form == "peft":
        _write_peft(path, lora)
        return
    metadata = {"format": "pt"} | lora.metadata
    if form == "kohya":
        tensors = kohya_tensors(lora)
    else:
        tensors = diffusers_tensors(lora.adapters)
        if any(one.alpha != one.rank for one in lora.adapters.values()):
            metadata[METADATA_KEY] = metadata_entry(lora.components)
    write_file(path, file_content(tensors, metadata))


def kohya_tensors(lora: LoraFile) -> dict[str, Tensor]:
    """Return the keys and tensors (contiguous) of the kohya form.

    Raises:
        UserError: a layer has no name in that form.
    """
    tensors = {}
    for layer, one in lora.adapters.items():
        name = kohya_name(layer, lora.detection.family)
        tensors[f"{name}.lora_down.weight"] = one.down.contiguous()
        tensors[f"{name}.lora_up.weight"] = one.up.contiguous()
        tensors[f"{name}.alpha"] = _alpha_tensor(one.alpha)
    return tensors


def diffusers_tensors(adapters: Mapping[LayerName, Adapter]) -> dict[str, Tensor]:
    """Return the keys and tensors (contiguous) of the diffusers form; alphas are not among them."""
    tensors = {}
    for (component, path), one in adapters.items():
        tensors[f"{component}.{path}.lora_A.weight"] = one.down.contiguous()
        tensors[f"{component}.{path}.lora_B.weight"] = one.up.contiguous()
    return tensors


def is_peft_folder(path: Path) -> bool:
    """Return whether the path is a folder that peft, or `write_lora`, saved adapters into."""
    return bool(_peft_folders(path))


def _peft_folders(path: Path) -> dict[str, Path]:
    """Return the folder of each component."""
    if (path / CONFIG_FILE).is_file():
        return {path.absolute().name: path}
    return {name: path / name for name in COMPONENTS if (path / name / CONFIG_FILE).is_file()}


def _read_peft(path: Path) -> LoraFile:
    adapters: dict[LayerName, Adapter] = {}
    metadata: dict[str, str] = {}
    folders = _peft_folders(path)
    if not folders:
        raise UserError(f"LoRA {path}: holds no {CONFIG_FILE}, nor a folder that does")
    for component, folder in folders.items():
        if component not in COMPONENTS:
            raise UserError(
                f"LoRA {folder}: nothing says what model it adapts; give the folder the name of "
                f"the model's part, one of {', '.join(COMPONENTS)}"
            )
        try:
            text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"LoRA {folder}: {CONFIG_FILE} cannot be read ({error})") from None
        tables = PeftTables(folder, {component: read_json(folder, CONFIG_FILE, text)})
        file = folder / WEIGHTS_FILE
        tensors, told = read_safetensors(file)
        told.pop("format", None)
        metadata |= told
        adapters |= build_adapters(file, parse_peft(file, component, tensors), tables.alpha)
    return LoraFile(adapters, metadata, "peft", detect_family(adapters, metadata))


def _write_peft(path: Path, lora: LoraFile) -> None:
    family = lora.detection.family
    files: dict[str, bytes | str] = {}
    for component, adapters in lora.components.items():
        named = {module_path((component, name), family): one for name, one in adapters.items()}
        tensors = {}
        for name, one in named.items():
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = one.down.contiguous()
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = one.up.contiguous()
        files[f"{component}/{CONFIG_FILE}"] = config_file(component, named)
        metadata = {"format": "pt"} | lora.metadata
        files[f"{component}/{WEIGHTS_FILE}"] = save(tensors, metadata=metadata)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for name, content in files.items():
            write_file(aside / name, content)
        rename(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _alpha_tensor(alpha: float) -> Tensor:
    """Return alpha as float32 where that is exact, as most programs store it, else as float64."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
