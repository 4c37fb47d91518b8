"""The part of a run between encoding and saving: its stages, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.data.buckets import Bucket, bucket_of_draw
from fastppt.data.prompts import subject_prompt
from fastppt.data.refresh import ViewRefresh
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.outputs.folder import RunFolder
from fastppt.outputs.lora_files import write_diffusers_files
from fastppt.outputs.metrics import Curves, MetricsFile
from fastppt.outputs.samples import draw_samples, write_grid
from fastppt.stage_config import StageConfig
from fastppt.trainables.trainables import Trainables
from fastppt.training.checkpoint import (
    Checkpoint,
    FileEntry,
    Identity,
    Manifest,
    find_checkpoints,
    prune_checkpoints,
    write_checkpoint,
)
from fastppt.training.compiling import check_gradients
from fastppt.training.encoding import SampleSheet
from fastppt.training.engine import compiles
from fastppt.training.guard import NonFiniteGuard
from fastppt.training.identity import describe_machine
from fastppt.training.interrupt import (
    NO_STEP,
    NOTHING_TRAINED,
    Interrupted,
    Interruption,
    signal_name,
)
from fastppt.training.metric_names import metric_names
from fastppt.training.progress import ProgressLine
from fastppt.training.ring import MetricRing
from fastppt.training.runners import make_runner
from fastppt.training.schedule import learning_rate_factor
from fastppt.training.seeds import BUCKET_STREAM, STEP_STREAM, VIEW_STREAM, split_seed
from fastppt.training.stage import build_steps, learning_rates
from fastppt.training.state import place_anchors, restore_state, run_state


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
        earlier_seconds: Time that training took before the run was resumed.
        num_bad_steps: Steps of the whole run that were left out: their loss or gradient was not
            finite.
    """

    folder: RunFolder
    config: RunConfig
    earlier_seconds: float = 0.0
    num_bad_steps: int = 0
    files: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)

    @property
    def trigger_prompt(self) -> str:
        """A prompt that shows the subject."""
        return subject_prompt(self.config.prompts)

    @property
    def training_seconds(self) -> float:
        """Time that training took, with what came before the run was resumed."""
        # What compiles does so in the first step; a capture takes the place of that.
        phases = ("check", "capture", "first step", "train")
        return self.earlier_seconds + sum(self.seconds.get(phase, 0.0) for phase in phases)

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


def steps_with_views(config: RunConfig, num_steps: int) -> int:
    """Return how many of the first steps of a run may draw augmented views."""
    count = 0
    for stage in config.stage:
        here = min(stage.steps, num_steps)
        count += here if stage.objectives.augment else 0
        num_steps -= here
    return count


def new_generator(config: RunConfig, family: Family) -> torch.Generator:
    """Return the run's own generator on the device, at its start."""
    generator = torch.Generator(family.device)
    generator.manual_seed(split_seed(config.seed, STEP_STREAM))
    return generator


@dataclass
class TrainingRun:
    """The part of a run between encoding and saving."""

    config: RunConfig
    family: Family
    trainables: Trainables
    buckets: list[Bucket]
    sheet: SampleSheet
    result: RunResult
    console: Console
    interruption: Interruption
    identity: Identity
    start: Checkpoint | None = None

    def __post_init__(self) -> None:
        config, folder = self.config, self.result.folder
        self.total = sum(stage.steps for stage in config.stage)
        self.first = 0 if self.start is None else self.start.manifest.step
        self.done = self.read = self.first
        self.metrics = MetricsFile(folder.metrics, self.first)
        self.curves: Curves | None = None
        names = metric_names(config.stage)
        self.ring = MetricRing(names, min(config.log_every, self.total), self.family.device)
        self.generator = new_generator(config, self.family)
        self.line = ProgressLine(self.console, self.total)
        photos = [numbered for bucket in self.buckets for numbered in bucket.photos.items()]
        photo_names = {number: photo.path.name for number, photo in photos}
        self.guard = NonFiniteGuard(config.max_bad_steps, photo_names)
        self.guard.take_up(self.metrics.rows())
        self.refresh = self.make_refresh()

    def make_refresh(self) -> ViewRefresh | None:
        """Return what draws augmented views anew during training; None where nothing does."""
        config = self.config
        if config.photos.refresh_every == 0:
            return None
        num_steps = steps_with_views(config, self.total)
        seed = split_seed(config.seed, VIEW_STREAM)
        with self.result.phase("encode"):
            refresh = ViewRefresh(self.family, config.photos, seed, self.buckets, num_steps)
            refresh.start_at(steps_with_views(config, self.first))
            return refresh

    def begin(self) -> None:
        """Make the first steps, with the state that they go on from. Writes nothing to disk."""
        self.build_steps(0 if self.start is None else self.start.manifest.stage)

    def go(self) -> None:
        """Train all stages, with pictures before, between and after."""
        folder = self.result.folder
        if self.config.tensorboard:
            self.curves = Curves(folder.tensorboard, self.first)
        if len(self.metrics) < self.first:
            text = f"note: {folder.metrics} lacks rows of the first {self.first} steps"
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        due = self.done == 0 or self._due(self.config.sample_every)
        if due and not folder.grid(self.done).exists():
            self.draw_grid()
        with self.line:
            for index in range(self.stage, len(self.config.stage)):
                if index != self.stage:
                    self.build_steps(index)
                self.run_stage(index, self.config.stage[index])
        # Those that a kill has left beside the last one.
        prune_checkpoints(folder, self.config.keep_checkpoints)
        self.metrics.write()
        self.result.num_bad_steps = self.guard.num_bad
        if self.curves is not None:
            self.curves.close()

    def run_stage(self, index: int, stage: StageConfig) -> None:
        """Train one stage, whose steps are there, from where it stands."""
        if self.number == stage.steps:
            return
        config, base_rates, steps = self.config, learning_rates(stage), self.steps
        runner = make_runner(config.engine, steps)
        if compiles(config.engine) and config.compile_scope == "network":
            with self.result.phase("check"):
                check_gradients(steps, self.trainables)
        for number in range(self.number, stage.steps):
            self.stop_if_asked()
            bucket = self.pick_bucket()
            if not runner.is_ready(bucket, number):
                with self.result.phase("capture"):
                    runner.prepare(bucket, number)
            with self.result.phase("train" if self.done > self.first else "first step"):
                if self.refresh is not None and stage.objectives.augment:
                    self.refresh.before_step()
                factor = learning_rate_factor(stage, number)
                for name, rate in steps[bucket].learning_rates.items():
                    rate.fill_(base_rates[name] * factor)
                runner.run(bucket, number)
                self.done += 1
                self.number += 1
                self.look(index, last=number == stage.steps - 1)
                if self.done == self.first + 1 or self._due(config.sample_every):
                    self.finish_steps()
            if self.guard.wants_stop:
                raise UserError(self.guard.stop_message(self.save_checkpoint()))
            if self._due(config.sample_every):
                self.draw_grid()
            if config.checkpoint_every > 0 and self._due(config.checkpoint_every):
                self.save_checkpoint()

    def build_steps(self, index: int) -> None:
        """Make the steps of a stage, one a bucket, with the state that they begin with."""
        config, saved = self.config, None
        self.stage, self.number = index, 0
        if self.start is not None and self.start.manifest.stage == index:
            self.number, saved = self.start.manifest.number, self.start.tensors()
            place_anchors(saved, self.trainables)
        self.steps = build_steps(
            config,
            config.stage[index],
            self.family,
            self.trainables,
            self.buckets,
            self.ring,
            self.generator,
        )
        if saved is not None:
            restore_state(self.steps[0], self.trainables, saved, self.done)

    def stop_if_asked(self) -> None:
        """End the run between two steps, or two pictures, where a signal has asked for it.

        Raises:
            Interrupted: what was trained is in a checkpoint.
        """
        signum = self.interruption.wanted
        if signum is None:
            return
        if self.done > self.first:
            saved = self.save_checkpoint()
            ended = f"ended after step {self.done} of {self.total}, saved in {saved}"
        else:
            ended = NOTHING_TRAINED if self.done == 0 else NO_STEP
        message = f"{signal_name(signum)}: {ended}"
        raise Interrupted(signum, message, self.result.folder.root)

    def save_checkpoint(self) -> Path:
        """Save all that the run goes on from, between two steps; returns the checkpoint's folder.

        Metrics are brought up to date first. Nothing is written where the checkpoint of this very
        step is there already.

        Raises:
            UserError: it cannot be written.
        """
        folder = self.result.folder.checkpoint(self.done)
        if folder in find_checkpoints(self.result.folder).values():
            return folder
        self.finish_steps()
        self.read_all(self.stage)
        self.metrics.write()
        if self.curves is not None:
            self.curves.flush()
        with self.result.phase("save"):
            write_checkpoint(
                folder,
                run_state(self.steps[0]),
                lambda aside: write_diffusers_files(
                    aside, self.config, self.family, self.trainables
                ),
                self.describe_checkpoint,
            )
            prune_checkpoints(self.result.folder, self.config.keep_checkpoints)
        return folder

    def describe_checkpoint(self, files: dict[str, FileEntry]) -> Manifest:
        """Return the manifest of a checkpoint of this moment."""
        return Manifest(
            step=self.done,
            stage=self.stage,
            number=self.number,
            seconds=self.result.training_seconds,
            config=self.config.model_dump(mode="json"),
            identity=self.identity,
            machine=describe_machine(self.family.device),
            files=files,
        )

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
        if last:
            self.read_all(stage_index)
        elif self.done % self.config.log_every == 0:
            self.report(stage_index)
            self.ring.start_read(self.read, self.done)
            self.read = self.done
        if self.ring.is_ready():
            self.report(stage_index)

    def read_all(self, stage_index: int) -> None:
        """Read what is in the ring, and wait for it."""
        self.report(stage_index)
        if self.read < self.done:
            self.ring.start_read(self.read, self.done)
            self.read = self.done
            self.report(stage_index)

    def report(self, stage_index: int) -> None:
        """Show and store what has been read."""
        rows = [
            {"stage": stage_index, **self.guard.describe(row, self.ring.samples_of)}
            for row in self.ring.finish_read()
        ]
        if not rows:
            return
        note = self.guard.note(self.guard.count(rows))
        if note is not None:
            self.console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        self.metrics.append(rows)
        if self.curves is not None:
            self.curves.append(rows)
        losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
        loss = sum(losses) / len(losses) if losses else math.nan
        seconds = self.result.seconds.get("train", 0.0)
        # The first step is apart, and the one that is being looked at is not over.
        rate = (self.done - self.first - 2) / seconds if seconds else None
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
            prompts, negative = sheet.encode()
            # A few pictures do not repay the compilation of the blocks for inference.
            with torch.compiler.set_stance("force_eager"):
                images = draw_samples(
                    self.family,
                    prompts,
                    negative,
                    samples,
                    self.config.photos.resolution,
                    self.stop_if_asked,
                )
            write_grid(self.result.folder.grid(self.done), images, sheet.captions)

    def _due(self, every: int) -> bool:
        """Say whether something is due that comes each so many steps, and at the end."""
        return self.done == self.total or (every > 0 and self.done % every == 0)
