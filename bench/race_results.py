"""What a race measured, as a file holds it: entrants, their rounds, and the ratios between them.

A race trains one subject several times, each time by another way (an entrant), from the first file
read to the last file written, and times the phases of that job apart. `python -m bench.race`
writes such a file, `bench.peers` adds what other trainers took, `bench.report` shows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from bench.rows import write_report

# In the order of a job. `other` is what is none of the rest: looking for photos, the model card,
# the output folder; with it the phases add up to the job's wall clock.
PHASES = ("load", "class_images", "encode", "first_step", "training", "save", "other")
Phase = Literal["load", "class_images", "encode", "first_step", "training", "save", "other"]

# What a ratio is of: the job, the job with its class images on disk already, one training step.
TOTAL, CACHED, STEP = "total", "class images cached", "step"
What = Literal["total", "class images cached", "step"]
WHATS: tuple[What, ...] = ("total", "class images cached", "step")

# "ours": a recipe of fastppt. "diffusers": its scripts' job re-enacted (`bench.race_peer`).
# "external": another trainer's own command (`bench.peers`).
Kind = Literal["ours", "diffusers", "external"]

# What the peak is of: bytes that torch had allocated on the GPU; the GPU memory of the process and
# its children, as the driver counts; their resident memory on the host.
MemoryKind = Literal["allocated", "device", "resident"]

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Record(BaseModel):
    """A part of the file. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RaceSettings(Record):
    """What every entrant of a race was given alike."""

    model: str
    """Its name or folder."""
    family: Literal["sd", "sdxl", "sd3"]
    resolution: Annotated[int, Field(gt=0)]
    """Width and height of the pictures trained on and sampled, in pixels."""
    batch_size: Annotated[int, Field(gt=0)]
    """Photos in a step; prior preservation adds as many class images."""
    precision: str
    """Of the network: `float32`, `bfloat16` or `float16`."""
    rank: Annotated[int, Field(gt=0)]
    """Of every LoRA."""
    steps: Annotated[int, Field(gt=0)]
    """Training steps, by all stages of a recipe together."""
    class_images: Annotated[int, Field(gt=0)]
    """How many pictures prior preservation samples: K."""
    sampler_steps: Annotated[int, Field(gt=0)]
    """Sampler steps of each of them: S."""
    guidance_scale: float
    """Of classifier-free guidance at sampling them."""
    num_photos: Annotated[int, Field(gt=0)]
    seed: int
    rounds: Annotated[int, Field(gt=0)]
    """How often each entrant ran."""
    sampling_rounds: Annotated[int, Field(gt=0)] | None = None
    """In how many of them class images were sampled; the later ones found those on disk and are
    given the last time that it took. None: in all of them."""
    threads: Annotated[int, Field(gt=0)]
    """CPU threads of each entrant."""


class StepTimes(Record):
    """Seconds of one step (or batch), the first left out: percentiles over those of a round."""

    p20: Seconds
    p50: Positive
    p80: Seconds


def _in_order(phases: dict[Phase, float]) -> dict[Phase, float]:
    return {name: phases[name] for name in PHASES if name in phases}


class Round(Record):
    """One whole job of one entrant, in a process of its own."""

    start_s: Seconds | None = None
    """From the start of the process to the start of the job: the interpreter and the imports. In
    no total, for it is the same for all. None where it cannot be told apart; it is in `other`."""
    phases: Annotated[dict[Phase, Seconds], AfterValidator(_in_order)]
    """Seconds by phase; a phase that the job does not have is left out."""
    steps: Annotated[int, Field(gt=0)]
    """Training steps in `first_step` and `training` together."""
    step_s: StepTimes | None = None
    """Of training. None where the steps were not timed one by one (nor in groups)."""
    batch_s: StepTimes | None = None
    """Of class images, from batch to batch. None where they were not timed so, or found."""
    peak_memory_bytes: Annotated[int, Field(gt=0)] | None = None
    memory_kind: MemoryKind | None = None
    """What the peak is of; None without one."""
    energy_joules: dict[Phase, Seconds] | None = None
    """Of the GPU, by phase, as NVML counts; None where it does not."""
    extrapolated: list[Phase] = []
    """Phases that were measured on a part of the work and multiplied by what remains."""
    taken_from: dict[Phase, str] = {}
    """Phases that another entrant did in the very same way, by its name, and whose seconds and
    joules are those: two forms of one job share its class images. Its own name where they are of an
    earlier round (`sampling_rounds`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "training" not in self.phases:
            raise ValueError("phases.training is missing: a race times training")
        if (self.peak_memory_bytes is None) != (self.memory_kind is None):
            raise ValueError("peak_memory_bytes and memory_kind go together")
        unknown = {*self.extrapolated, *self.taken_from} - set(self.phases)
        if unknown:
            raise ValueError(
                f"no phase {sorted(unknown)[0]!r}, which is said to be extrapolated, or taken over"
            )
        return self

    def seconds(self, what: What) -> float | None:
        """Return the seconds of the job, of it without its class images, or of one step.

        None for a step that was not timed. The job with its class images cached is the job less
        that phase: what reading them takes is in `encode`.
        """
        if what == STEP:
            return None if self.step_s is None else self.step_s.p50
        total = sum(self.phases.values())
        return total if what == TOTAL else total - self.phases.get("class_images", 0.0)

    def reach(self, what: What) -> tuple[float, float] | None:
        """Return from where to where `seconds` reaches, as far as one round can tell.

        That is, had all steps and all batches of class images taken as long as the 20th percentile
        of them, and as the 80th, instead of the median. None where they were not timed.
        """
        found, step_s = self.seconds(what), self.step_s
        if found is None or step_s is None:
            return None
        if what == STEP:
            return step_s.p20, step_s.p80
        parts = [(self.phases["training"], step_s)]
        if what == TOTAL and "class_images" in self.phases:
            if self.batch_s is None:
                return None
            parts.append((self.phases["class_images"], self.batch_s))
        less, more = (
            sum(seconds * (getattr(times, name) / times.p50 - 1) for seconds, times in parts)
            for name in ("p20", "p80")
        )
        return found + less, found + more


class Entrant(Record):
    """One way to teach the subject, and how long it took each time."""

    name: Annotated[str, Field(min_length=1)]
    """Of its own in a race; ours ends in the engine: "ppt-lora, graph"."""
    recipe: str | None = None
    """Of ours; None for the others."""
    kind: Kind
    engine: str
    """`eager`, `compile`, `graph`, `graph+compile`; the others' own word for theirs."""
    prior: bool
    """Whether it trains with prior preservation, and so needs class images."""
    settings: dict[str, str | int | float | bool | None] = {}
    """What it was given that the race's settings do not say."""
    note: str = ""
    """What a reader has to know to compare it; empty where there is nothing."""
    rounds: Annotated[list[Round], Field(min_length=1)]


class Ratio(Record):
    """How many times the seconds of `of` those of `against` are: above 1, `of` is faster.

    Median, least and most over the rounds, each of them the two entrants of the same round. Where
    one of them ran another number of rounds, its median stands for each of its rounds. Of one round
    each, the least is that of the one's `Round.reach` where it is long and the other's where it is
    short, and the most the other way.
    """

    of: str
    against: str
    what: What
    value: Positive
    low: Positive
    high: Positive


class Decomposition(Record):
    """What a recipe's ratio to the diffusers-style job is made of: factors of one product.

    whole = trainer * method * engine, up to the medians being taken of each alone.
    """

    recipe: str
    what: What
    whole: Ratio
    """The recipe under its best engine against the diffusers-style job with prior preservation."""
    trainer: Ratio | None
    """The same recipe's method with prior preservation, ours and eager, against that job: what
    caching and the update are worth. None where no such recipe ran (`lora-prior` for a LoRA)."""
    method: Ratio | None
    """The recipe against that one of ours, both eager: what having no class images, and half the
    batch, is worth. None with it, and for that one itself."""
    eager: Ratio
    """The recipe, eager, against the diffusers-style job: trainer * method."""
    engine: Ratio
    """The recipe under its best engine against itself, eager."""


class RaceReport(Record):
    """A race. `bench.race_ratios.make_report` makes one of entrants, with the ratios."""

    kind: Literal["race"] = "race"
    machine: dict[str, object]
    """`bench.machine.describe_machine`: device, versions, commit, date."""
    settings: RaceSettings
    command: str = ""
    """What was typed."""
    label: str = ""
    """What sets it apart from other races of its model; also in the file's name."""
    entrants: Annotated[list[Entrant], Field(min_length=1)]
    ratios: list[Ratio] = []
    decomposition: list[Decomposition] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [entrant.name for entrant in self.entrants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"entrants: two are called {twice[0]!r}; a name is of one entrant")
        return self

    def entrant(self, name: str) -> Entrant:
        return next(each for each in self.entrants if each.name == name)


def write_race(path: Path, report: RaceReport) -> None:
    """Write a race; numbers keep four digits, and the file is never half a report."""
    write_report(path, report.model_dump(mode="json"))


def read_race(path: Path) -> RaceReport:
    """Return the race that a file holds.

    Raises:
        ValueError: there is no such file, or it holds no race; names the file and the key.
    """
    try:
        return RaceReport.model_validate(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; `python -m bench.race` writes one") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path}: not a race: {key}: {first['msg']}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
