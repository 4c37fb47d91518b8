"""What a run is going to write, and whether there is room for it."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.machine import nearest_folder, size_in_words
from fastppt.outputs.adapters import DTYPES
from fastppt.outputs.folder import RunFolder
from fastppt.outputs.samples import grid_size
from fastppt.trainables.trainables import Trainables

# Values of four bytes that a checkpoint keeps of each parameter: itself and its two moments.
VALUES, BYTES_A_VALUE = 3, 4
# Bytes of a LoRA file for a tensor's name, shape and place, and for the file's metadata.
HEADER_A_TENSOR, METADATA = 200, 10_000
# Bytes of a number in metrics.jsonl beside its name, and of an event of TensorBoard beside its tag.
BYTES_A_NUMBER, BYTES_AN_EVENT = 26, 60
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
    config: RunConfig, trainables: Trainables, resolution: int, columns: Collection[str]
) -> DiskPlan:
    """Return what a run is going to write.

    Args:
        config: The run's.
        trainables: What it trains; the meta device will do.
        resolution: Side of its pictures in pixels.
        columns: Names of its metrics.
    """
    steps = sum(stage.steps for stage in config.stage)
    num_tensors = sum(len(tensors) for tensors in trainables.tensors.values())
    adapters = trainables.num_parameters * DTYPES[config.save_dtype].itemsize
    adapters += num_tensors * HEADER_A_TENSOR + METADATA
    values = sum(arena.flat.numel() for arena in trainables.arenas.values())
    state = values * BYTES_A_VALUE * (VALUES + _keeps_anchors(config))
    num_checkpoints = _num_checkpoints(config, steps)
    parts = {
        "LoRA files": 2 * adapters,
        _counted(num_checkpoints, "checkpoint"): num_checkpoints * (state + adapters),
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
    # Where none is wanted, an interruption still writes one.
    num = -(-steps // config.checkpoint_every) if config.checkpoint_every else 1
    return min(num, config.keep_checkpoints) + 1 if config.keep_checkpoints else num + 1


def _keeps_anchors(config: RunConfig) -> bool:
    """Say whether the anchors of a stage are values that must be kept."""
    for index, stage in enumerate(config.stage):
        anchor, lora = stage.objectives.anchor, stage.trainables.lora
        # New adapters begin as zero in what the network sees.
        is_zero = index == 0 and lora is not None and lora.init is None
        if (
            anchor is not None
            and anchor.to == "start"
            and not (anchor.form == "effective" and is_zero)
        ):
            return True
    return False


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _size_on_disk(paths: Collection[Path]) -> int:
    files = [file for path in paths for file in (path, *path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())
