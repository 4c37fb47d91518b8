"""A whole run: check, load, encode once, train stage by stage, save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from fastppt.config import RunConfig, StageConfig, TrainablesConfig
from fastppt.config_io import check_complete, check_recipe_fits
from fastppt.data.buckets import Bucket, bucket_of_draw
from fastppt.data.photos import find_photos
from fastppt.data.prompts import subject_prompt
from fastppt.data.refresh import ViewRefresh
from fastppt.errors import UserError
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
from fastppt.outputs.lora_files import read_lora_file, write_lora_files
from fastppt.outputs.metrics import Curves, MetricsFile, check_tensorboard
from fastppt.outputs.model_card import model_card
from fastppt.outputs.samples import draw_samples, write_grid
from fastppt.trainables.lora import LoraAdapters
from fastppt.training.checkpoint import save_checkpoint
from fastppt.training.compiling import check_gradients
from fastppt.training.encoding import SampleSheet, encode
from fastppt.training.engine import compiles, fallback_note, prepare_engine, resolve_engine
from fastppt.training.progress import ProgressLine
from fastppt.training.ring import MetricRing
from fastppt.training.runners import make_runner
from fastppt.training.schedule import learning_rate_factor
from fastppt.training.seeds import (
    ADAPTER_STREAM,
    BUCKET_STREAM,
    STEP_STREAM,
    VIEW_STREAM,
    split_seed,
)
from fastppt.training.stage import build_steps, layers_to_align
from fastppt.training.step import metric_names


@dataclass
class RunResult:
    """What a run wrote and where its time went.

    Attributes:
        folder: The output folder.
        files: The files to use: LoRA in both forms, then the model card and the last grid.
        seconds: Wall-clock time by phase.
        peak_memory: Bytes at most allocated on a GPU at a time, by phase: `encode` (with what was
            loaded for it), `train`, `samples`. Empty on the CPU, which does not count.
        config: The resolved configuration.
    """

    folder: RunFolder
    config: RunConfig
    files: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)

    @property
    def trigger_prompt(self) -> str:
        """A prompt that shows the subject."""
        return subject_prompt(self.config.prompts)

    def note_peak(self, phase: str, device: torch.device) -> None:
        """Note the most memory that a GPU has had allocated since this was called last."""
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            self.peak_memory[phase] = max(self.peak_memory.get(phase, 0), peak)
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


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
        adapters = build_adapters(config, family)
        for index, stage in enumerate(config.stage):
            layers_to_align(family, stage.objectives, f"stage.{index}.objectives")
        if config.gradient_checkpointing:
            family.checkpoint_blocks()
        prepare_engine(config.engine, config.compile_scope, family)
    if note is not None:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    headline = _headline(config, family, adapters, len(photos))
    console.print(headline, markup=False, soft_wrap=True)
    with result.phase("encode"):
        buckets, sheet = encode(config, family, photos, console)
    result.note_peak("encode", family.device)
    open_folder(folder, config)
    _Run(config, family, adapters, buckets, sheet, result, console).go()
    photo_counts = {bucket.size: bucket.num_photos for bucket in buckets}
    result.files = save(folder, config, family, adapters, result, photo_counts)
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
    return stage.model_copy(update={"trainables": TrainablesConfig(lora=lora)})


def build_adapters(
    config: RunConfig, family: Family, dtype: torch.dtype = torch.float32
) -> LoraAdapters:
    """Put new adapters into the network, or those of ``lora.init``.

    Raises:
        UserError: a target matches nothing, or the file does not fit.
    """
    lora = config.stage[0].trainables.lora
    assert lora is not None
    weights = read_lora_file(lora.init, family) if lora.init is not None else None
    if lora.targets == "up":
        lora = lora.model_copy(update={"targets": list(family.second_half)})
    seed = split_seed(config.seed, ADAPTER_STREAM)
    adapters = LoraAdapters(
        family.make_adaptable(), lora, seed=seed, device=family.device, dtype=dtype
    )
    if weights is not None:
        try:
            adapters.load(weights)
        except UserError as error:
            raise UserError(f"LoRA {lora.init}: {error}") from None
    return adapters


def new_generator(config: RunConfig, family: Family) -> torch.Generator:
    """Return the run's own generator on the device, at its start."""
    generator = torch.Generator(family.device)
    generator.manual_seed(split_seed(config.seed, STEP_STREAM))
    return generator


@dataclass
class _Run:
    """The part of a run between encoding and saving."""

    config: RunConfig
    family: Family
    adapters: LoraAdapters
    buckets: list[Bucket]
    sheet: SampleSheet
    result: RunResult
    console: Console

    def __post_init__(self) -> None:
        config, folder = self.config, self.result.folder
        self.total = sum(stage.steps for stage in config.stage)
        self.metrics = MetricsFile(folder.metrics)
        self.curves = Curves(folder.tensorboard) if config.tensorboard else None
        names = metric_names(config.stage)
        self.ring = MetricRing(names, min(config.log_every, self.total), self.family.device)
        self.generator = new_generator(config, self.family)
        self.line = ProgressLine(self.console, self.total)
        self.refresh = self.make_refresh()
        self.done, self.read = 0, 0

    def make_refresh(self) -> ViewRefresh | None:
        """Return what draws augmented views anew during training; None where nothing does."""
        config = self.config
        if config.photos.refresh_every == 0:
            return None
        num_steps = sum(stage.steps for stage in config.stage if stage.objectives.augment)
        seed = split_seed(config.seed, VIEW_STREAM)
        with self.result.phase("encode"):
            return ViewRefresh(self.family, config.photos, seed, self.buckets, num_steps)

    def go(self) -> None:
        """Train all stages, with pictures before, between and after."""
        self.draw_grid()
        with self.line:
            for index, stage in enumerate(self.config.stage):
                self.run_stage(index, stage)
        self.metrics.write()
        if self.curves is not None:
            self.curves.close()

    def run_stage(self, index: int, stage: StageConfig) -> None:
        """Train one stage from where the last one ended."""
        assert stage.trainables.lora is not None
        config, base_rate = self.config, stage.trainables.lora.learning_rate
        steps = build_steps(
            config, stage, self.family, self.adapters, self.buckets, self.ring, self.generator
        )
        runner = make_runner(config.engine, steps)
        if compiles(config.engine) and config.compile_scope == "network":
            with self.result.phase("check"):
                check_gradients(steps, self.adapters)
        for number in range(stage.steps):
            bucket = self.pick_bucket()
            if not runner.is_ready(bucket, number):
                with self.result.phase("capture"):
                    runner.prepare(bucket, number)
            with self.result.phase("train" if self.done else "first step"):
                if self.refresh is not None and stage.objectives.augment:
                    self.refresh.before_step()
                rate = base_rate * learning_rate_factor(stage, number)
                steps[bucket].learning_rate.fill_(rate)
                runner.run(bucket, number)
                self.done += 1
                self.look(index, last=number == stage.steps - 1)
                if self.done == 1 or self._due(config.sample_every, config.checkpoint_every):
                    self.finish_steps()
            if self._due(config.sample_every):
                self.draw_grid()
            if self._due(config.checkpoint_every):
                with self.result.phase("save"):
                    folder = self.result.folder.checkpoint(self.done)
                    save_checkpoint(folder, self.family, self.adapters, self.config.save_dtype)

    def pick_bucket(self) -> int:
        """Return the bucket of the next step: of seed and step number alone, so on the host."""
        if len(self.buckets) == 1:
            return 0
        draw = split_seed(split_seed(self.config.seed, BUCKET_STREAM), self.done)
        return bucket_of_draw(draw, [bucket.num_photos for bucket in self.buckets])

    def finish_steps(self) -> None:
        """Wait for the steps that are under way, and note the most memory that they took."""
        device = self.family.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.result.note_peak("train", device)

    def look(self, stage_index: int, last: bool) -> None:
        """Read the ring when it is full or the stage ends; the copy is awaited one look later."""
        if self.done % self.config.log_every == 0 or last:
            self.report(stage_index)
            self.ring.start_read(self.read, self.done)
            self.read = self.done
        if last or self.ring.is_ready():
            self.report(stage_index)

    def report(self, stage_index: int) -> None:
        """Show and store what has been read."""
        rows = [{"stage": stage_index, **row} for row in self.ring.finish_read()]
        if not rows:
            return
        self.metrics.append(rows)
        if self.curves is not None:
            self.curves.append(rows)
        loss = sum(row["loss"] for row in rows) / len(rows)
        seconds = self.result.seconds.get("train", 0.0)
        # The first step is apart, and the one that is being looked at is not over.
        rate = (self.done - 2) / seconds if seconds else None
        self.line.update(int(rows[-1]["step"]), loss, rows[-1]["anchor"], rate)

    def draw_grid(self) -> None:
        """Draw the sample grid as the network is now."""
        if self.config.samples.enabled:
            self._draw_grid()
            self.result.note_peak("samples", self.family.device)

    def _draw_grid(self) -> None:
        assert self.config.photos.resolution is not None
        with self.result.phase("samples"):
            sheet, samples = self.sheet, self.config.samples
            # A few pictures do not repay the compilation of the blocks for inference.
            with torch.compiler.set_stance("force_eager"):
                images = draw_samples(
                    self.family,
                    sheet.prompts,
                    sheet.negative,
                    samples,
                    self.config.photos.resolution,
                )
            write_grid(self.result.folder.grid(self.done), images, sheet.captions)

    def _due(self, *every: int) -> bool:
        """Say whether one of several things is due: each so many steps, and all at the end."""
        ends = self.done == self.total
        return ends or any(number > 0 and self.done % number == 0 for number in every)


def save(
    folder: RunFolder,
    config: RunConfig,
    family: Family,
    adapters: LoraAdapters,
    result: RunResult,
    photo_counts: dict[tuple[int, int], int],
) -> list[Path]:
    """Write the LoRA files and the model card; returns the files to use."""
    num_photos = sum(photo_counts.values())
    with result.phase("save"):
        files = write_lora_files(folder.root, config, family, adapters, photo_counts)
        # What compiles does so in the first step; a capture takes the place of that.
        phases = ("check", "capture", "first step", "train")
        seconds = sum(result.seconds.get(phase, 0.0) for phase in phases)
        write_file(folder.card, model_card(config, family, adapters, num_photos, seconds))
    grids = [folder.grid(sum(stage.steps for stage in config.stage))]
    return [*files, folder.card, *(grids if config.samples.enabled else [])]


def _headline(config: RunConfig, family: Family, adapters: LoraAdapters, num_photos: int) -> str:
    steps = sum(stage.steps for stage in config.stage)
    return (
        f"{config.method}: {num_photos} photos, {steps} steps on {config.model.path} "
        f"({family.name}, {family.device}, {str(family.dtype).removeprefix('torch.')}, "
        f"{config.engine}); rank {adapters.rank}, {adapters.num_parameters:,} parameters"
    )
