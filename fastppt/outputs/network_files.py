"""What a run leaves of a network that has moved, but for LoRA: written, and put into another one.

full: the whole pipeline as diffusers saves it, and all of it as one file in the original layout.
custom_diffusion: the file that diffusers' ``load_attn_procs`` reads, where the network is a UNet;
of another network the values by their path.
svdiff: the shifts, in a form of our own.
dora, loha, lokr, oft, boft: the two files of the peft library; dora also as a LoRA file.

Source: ``save_attn_procs`` and ``_process_custom_diffusion`` of diffusers' ``loaders/unet.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastppt.config import RunConfig
from fastppt.data.prompts import subject_words
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.checkpoints import weight_files, without_bars
from fastppt.families.lora_keys import FAMILY_KEY
from fastppt.families.names import family_of_pipeline
from fastppt.families.original_layout import original_layout
from fastppt.families.sources import load_pipeline, read_index
from fastppt.outputs.adapters import DTYPES
from fastppt.outputs.embeddings import SUFFIX
from fastppt.outputs.files import STATE_FILE, write_file, write_folder
from fastppt.outputs.lora_files import run_name
from fastppt.outputs.lora_metadata import BASE_KEY, TRAINABLE_KEY, model_spec
from fastppt.outputs.peft_form import CONFIG_FILE, WEIGHTS_FILE
from fastppt.outputs.tensor_files import write_tensors
from fastppt.trainables.network_weights import NetworkWeights
from fastppt.trainables.trainables import Trainables
from fastppt.trainables_config import FullConfig

PIPELINE_FOLDER = "pipeline"
# As diffusers calls it.
CUSTOM_DIFFUSION_FILE = "pytorch_custom_diffusion_weights.safetensors"
SHIFTS_FILE = "spectral_shifts.safetensors"
PEFT_FILES = [CONFIG_FILE, WEIGHTS_FILE]
FULL, CUSTOM_DIFFUSION, SVDIFF, DORA = "full", "custom_diffusion", "svdiff", "dora"
# What a projection is called in diffusers' file.
ATTENTION_KEY = re.compile(r"(.+)\.processor\.(to_[kv])_custom_diffusion\.(.+)")
ATTENTION_PATH = re.compile(r"(.+)\.(to_[kv])\.(.+)")


def network_files(config: RunConfig) -> list[str]:
    """Return the names of the files and folders that `write_network` leaves."""
    match config.network:
        case None | "lora":
            return []
        case "full":
            return [PIPELINE_FOLDER, f"{run_name(config)}{SUFFIX}"]
        case "custom_diffusion":
            return [CUSTOM_DIFFUSION_FILE]
        case "svdiff":
            return [SHIFTS_FILE]
        case "dora":
            return [*PEFT_FILES, f"{run_name(config)}{SUFFIX}"]
    return PEFT_FILES


def write_network(
    folder: Path, config: RunConfig, family: Family, trainables: Trainables
) -> list[Path]:
    """Write the network as a run leaves it; nothing where it stood still, or moved by LoRA.

    Args:
        folder: Where to.
        config: The run's, resolved.
        family: Whose network was trained. Not written.
        trainables: What was trained.

    Returns:
        The paths of `network_files`.

    Raises:
        UserError: something cannot be written, or the rest of the base model not loaded again.
    """
    dtype = DTYPES[config.save_dtype]
    if config.network != FULL:
        files = write_small_network(folder, config, family, trainables)
        if config.network == DORA:
            from fastppt.trainables.peft_files import dora_file

            moved: Any = trainables.network
            tensors = dora_file(moved, family.lora_component)
            files.append(folder / f"{run_name(config)}{SUFFIX}")
            cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            write_tensors(files[-1], cast, _facts(config, family))
        return files
    network = trained_network(family, trainables, dtype)
    pipeline = load_pipeline(config.model, family.name, dtype, {family.lora_component: network})
    for name, part in pipeline.components.items():
        # Those of a mini model are not loaded in any other type than their own.
        if name.startswith("text_encoder") and part is not None and part.dtype != dtype:
            nn.Module.to(part, dtype)
    paths = [folder / name for name in network_files(config)]
    with without_bars():
        write_folder(paths[0], pipeline.save_pretrained)
    spec = model_spec(config, family, paths[1].stem, kind="", trigger=subject_words(config.prompts))
    # Left out: it would take a second look at all bytes.
    del spec["modelspec.hash_sha256"]
    write_tensors(paths[1], original_layout(pipeline), _facts(config, family) | spec)
    return paths


def write_small_network(
    folder: Path, config: RunConfig, family: Family, trainables: Trainables
) -> list[Path]:
    """Write what `write_network` writes, but for a network that was trained whole: nothing then."""
    moved: Any = trainables.network
    dtype, facts = DTYPES[config.save_dtype], _facts(config, family)
    match config.network:
        case None | "lora" | "full":
            return []
        case "custom_diffusion":
            tensors = custom_diffusion_tensors(family, moved.tensors, dtype)
            write_tensors(folder / CUSTOM_DIFFUSION_FILE, tensors, facts)
            return [folder / CUSTOM_DIFFUSION_FILE]
        case "svdiff":
            tensors, told = moved.file_tensors(dtype)
            write_tensors(folder / SHIFTS_FILE, tensors, facts | told)
            return [folder / SHIFTS_FILE]
    from fastppt.trainables.peft_files import adapter_files

    for name, content in adapter_files(moved, dtype, facts).items():
        write_file(folder / name, content)
    return [folder / name for name in PEFT_FILES]


def trained_network(family: Family, trainables: Trainables, dtype: torch.dtype) -> nn.Module:
    """Return a network of diffusers with what was trained, on the host.

    It shares memory with the family's where that has the dtype and is on the host.
    """
    assert trainables.network is not None
    kind: Any = type(family.network)
    with torch.device("meta"):
        network: nn.Module = kind.from_config(family.network.config)
    # Values may be wider than what the network computes with.
    state = family.network.state_dict() | trainables.network.tensors
    on_host = {name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()}
    network.load_state_dict(on_host, assign=True)
    return network.requires_grad_(False).eval()


def custom_diffusion_tensors(
    family: Family, values: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return keys and values of the file that diffusers reads where the network is a UNet.

    It wants a word of every attention of the network: of one that stays as it is an empty tensor.
    """
    network: Any = family.network
    tensors = {name: value.to("cpu", dtype) for name, value in values.items()}
    if not hasattr(network, "load_attn_procs"):
        return tensors
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        match = ATTENTION_PATH.fullmatch(name)
        assert match is not None
        named[f"{match[1]}.processor.{match[2]}_custom_diffusion.{match[3]}"] = value
    moved = {name.split(".to_")[0] for name in named}
    still = [name for name in network.attn_processors if name not in moved]
    return named | {name: torch.empty(0, dtype=dtype) for name in still}


def put_network_(network: nn.Module, component: str, folder: Path, config: RunConfig) -> None:
    """Write into a network what a run has made of another one like it.

    Args:
        network: Of diffusers, with the weights of the run's base model. Written.
        component: What the pipeline calls it.
        folder: Of the run, or a checkpoint of it.
        config: The run's; its network has moved, and not by LoRA.

    Raises:
        UserError: a file is missing, or is of another model.
    """
    match config.network:
        case "full" if (folder / PIPELINE_FOLDER).is_dir():
            _put_pipeline_(network, folder / PIPELINE_FOLDER / component)
        case "full":
            _put_state_(network, folder, config)
        case "custom_diffusion":
            tensors, _ = read_tensors(folder / CUSTOM_DIFFUSION_FILE)
            values = {_path_of(key): tensor for key, tensor in tensors.items() if tensor.numel()}
            _copy_(network, values, folder / CUSTOM_DIFFUSION_FILE)
        case "svdiff":
            from fastppt.trainables.svdiff import merge_shifts_

            file = folder / SHIFTS_FILE
            try:
                merge_shifts_(network, *read_tensors(file))
            except UserError as error:
                raise UserError(f"{file}: {error}") from None
        case _:
            from fastppt.trainables.peft_files import load_adapter

            load_adapter(network, folder)


def family_of_network(folder: Path, config: RunConfig) -> str | None:
    """Return the family that the files of `put_network_` name; None where they name none.

    Raises:
        UserError: they cannot be read.
    """
    if config.network == FULL:
        pipeline = folder / PIPELINE_FOLDER
        named = read_index(pipeline).get("_class_name") if pipeline.is_dir() else None
        return family_of_pipeline(str(named))
    names = {CUSTOM_DIFFUSION: CUSTOM_DIFFUSION_FILE, SVDIFF: SHIFTS_FILE}
    with _opened(folder / names.get(str(config.network), WEIGHTS_FILE)) as file:
        return dict(file.metadata() or {}).get(FAMILY_KEY)


def _facts(config: RunConfig, family: Family) -> dict[str, str]:
    """Return what every file says of itself."""
    return {
        "format": "pt",
        TRAINABLE_KEY: str(config.network),
        FAMILY_KEY: family.name,
        BASE_KEY: str(config.model.path),
    }


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); is the run finished?") from None


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a run's file, on the host, and its metadata.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    with _opened(file) as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, dict(opened.metadata() or {})


def _path_of(key: str) -> str:
    match = ATTENTION_KEY.fullmatch(key)
    return key if match is None else f"{match[1]}.{match[2]}.{match[3]}"


@torch.no_grad()
def _copy_(network: nn.Module, values: Mapping[str, Tensor], file: Path) -> None:
    """Write values into parameters and buffers, all or none.

    Raises:
        UserError: one has no place, or a place of another shape.
    """
    places = network.state_dict()
    for name, value in values.items():
        if name not in places:
            raise UserError(f"{file}: {name} has no place in this network; is it the run's model?")
        if places[name].shape != value.shape:
            raise UserError(
                f"{file}: {name} is {list(value.shape)}, and in this network "
                f"{list(places[name].shape)}; is it the run's model?"
            )
    for name, value in values.items():
        places[name].copy_(value)


def _put_pipeline_(network: nn.Module, folder: Path) -> None:
    """Copy the weights of a component's folder, one file after the other."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is missing; the run trained another kind of network")
    missing = set(network.state_dict())
    for file in weight_files(folder, None):
        tensors, _ = read_tensors(file)
        _copy_(network, tensors, file)
        missing -= tensors.keys()
    _refuse_missing(folder, missing)


def _put_state_(network: Any, folder: Path, config: RunConfig) -> None:
    """Copy the weights of a checkpoint's state: their moving average, where there is one."""
    file = folder / STATE_FILE
    _, table = config.trainables[FULL]
    assert isinstance(table, FullConfig)
    with torch.device("meta"):
        outline = type(network).from_config(network.config)
    weights = NetworkWeights(outline, table.targets, master_weights=False)
    with _opened(file) as opened:
        names, average = set(opened.keys()), f"{FULL}/average"
        flat = opened.get_tensor(average if average in names else f"{FULL}/values")
    if flat.shape != weights.arena.flat.shape:
        raise UserError(
            f"{file}: holds {flat.numel():,} values, and this network's are "
            f"{weights.arena.flat.numel():,}; is it the run's model?"
        )
    laid_out = {
        name: flat.as_strided(place.shape, place.stride(), place.storage_offset())
        for name, place in weights.tensors.items()
    }
    _copy_(network, laid_out, file)


def _refuse_missing(folder: Path, names: Iterable[str]) -> None:
    first = next(iter(sorted(names)), None)
    if first is not None:
        raise UserError(f"{folder}: lacks {first}, which this network has; is it the run's model?")
