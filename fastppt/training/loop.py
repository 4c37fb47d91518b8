"""A whole run: check, load, encode once, train stage by stage, save."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fastppt.config import RunConfig, StageConfig
from fastppt.config_io import check_complete, check_recipe_fits
from fastppt.data.photos import find_photos
from fastppt.families.base import Family
from fastppt.families.loading import (
    PRECISIONS,
    detect_family,
    load_family,
    resolve_path,
    resolve_resolution,
)
from fastppt.outputs.files import write_file
from fastppt.outputs.folder import RunFolder, check_output, open_folder
from fastppt.outputs.lora_files import write_lora_files
from fastppt.outputs.metrics import check_tensorboard
from fastppt.outputs.model_card import model_card
from fastppt.trainables.trainables import Trainables
from fastppt.training.build import build_trainables
from fastppt.training.encoding import encode
from fastppt.training.engine import fallback_note, prepare_engine, resolve_engine
from fastppt.training.run import RunResult, TrainingRun
from fastppt.training.stage import layers_to_align


def train(config: RunConfig, console: Console, *, overwrite: bool = False) -> RunResult:
    """Run a configuration and return what it wrote.

    Args:
        config: With model, photos, class noun and output given.
        console: For the progress line and notes.
        overwrite: Delete the run that the output folder holds.

    Raises:
        UserError: anything that the user can mend. Wrong input is refused before the output is
            touched; a disk that fills up later is reported with the file that did not fit.
    """
    check_complete(config)
    folder = check_output(config, overwrite)
    assert config.photos.folder is not None
    check_recipe_fits(config, detect_family(config.model))
    if config.tensorboard:
        check_tensorboard()
    photos = find_photos(config.photos.folder)
    result = RunResult(folder, config)
    with result.phase("load"):
        family = load_family(config.model)
        note = fallback_note(config.engine, family.device)
        result.config = config = resolve(config, family)
        trainables = build_trainables(config, family)
        for index, stage in enumerate(config.stage):
            layers_to_align(family, stage.objectives, f"stage.{index}.objectives")
        if config.gradient_checkpointing:
            family.checkpoint_blocks()
        prepare_engine(config.engine, config.compile_scope, family)
    if note is not None:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    headline = _headline(config, family, trainables, len(photos))
    console.print(headline, markup=False, soft_wrap=True)
    with result.phase("encode"):
        buckets, sheet = encode(config, family, photos, console)
    result.note_peak("encode", family.device)
    open_folder(folder, config)
    TrainingRun(config, family, trainables, buckets, sheet, result, console).go()
    photo_counts = {bucket.size: bucket.num_photos for bucket in buckets}
    result.files = save(folder, config, family, trainables, result, photo_counts)
    return result


def resolve(config: RunConfig, family: Family) -> RunConfig:
    """Fill in what depends on model and machine, so that the file alone gives the run again.

    Raises:
        UserError: the resolution is not a multiple of what the network needs.
    """
    resolution = resolve_resolution(config.photos.resolution, family)
    assert config.model.path is not None
    assert config.photos.folder is not None and config.output is not None
    vae, config_folder = config.model.vae, config.model.config_folder
    model = {
        "path": resolve_path(config.model.path),
        "vae": resolve_path(vae) if vae is not None else None,
        "config_folder": config_folder.absolute() if config_folder is not None else None,
        "device": str(family.device),
        "precision": PRECISIONS.get(family.dtype, config.model.precision),
    }
    photos = {"resolution": resolution, "folder": config.photos.folder.absolute()}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "photos": config.photos.model_copy(update=photos),
            "output": config.output.absolute(),
            "engine": resolve_engine(config.engine, family.device),
            "stage": [_resolve_stage(stage) for stage in config.stage],
        }
    )


def _resolve_stage(stage: StageConfig) -> StageConfig:
    lora = stage.trainables.lora
    if lora is None or lora.init is None:
        return stage
    lora = lora.model_copy(update={"init": lora.init.absolute()})
    return stage.model_copy(
        update={"trainables": stage.trainables.model_copy(update={"lora": lora})}
    )


def save(
    folder: RunFolder,
    config: RunConfig,
    family: Family,
    trainables: Trainables,
    result: RunResult,
    photo_counts: dict[tuple[int, int], int],
) -> list[Path]:
    """Write the LoRA files and the model card; returns the files to use."""
    num_photos = sum(photo_counts.values())
    with result.phase("save"):
        files = write_lora_files(folder.root, config, family, trainables.lora, photo_counts)
        # What compiles does so in the first step; a capture takes the place of that.
        phases = ("check", "capture", "first step", "train")
        seconds = sum(result.seconds.get(phase, 0.0) for phase in phases)
        write_file(folder.card, model_card(config, family, trainables.lora, num_photos, seconds))
    grids = [folder.grid(sum(stage.steps for stage in config.stage))]
    return [*files, folder.card, *(grids if config.samples.enabled else [])]


def _headline(config: RunConfig, family: Family, trainables: Trainables, num_photos: int) -> str:
    adapters = trainables.lora
    steps = sum(stage.steps for stage in config.stage)
    return (
        f"{config.method}: {num_photos} photos, {steps} steps on {config.model.path} "
        f"({family.name}, {family.device}, {str(family.dtype).removeprefix('torch.')}, "
        f"{config.engine}); rank {adapters.rank}, {adapters.num_parameters:,} parameters"
    )
