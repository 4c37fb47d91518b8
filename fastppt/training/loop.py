"""A whole run: check, load, encode once, train stage by stage, save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from fastppt.config import RunConfig
from fastppt.config_io import check_complete, check_recipe_fits
from fastppt.data.photos import Photo, find_photos
from fastppt.data.prompt_checks import check_prompts
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import (
    PRECISIONS,
    detect_family,
    load_family,
    resolve_path,
    resolve_resolution,
)
from fastppt.outputs.disk import check_disk, count_weights, plan_disk
from fastppt.outputs.files import write_file
from fastppt.outputs.folder import RunFolder, check_output, open_folder
from fastppt.outputs.lock import lock_output
from fastppt.outputs.lora_files import run_name
from fastppt.outputs.metrics import check_tensorboard
from fastppt.outputs.model_card import model_card
from fastppt.outputs.results import check_libraries, write_results
from fastppt.stage_config import StageConfig
from fastppt.trainables.trainables import Trainables
from fastppt.training.build import build_trainables, without_init
from fastppt.training.checkpoint import Checkpoint, find_checkpoints
from fastppt.training.class_images import (
    find_class_images,
    fingerprint_painter,
    resolve_prior,
)
from fastppt.training.deterministic import deterministic
from fastppt.training.encoding import encode, encode_class_sets
from fastppt.training.engine import fallback_note, prepare_engine, resolve_engine
from fastppt.training.graph import CudaRecorder
from fastppt.training.identity import (
    check_class_images,
    check_photos,
    check_weights,
    describe_machine,
    fingerprint_weights,
    identify,
)
from fastppt.training.interrupt import (
    IMAGES_KEPT,
    NOT_YET_RESUMED,
    NOTHING_TRAINED,
    Interruption,
    signal_name,
)
from fastppt.training.result import RunResult
from fastppt.training.resume import Resumption, find_run, plan_resume
from fastppt.training.run import TrainingRun
from fastppt.training.stage import check_objectives, noted_names


def train(config: RunConfig, console: Console, *, overwrite: bool = False) -> RunResult:
    """Run a configuration and return what it wrote.

    Args:
        config: With model, photos, class noun and output given.
        console: For the progress line and notes.
        overwrite: Delete the run that the output folder holds.

    Raises:
        UserError: anything that the user can mend. Wrong input is refused before the output is
            touched; a disk that fills up later is reported with the file that did not fit.
        Interrupted: SIGINT, SIGTERM or SIGHUP has ended the run, after the step that was under way
            and with a checkpoint. One that comes when all is trained is noted, and the run is
            whole.
    """
    check_complete(config)
    assert config.output is not None
    with (
        Interruption(quiet=console.quiet) as interruption,
        lock_output(config.output, console),
        deterministic(config.deterministic),
    ):
        folder = check_output(config, overwrite)
        return _run(config, folder, console, interruption, None)


def resume(path: Path, settings: Sequence[tuple[str, Any]], console: Console) -> RunResult | None:
    """Go on with a run from its newest checkpoint, or from the one that is given.

    The result is that of the run without the interruption, bit for bit: on the CPU, and on a GPU
    where the run is `deterministic`.

    Args:
        path: Output folder of the run, or one of its checkpoints. It may have been moved.
        settings: Dotted keys and their new values; only some keys may change.
        console: For the progress line and notes.

    Returns:
        What the run wrote; None where it was finished already, and nothing is written.

    Raises:
        UserError: as `train`; a damaged checkpoint, a key that cannot change, other photos or
            weights than those that were trained on. Nothing is deleted before the run goes on.
        Interrupted: as `train`.
    """
    folder, chosen = find_run(path)
    with Interruption(quiet=console.quiet) as interruption, lock_output(folder.root, console):
        resumption = plan_resume(folder, chosen, settings)
        if resumption is None:
            text = f"{folder.root}: the run is finished; there is nothing to go on with"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            return None
        check_complete(resumption.config)
        with deterministic(resumption.config.deterministic):
            return _run(resumption.config, folder, console, interruption, resumption)


def _run(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    interruption: Interruption,
    resumption: Resumption | None,
) -> RunResult:
    ended = NOTHING_TRAINED if resumption is None else NOT_YET_RESUMED
    with interruption.at_once(ended):
        run = _prepare(config, folder, console, interruption, resumption)
    if resumption is None:
        open_folder(folder, run.config)
    else:
        machine = describe_machine(run.family.device)
        resumption.compare(machine, run.identity.encodings, console)
        resumption.accept(run.config)
    with _resumable(folder):
        run.go()
        with _kept(run), run.shown():
            run.result.files = _save(run)
    if interruption.wanted is not None:
        name = signal_name(interruption.wanted)
        console.print(f"note: {name} came when all was trained; the run is whole", highlight=False)
    return run.result


@contextmanager
def _resumable(folder: RunFolder) -> Iterator[None]:
    """Say of what could not be written inside how the run goes on."""
    try:
        yield
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        saved = find_checkpoints(folder)
        how = f"goes on from {folder.checkpoint(max(saved)).name}" if saved else "starts over"
        raise UserError(
            f"{error}. When it can be, the run {how} with --resume {folder.root}"
        ) from error


@contextmanager
def _kept(run: TrainingRun) -> Iterator[None]:
    """Keep what is trained in a checkpoint where it cannot be saved inside, if that one can be."""
    try:
        yield
    except Exception as error:
        saved = None
        with suppress(UserError):
            saved = run.save_checkpoint()
        told = isinstance(error, UserError) and not isinstance(error.__cause__, OSError)
        if saved is None or not told:
            raise
        raise UserError(
            f"{error}. All is trained, and kept in {saved}; once that is mended, "
            f"--resume {run.result.folder.root} saves it"
        ) from error


def _prepare(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    interruption: Interruption,
    resumption: Resumption | None,
) -> TrainingRun:
    """Load, encode and make the first steps; writes nothing."""
    photos = _find_photos(config, console, resumption)
    start = None if resumption is None else resumption.checkpoint
    result = RunResult(folder, config, 0.0 if start is None else start.manifest.seconds)
    with result.phase("load"):
        config, family, trainables, weights, painter = _load(config, folder, console, start)
    result.config = config
    headline = _headline(config, family, trainables, len(photos))
    console.print(headline, markup=False, soft_wrap=True)
    check_prompts(config, family, photos)
    if config.prior_preservation:
        with result.phase("class images"), interruption.at_once(IMAGES_KEPT):
            recorder = None
            if config.engine.startswith("graph"):
                recorder = CudaRecorder(family.device, [])
            result.class_images = find_class_images(
                config, family, trainables, painter, console, recorder
            )
            del recorder
        if start is not None:
            check_class_images(start.manifest.identity, result.class_images)
        result.note_peak("class images", family.device)
    with result.phase("encode"):
        class_sets = encode_class_sets(config, family, result.class_images)
        buckets, sheet = encode(config, family, photos, console)
        identity = identify(photos, weights, buckets, result.class_images, class_sets)
    result.note_peak("encode", family.device)
    run = TrainingRun(
        config,
        family,
        trainables,
        buckets,
        sheet,
        result,
        console,
        interruption,
        identity,
        start,
        class_sets,
    )
    run.begin()
    return run


def _find_photos(config: RunConfig, console: Console, resumption: Resumption | None) -> list[Photo]:
    """Check what can be checked before anything is loaded; returns the photos."""
    assert config.photos.folder is not None
    check_recipe_fits(config, detect_family(config.model))
    if config.tensorboard:
        check_tensorboard()
    check_libraries(config)
    photos = find_photos(config.photos.folder, config.photos.captions)
    if resumption is not None:
        resumption.describe(console)
        if resumption.checkpoint is not None:
            check_photos(resumption.checkpoint.manifest.identity, photos)
    return photos


def _load(
    config: RunConfig, folder: RunFolder, console: Console, start: Checkpoint | None
) -> tuple[RunConfig, Family, Trainables, str, str]:
    """Load the model and put in what is trained.

    Returns:
        The resolved configuration, both, the fingerprint of the base's weights, and that of the
        weights that draw class images (empty where there are none).
    """
    family = load_family(config.model)
    note = fallback_note(config.engine, family.device)
    if note is not None:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    config = resolve(config, family)
    check_objectives(config, family)
    weights = fingerprint_weights(family, with_text=config.move_text)
    if start is not None:
        check_weights(start.manifest.identity, weights)
    painter = fingerprint_painter(family) if config.prior_preservation else ""
    trainables = build_trainables(config if start is None else without_init(config), family)
    columns = noted_names(config, family)
    assert config.photos.resolution is not None
    sizes = count_weights(family)
    needed = plan_disk(config, sizes, trainables, config.photos.resolution, columns)
    check_disk(needed, folder, config)
    if config.gradient_checkpointing:
        family.checkpoint_blocks()
    prepare_engine(config.engine, config.compile_scope, family)
    return config, family, trainables, weights, painter


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
    captions = config.photos.captions
    photos = {
        "resolution": resolution,
        "folder": config.photos.folder.absolute(),
        "captions": captions.absolute() if captions is not None else None,
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "photos": config.photos.model_copy(update=photos),
            "output": config.output.absolute(),
            "engine": resolve_engine(config.engine, family.device),
            "stage": [
                _resolve_stage(stage, family, f"stage.{index}")
                for index, stage in enumerate(config.stage)
            ],
        }
    )


def _resolve_stage(stage: StageConfig, family: Family, key: str) -> StageConfig:
    prior = stage.objectives.prior_preservation
    if prior is not None:
        prior = resolve_prior(prior, family, f"{key}.objectives.prior_preservation")
        objectives = stage.objectives.model_copy(update={"prior_preservation": prior})
        stage = stage.model_copy(update={"objectives": objectives})
    lora = stage.trainables.lora
    if lora is None or lora.init is None:
        return stage
    lora = lora.model_copy(update={"init": lora.init.absolute()})
    return stage.model_copy(
        update={"trainables": stage.trainables.model_copy(update={"lora": lora})}
    )


def _save(run: TrainingRun) -> list[Path]:
    """Write what people use of a run as its last stage shows it, and return the files.

    The model card comes last, because it says that the run is finished.
    """
    config, family, result, folder = run.config, run.family, run.result, run.result.folder
    photo_counts = {bucket.size: bucket.num_photos for bucket in run.buckets}
    with result.phase("save"):
        files = write_results(folder.root, config, family, run.trainables, photo_counts)
    pictures = [folder.grid(run.total)] if config.samples.enabled else []
    if config.plots:
        from fastppt.outputs.plots import draw_plots

        with result.phase("plots"):
            pictures += draw_plots(folder.metrics, folder.plots, run_name(config))
    num_photos, seconds = sum(photo_counts.values()), result.training_seconds
    with result.phase("save"):
        # Stages may share a set.
        class_images = [*{id(each): each for each in result.class_images.values()}.values()]
        card = model_card(
            config, family, run.trainables, num_photos, seconds, class_images=class_images
        )
        write_file(folder.card, card)
    return [*files, folder.card, *pictures]


def _headline(config: RunConfig, family: Family, trainables: Trainables, num_photos: int) -> str:
    tables = {name: table for name, (_, table) in config.trainables.items()}
    ranks = {name: getattr(table, "rank", None) for name, table in tables.items()}
    moving = ", ".join(f"{name} of rank {rank}" if rank else name for name, rank in ranks.items())
    return (
        f"{config.method}: {num_photos} photos, {config.steps_in_words} steps on "
        f"{config.model.path} "
        f"({family.name}, {family.device}, {str(family.dtype).removeprefix('torch.')}, "
        f"{config.engine}); {moving}: {trainables.num_parameters:,} parameters"
    )
