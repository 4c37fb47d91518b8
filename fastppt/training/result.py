"""What a run wrote, and where its time and memory went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastppt.config import RunConfig
from fastppt.data.class_images import ClassImages
from fastppt.data.prompts import subject_prompt
from fastppt.outputs.folder import RunFolder


@dataclass
class RunResult:
    """What a run wrote and where its time went.

    Attributes:
        folder: The output folder.
        files: The files to use: LoRA in both forms, then the model card and the last grid.
        seconds: Wall-clock time by phase.
        peak_memory: Bytes at most allocated on a GPU at a time, by phase: `class images`, `encode`
            (the first of them with what was loaded for both), `train`, `samples`. Empty on the CPU,
            which does not count.
        config: The resolved configuration.
        earlier_seconds: Time that training took before the run was resumed.
        num_bad_steps: Steps of the whole run that were left out: their loss or gradient was not
            finite.
        class_images: Those of prior preservation, by stage.
    """

    folder: RunFolder
    config: RunConfig
    earlier_seconds: float = 0.0
    num_bad_steps: int = 0
    files: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    class_images: dict[int, ClassImages] = field(default_factory=dict)

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
