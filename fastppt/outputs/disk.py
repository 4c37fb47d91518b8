"""What a run is going to write, and whether there is room for it."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.machine import nearest_folder, size_in_words
from fastppt.outputs.adapters import DTYPES
from fastppt.outputs.folder import RunFolder
from fastppt.outputs.samples import grid_size
from fastppt.trainables.trainables import LORA, TEXT_ENCODER_LORA, TOKENS, Trainables

NUM_MOMENTS = 2
# Bytes of a moment's value: in 8 bits its code, and its part of the scale of a block of 256.
BYTES_OF_MOMENTS = {"fp32": 4.0, "8bit": 1 + 4 / 256}
# Bytes of a file for a tensor's name, shape and place, and for the file's metadata.
HEADER_A_TENSOR, METADATA = 200, 10_000
# Bytes of a number in metrics.jsonl beside its name, and of an event of TensorBoard beside its tag.
BYTES_A_NUMBER, BYTES_AN_EVENT = 26, 60
# Bytes of a pipeline's tokenizers and configurations, and of the names of its weights: at most.
PIPELINE_FILES = 16_000_000
# Bytes of all plots together; of six they were 0.4 MB.
PLOTS = 2_000_000
# Bytes of configuration, model card, manifests and the like.
SMALL_FILES = 200_000


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that a run has on disk at most, pictures as if PNG could not compress them.

    Attributes:
        parts: By what they are.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size_in_words(size)}" for name, size in self.parts.items())
        return f"{size_in_words(self.total)} ({parts})"


def plan_disk(
    config: RunConfig,
    weights: Mapping[str, int],
    trainables: Trainables,
    resolution: int,
    columns: Collection[str],
) -> DiskPlan:
    """Return what a run is going to write; class images, which other runs share, left out.

    Args:
        config: The run's.
        weights: Their number in the parts of its model, as `count_weights` has them.
        trainables: What it trains; the meta device will do.
        resolution: Side of its pictures in pixels.
        columns: Names of its metrics.
    """
    steps = sum(stage.steps for stage in config.stage)
    results = _result_bytes(config, weights, trainables)
    usable = _usable_bytes(config, trainables)
    state = max(_state_bytes(index, config, trainables) for index in range(len(config.stage)))
    num_checkpoints = _num_checkpoints(config, steps)
    parts = {
        **results,
        _counted(num_checkpoints, "checkpoint"): num_checkpoints * (state + usable),
        # Written whole beside the old one.
        "metrics": 2 * steps * sum(len(name) + BYTES_A_NUMBER for name in columns) + SMALL_FILES,
    }
    if config.samples.enabled:
        every = config.sample_every
        num_grids = 2 + ((steps - 1) // every if every else 0)
        width, height = grid_size(2 + len(config.prompts.contexts), resolution)
        parts[_counted(num_grids, "sample grid")] = num_grids * 3 * width * height
    if config.tensorboard:
        parts["TensorBoard"] = steps * sum(len(name) + BYTES_AN_EVENT for name in columns)
    if config.plots:
        parts["plots"] = PLOTS
    return DiskPlan(parts)


def count_weights(family: Family) -> dict[str, int]:
    """Return the number of weights of each part of a model, before any of them is given up."""
    # The VAE is not in 16 bits.
    widths = {"VAE": max(family.dtype.itemsize, 4)}
    return {
        part: size // widths.get(part, family.dtype.itemsize)
        for part, size in family.weight_bytes().items()
    }


def check_disk(plan: DiskPlan, folder: RunFolder, config: RunConfig) -> None:
    """Refuse a run that would fill the disk.

    What the folder holds already of a run counts as free: it is written over, or is part of the
    run that goes on.

    Raises:
        UserError: says what is needed and what is free.
    """
    place = nearest_folder(folder.root)
    free = shutil.disk_usage(place).free + _size_on_disk(folder.written_by(config))
    if plan.total <= free:
        return
    advice = ["free some space", "choose another --output"]
    if config.checkpoint_every:
        advice.append("write fewer checkpoints (--checkpoint-every) or keep fewer")
    raise UserError(
        f"output {folder.root}: the run writes up to {plan}, and {size_in_words(free)} are free at "
        f"{place}. What helps: {', '.join(advice)}"
    )


def _num_checkpoints(config: RunConfig, steps: int) -> int:
    """Return how many checkpoints there are at most at a time, the one being written included."""
    lengths = [(steps, config.checkpoint_every)]
    lengths += [(stage.steps, stage.checkpoint_every) for stage in config.stage]
    # Where none is wanted, an interruption still writes one.
    num = sum(-(-length // every) for length, every in lengths if every) or 1
    return min(num, config.keep_checkpoints) + 1 if config.keep_checkpoints else num + 1


def _result_bytes(
    config: RunConfig, weights: Mapping[str, int], trainables: Trainables
) -> dict[str, int]:
    """Return the bytes of the files of a finished run, by what they are."""
    tensors, width = trainables.tensors, DTYPES[config.save_dtype].itemsize
    parts = {}
    if config.network == "full":
        # The whole pipeline, and all of it in one file; a VAE may stay in float32.
        values = sum(weights.values()) * width + weights["VAE"] * (4 - width)
        parts["network"] = 2 * values + PIPELINE_FILES
    elif config.network not in (None, LORA):
        # DoRA's values are written as a LoRA file, too.
        num_files = 2 if config.network == "dora" else 1
        parts["network"] = num_files * _network_file(config, trainables)
    lora = [tensors[name] for name in (LORA, TEXT_ENCODER_LORA) if name in tensors]
    if lora:
        parts["LoRA files"] = 2 * _file_bytes([t for each in lora for t in each.values()], width)
    if TOKENS in tensors:
        parts["embedding"] = _file_bytes(tensors[TOKENS].values(), width)
    return parts


def _usable_bytes(config: RunConfig, trainables: Trainables) -> int:
    """Return the bytes of a checkpoint's files that can be used as a finished run's."""
    width, total = DTYPES[config.save_dtype].itemsize, 0
    if config.network not in (None, LORA, "full"):
        total += _network_file(config, trainables)
    for name in (LORA, TEXT_ENCODER_LORA, TOKENS):
        if name in trainables.tensors:
            total += _file_bytes(trainables.tensors[name].values(), width)
    return total


def _network_file(config: RunConfig, trainables: Trainables) -> int:
    assert trainables.network is not None and config.network is not None
    values = trainables.network.tensors.values()
    total = _file_bytes(values, DTYPES[config.save_dtype].itemsize)
    # Beside the shifts the singular values that they shift, in float32.
    return total + (_file_bytes(values, 4) if config.network == "svdiff" else 0)


def _file_bytes(tensors: Iterable[Tensor], width: int) -> int:
    """Return the bytes of a file of tensors, of this many bytes an element."""
    return METADATA + sum(tensor.numel() * width + HEADER_A_TENSOR for tensor in tensors)


def _state_bytes(index: int, config: RunConfig, trainables: Trainables) -> int:
    """Return the bytes of the state of a checkpoint in one of the stages."""
    stage, total = config.stage[index], float(METADATA)
    moment = BYTES_OF_MOMENTS[stage.optimizer.moments]
    for name, trainable in trainables.parts.items():
        for arena in trainable.arenas.values():
            size, width = arena.flat.numel(), arena.flat.dtype.itemsize
            total += size * width
            if name not in stage.trainables.given:
                continue
            total += NUM_MOMENTS * size * moment
            total += size * max(width, 4) * (stage.ema_decay > 0)
            total += size * width * _keeps_anchor(name, index, config)
    return int(total)


def _keeps_anchor(name: str, index: int, config: RunConfig) -> bool:
    """Say whether a trainable's anchor in a stage is of values that must be kept."""
    stage = config.stage[index]
    anchor = stage.objectives.anchor
    if anchor is None or name in ("full", "custom_diffusion"):
        # Those of the network's own weights are the model's.
        return False
    if anchor.to == "zero":
        # Which a learned word cannot be held at.
        return name == TOKENS
    first, table = config.trainables[name]
    is_new = index == first and getattr(table, "init", None) is None
    # What new adapters add is zero, and so are new shifts and rotations.
    is_lora = name in (LORA, TEXT_ENCODER_LORA)
    return not (is_new and (name in ("svdiff", "oft") or (is_lora and anchor.form == "effective")))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _size_on_disk(paths: Collection[Path]) -> int:
    files = [file for path in paths for file in (path, *path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())
