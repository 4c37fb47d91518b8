"""The part of a run between encoding and saving: its stages, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.data.buckets import Bucket, bucket_of_draw
from fastppt.data.refresh import ViewRefresh
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.outputs.metrics import Curves, MetricsFile
from fastppt.outputs.results import write_checkpoint_files
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
from fastppt.training.result import RunResult
from fastppt.training.ring import MetricRing
from fastppt.training.runners import make_runner
from fastppt.training.schedule import learning_rate_factor
from fastppt.training.seeds import (
    BUCKET_STREAM,
    CLASS_STREAM,
    STEP_STREAM,
    VIEW_STREAM,
    split_seed,
)
from fastppt.training.stage import build_steps, learning_rates
from fastppt.training.state import place_start, restore_state, run_state
from fastppt.training.step import Step


def steps_with_views(config: RunConfig, num_steps: int) -> int:
    """Return how many of the first steps of a run may draw augmented views."""
    count = 0
    for stage in config.stage:
        here = min(stage.steps, num_steps)
        count += here if stage.objectives.augment else 0
        num_steps -= here
    return count


def new_generator(config: RunConfig, family: Family, stream: int = STEP_STREAM) -> torch.Generator:
    """Return a generator of the run's own on the device, at its start."""
    generator = torch.Generator(family.device)
    generator.manual_seed(split_seed(config.seed, stream))
    return generator


class _StopAskedError(Exception):
    """A signal has come while pictures were drawn."""


@dataclass
class TrainingRun:
    """The part of a run between encoding and saving.

    `class_images` are those of prior preservation, by stage.
    """

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
    class_images: Mapping[int, Bucket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, folder = self.config, self.result.folder
        self.total = sum(stage.steps for stage in config.stage)
        self.first = 0 if self.start is None else self.start.manifest.step
        self.done = self.read = self.first
        self.metrics = MetricsFile(folder.metrics, self.first)
        self.curves: Curves | None = None
        self.steps: list[Step] = []
        names = metric_names(config.stage)
        self.ring = MetricRing(names, min(config.log_every, self.total), self.family.device)
        self.generator = new_generator(config, self.family)
        self.class_generator: torch.Generator | None = None
        if self.class_images:
            self.class_generator = new_generator(config, self.family, CLASS_STREAM)
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
                    self.hand_on()
                    self.build_steps(index)
                self.announce_stage()
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
            if self._checkpoint_due(stage):
                self.save_checkpoint()

    def shown(self) -> AbstractContextManager[None]:
        """Let the model inside be what the stage shows and saves."""
        average = self.steps[0].average
        return nullcontext() if average is None else average.shown()

    def announce_stage(self) -> None:
        """Say which stage begins, or goes on, where there are several."""
        stages = self.config.stage
        left = stages[self.stage].steps - self.number
        if len(stages) > 1 and left:
            text = f"stage.{self.stage}: {', '.join(stages[self.stage].trainables.given)}"
            self.console.print(f"{text}, {left} steps", highlight=False, soft_wrap=True)

    def hand_on(self) -> None:
        """End a stage before the next: what it has learned is what that starts from."""
        average = self.steps[0].average
        if average is not None:
            average.hand_on()
        # The next optimizer's memory is this one's.
        self.steps = []

    def build_steps(self, index: int) -> None:
        """Make the steps of a stage, one a bucket, with the state that they begin with."""
        config, saved, stage = self.config, None, self.config.stage[index]
        self.stage, self.number = index, 0
        if self.start is not None and self.start.manifest.stage == index:
            self.number, saved = self.start.manifest.number, self.start.tensors()
            place_start(saved, self.trainables, learning_rates(stage).keys())
        self.steps = build_steps(
            config,
            stage,
            self.family,
            self.trainables,
            self.buckets,
            self.ring,
            self.generator,
            self.class_images.get(index),
            self.class_generator,
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
                self.write_files,
                self.describe_checkpoint,
            )
            prune_checkpoints(self.result.folder, self.config.keep_checkpoints)
        return folder

    def write_files(self, folder: Path) -> None:
        """Write what a checkpoint has for other programs."""
        with self.shown():
            write_checkpoint_files(folder, self.config, self.family, self.trainables)

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
            try:
                self._draw_grid()
            except _StopAskedError:
                # Only now are the values back that a checkpoint keeps.
                self.stop_if_asked()
            self.result.note_peak("samples", self.family.device)

    def _draw_grid(self) -> None:
        assert self.config.photos.resolution is not None
        with self.result.phase("samples"):
            sheet, samples = self.sheet, self.config.samples
            # A few pictures do not repay the compilation of the blocks for inference.
            with self.shown(), torch.compiler.set_stance("force_eager"):
                prompts, negative = sheet.encode()
                images = draw_samples(
                    self.family,
                    prompts,
                    negative,
                    samples,
                    self.config.photos.resolution,
                    self._leave_if_asked,
                )
            write_grid(self.result.folder.grid(self.done), images, sheet.captions)

    def _leave_if_asked(self) -> None:
        if self.interruption.wanted is not None:
            raise _StopAskedError

    def _checkpoint_due(self, stage: StageConfig) -> bool:
        """Say whether the run's checkpoints, or the stage's own, are due."""
        run_every, stage_every = self.config.checkpoint_every, stage.checkpoint_every
        at_end = self.done == self.total
        of_run = run_every > 0 and (at_end or self.done % run_every == 0)
        return of_run or (stage_every > 0 and (at_end or self.number % stage_every == 0))

    def _due(self, every: int) -> bool:
        """Say whether something is due that comes each so many steps, and at the end."""
        return self.done == self.total or (every > 0 and self.done % every == 0)
