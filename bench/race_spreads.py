"""What the rounds of a race say together: a median, and from where to where they reach."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.race_results import (
    CACHED,
    PHASES,
    STEP,
    TOTAL,
    Entrant,
    Phase,
    RaceSettings,
    Round,
    What,
)

WHOLE_JOB = "whole job, s"
CLASS_IMAGES: Phase = "class_images"

Read = Callable[[Round], float | None]


@dataclass(frozen=True)
class Spread:
    """One number of an entrant.

    Attributes:
        median: Over the rounds.
        low: The least of them. Of a step of which there is one round: its 20th percentile.
        high: The most, and the 80th.
        is_known: Whether low and high are of more than one measurement.
    """

    median: float
    low: float
    high: float
    is_known: bool

    @property
    def range(self) -> float:
        return self.high - self.low


def spread_of(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values) > 1)


def phase_spread(entrant: Entrant, phase: Phase) -> Spread | None:
    """Return the seconds of a phase; None where the entrant does not have it."""
    return _over_rounds(entrant, lambda each: each.phases.get(phase))


def seconds_spread(entrant: Entrant, what: What) -> Spread | None:
    """Return the seconds of the job, of it with class images cached, or of a step."""
    found = _over_rounds(entrant, lambda each: each.seconds(what))
    timed = [each.step_s for each in entrant.rounds if each.step_s is not None]
    if what == STEP and len(timed) == 1:
        return Spread(timed[0].p50, timed[0].p20, timed[0].p80, is_known=True)
    return found


def memory_spread(entrant: Entrant) -> Spread | None:
    """Return the peak memory in bytes."""
    return _over_rounds(entrant, lambda each: each.peak_memory_bytes)


def energy_spread(entrant: Entrant) -> Spread | None:
    """Return the joules of the whole job."""

    def read(each: Round) -> float | None:
        return None if each.energy_joules is None else sum(each.energy_joules.values())

    return _over_rounds(entrant, read)


def list_spreads(entrant: Entrant, settings: RaceSettings) -> dict[str, Spread]:
    """Return all that an entrant was measured by: what it is and its unit, as "training, s".

    Where class images were sampled in one round, of several, and their time was that of all rounds,
    the spread of what they are part of is not known.
    """
    found: dict[str, Spread | None] = {
        f"{phase.replace('_', ' ')}, s": phase_spread(entrant, phase) for phase in PHASES
    }
    found[WHOLE_JOB] = seconds_spread(entrant, TOTAL)
    if entrant.prior:
        found["class images cached, s"] = seconds_spread(entrant, CACHED)
    step, memory, energy = (
        seconds_spread(entrant, STEP),
        memory_spread(entrant),
        energy_spread(entrant),
    )
    found["step, ms"] = step and _scale(step, 1e3)
    found["peak memory, MB"] = memory and _scale(memory, 1e-6)
    found["energy, J"] = energy
    if CLASS_IMAGES in shared_phases(entrant) and settings.sampling_rounds == 1:
        for name in ("class images, s", WHOLE_JOB, "energy, J"):
            spread = found[name]
            found[name] = spread and replace(spread, is_known=False)
    return {name: spread for name, spread in found.items() if spread is not None}


def extrapolated_phases(entrant: Entrant) -> list[Phase]:
    """Return the phases of which any round measured a part only."""
    named = {phase for each in entrant.rounds for phase in each.extrapolated}
    return [phase for phase in PHASES if phase in named]


def shared_phases(entrant: Entrant) -> list[Phase]:
    """Return the phases whose time is that of another entrant, or of another round."""
    named = {phase for each in entrant.rounds for phase in each.taken_from}
    return [phase for phase in PHASES if phase in named]


def _over_rounds(entrant: Entrant, read: Read) -> Spread | None:
    values = [value for each in entrant.rounds if (value := read(each)) is not None]
    return spread_of(values) if values else None


def _scale(spread: Spread, factor: float) -> Spread:
    ends = (spread.median * factor, spread.low * factor, spread.high * factor)
    return Spread(*ends, spread.is_known)
