"""The part of a run between encoding and saving: its stages, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from fastppt.config import RunConfig, StageConfig
from fastppt.data.buckets import Bucket, bucket_of_draw
from fastppt.data.prompts import subject_prompt
from fastppt.data.refresh import ViewRefresh
from fastppt.families.base import Family
from fastppt.outputs.folder import RunFolder
from fastppt.outputs.metrics import Curves, MetricsFile
from fastppt.outputs.samples import draw_samples, write_grid
from fastppt.trainables.trainables import Trainables
from fastppt.training.checkpoint import save_checkpoint
from fastppt.training.compiling import check_gradients
from fastppt.training.encoding import SampleSheet
from fastppt.training.engine import compiles
from fastppt.training.progress import ProgressLine
from fastppt.training.ring import MetricRing
from fastppt.training.runners import make_runner
from fastppt.training.schedule import learning_rate_factor
from fastppt.training.seeds import BUCKET_STREAM, STEP_STREAM, VIEW_STREAM, split_seed
from fastppt.training.stage import build_steps, learning_rates
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
        config, base_rates = self.config, learning_rates(stage)
        steps = build_steps(
            config, stage, self.family, self.trainables, self.buckets, self.ring, self.generator
        )
        runner = make_runner(config.engine, steps)
        if compiles(config.engine) and config.compile_scope == "network":
            with self.result.phase("check"):
                check_gradients(steps, self.trainables.lora)
        for number in range(stage.steps):
            bucket = self.pick_bucket()
            if not runner.is_ready(bucket, number):
                with self.result.phase("capture"):
                    runner.prepare(bucket, number)
            with self.result.phase("train" if self.done else "first step"):
                if self.refresh is not None and stage.objectives.augment:
                    self.refresh.before_step()
                factor = learning_rate_factor(stage, number)
                for name, rate in steps[bucket].learning_rates.items():
                    rate.fill_(base_rates[name] * factor)
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
                    save_checkpoint(
                        folder, self.family, self.trainables.lora, self.config.save_dtype
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
