"""Where the time of one job goes: its phases, its steps, its batches of class images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.interleave import summarise
from bench.race_energy import EnergyMeter
from bench.race_plan import SAMPLING_BATCH, Job
from bench.race_results import MemoryKind, Phase, Round, StepTimes
from fastppt.outputs.image_cache import ImageCache
from fastppt.training import encoding
from fastppt.training.result import RunResult

# What our trainer calls them. A capture, and the check of what was compiled, come before a first
# step of their own kind, and nothing else waits for them.
PHASE_OF: dict[str, Phase] = {
    "load": "load",
    "class images": "class_images",
    "encode": "encode",
    "check": "first_step",
    "capture": "first_step",
    "first step": "first_step",
    "train": "training",
    "save": "save",
}
STEPS = ("first step", "train")
STATUS = Path("/proc/self/status")


class Watch:
    """The stopwatch of one job.

    Args:
        device: "cpu" or "cuda".
        meter: Of the GPU's energy, if there is one.
    """

    def __init__(self, device: str, meter: EnergyMeter | None = None) -> None:
        self.device, self._meter = device, meter
        self.seconds: dict[Phase, float] = {}
        self.joules: dict[Phase, float] = {}
        self.class_encoding_s = 0.0
        self._steps: list[Any] = []
        self._batches: list[float] = []
        self._inside = False
        self._current: Phase = "other"
        self._read = None if meter is None else meter.read()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time spent inside to a phase. Phases do not overlap."""
        assert not self._inside, f"{name} inside of {self._current}"
        self._go_on(name)
        self._inside, started = True, time.perf_counter()
        try:
            yield
        finally:
            self._inside = False
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @contextmanager
    def class_encoding(self) -> Iterator[None]:
        """Note how long class images are encoded: that grows with their number."""
        self.finish()
        started = time.perf_counter()
        yield
        self.finish()
        self.class_encoding_s += time.perf_counter() - started

    def mark_step(self) -> None:
        """Note the end of a training step; on a GPU that of its work there, which nobody awaits."""
        if self.device == "cpu":
            self._steps.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._steps.append(event)

    def mark_batch(self) -> None:
        """Note the end of a batch of class images, written to disk."""
        self._batches.append(time.perf_counter())

    def finish(self) -> None:
        """Wait for what is under way on the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def close(self, wall_s: float) -> None:
        """End the job, which took so long: what was none of its phases is `other`."""
        self._go_on("other")
        self.seconds["other"] = max(0.0, wall_s - sum(self.seconds.values()))

    def step_times(self) -> StepTimes | None:
        """Return the percentiles of the steps after the first; None for fewer than two of them."""
        if self.device == "cpu":
            return _percentiles([end - start for start, end in pairwise(self._steps)])
        pairs = pairwise(self._steps)
        return _percentiles([1e-3 * start.elapsed_time(end) for start, end in pairs])

    def batch_times(self) -> StepTimes | None:
        """Return those of the batches of class images, likewise."""
        return _percentiles([end - start for start, end in pairwise(self._batches)])

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    @property
    def num_batches(self) -> int:
        """Batches of class images that were sampled, none where they were found."""
        return len(self._batches)

    @property
    def last_batch_s(self) -> float:
        """Seconds of the last batch of class images; there were at least two."""
        return self._batches[-1] - self._batches[-2]

    def _go_on(self, name: Phase) -> None:
        """Go on to another phase; between two, what is taken is the earlier one's."""
        if name == self._current:
            return
        if self._meter is not None:
            before, self._read = self._read, self._meter.read()
            assert before is not None
            taken = self._read - before
            self.joules[self._current] = self.joules.get(self._current, 0.0) + taken
        self._current = name


def _percentiles(times: Sequence[float]) -> StepTimes | None:
    if len(times) < 2:
        return None
    found = summarise(times)
    return StepTimes(p20=found.p20, p50=found.p50, p80=found.p80)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Watch a run of our trainer from inside its process, which has no hooks for that."""
    phase, write = RunResult.phase, ImageCache.write
    encode_class_images = encoding.encode_class_images

    @contextmanager
    def timed_phase(result: RunResult, name: str) -> Iterator[None]:
        with watch.phase(PHASE_OF[name]), phase(result, name):
            yield
        if name in STEPS:
            watch.mark_step()

    def marked(write: Callable[..., Any]) -> Callable[..., Any]:
        def write_and_mark(*args: Any) -> Any:
            written = write(*args)
            watch.mark_batch()
            return written

        return write_and_mark

    def timed_encoding(*args: Any, **options: Any) -> Any:
        with watch.class_encoding():
            return encode_class_images(*args, **options)

    with (
        patch.object(RunResult, "phase", timed_phase),
        patch.object(ImageCache, "write", marked(write)),
        patch.object(encoding, "encode_class_images", timed_encoding),
    ):
        yield


def make_round(
    job: Job,
    watch: Watch,
    *,
    start_s: float,
    peak: tuple[int, MemoryKind] | None,
) -> Round:
    """Return what a job took; what was done in part is extrapolated, and said to be.

    Class images: what was measured, and as many of the last batch's time as are left; their
    encoding in proportion. Training: the steps after the first in proportion.
    """
    seconds, joules = dict(watch.seconds), dict(watch.joules)
    extrapolated = {**_more_images(job, watch), **_more_steps(job, watch)}
    for name, more in extrapolated.items():
        if name in joules and seconds[name]:
            joules[name] *= 1 + more / seconds[name]
        seconds[name] += more
    return Round(
        start_s=start_s,
        phases=seconds,
        steps=job.settings.steps,
        step_s=watch.step_times(),
        batch_s=watch.batch_times(),
        peak_memory_bytes=None if peak is None else peak[0],
        memory_kind=None if peak is None else peak[1],
        energy_joules=joules or None,
        extrapolated=list(extrapolated),
    )


def _more_images(job: Job, watch: Watch) -> dict[Phase, float]:
    """Return the seconds of class images that were left out, by phase."""
    wanted, sampled = job.settings.class_images, job.sampled_images
    if not job.entrant.prior or sampled == wanted:
        return {}
    more: dict[Phase, float] = {}
    if watch.num_batches:
        left = math.ceil(wanted / SAMPLING_BATCH) - watch.num_batches
        more["class_images"] = left * watch.last_batch_s
    if watch.class_encoding_s:
        more["encode"] = watch.class_encoding_s * (wanted - sampled) / sampled
    return more


def _more_steps(job: Job, watch: Watch) -> dict[Phase, float]:
    """Return the seconds of the steps that were left out."""
    wanted, trained = job.settings.steps, job.trained_steps
    if trained == wanted:
        return {}
    return {"training": watch.seconds["training"] * (wanted - trained) / (trained - 1)}


def peak_memory(device: str, noted: int = 0) -> tuple[int, MemoryKind] | None:
    """Return the most memory of this process, and what that is of; None where nobody counts it.

    Args:
        device: "cuda": bytes that torch had allocated there. "cpu": resident ones.
        noted: A peak before torch's count began anew.
    """
    if device == "cuda":
        return max(noted, torch.cuda.max_memory_allocated()), "allocated"
    if not STATUS.exists():
        return None
    # Not getrusage: what it says may be of the parent, before this process became another program.
    lines = STATUS.read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(kilobytes), "resident"
