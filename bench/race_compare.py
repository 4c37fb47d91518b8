"""Two races, phase by phase: what became slower or faster by more than the rounds spread."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bench.race_results import TOTAL, RaceReport, RaceSettings, Ratio
from bench.race_spreads import WHOLE_JOB, Spread, extrapolated_phases, list_spreads

Verdict = Literal["worse", "better", "within the spread", "one round: not told"]
WORSE, BETTER, WITHIN, UNTOLD = "worse", "better", "within the spread", "one round: not told"

# Settings that change nothing of what a job has to do.
FREE_SETTINGS = {"rounds", "sampling_rounds", "seed"}
# Of the machine's description: what times depend on.
MACHINE_KEYS = ("device", "cpu", "threads", "gpu", "driver", "cuda", "python", "torch", "triton")
MACHINE_KEYS += ("diffusers", "transformers", "peft")
# Of numbers that did not change, how many are called worse by chance: by the rounds of each race,
# of normally distributed rounds. It is less where the least change decides.
CHANCE = {2: 0.108, 3: 0.030, 4: 0.006, 5: 0.002}
# Of the old median: less than that is no change, however little the rounds spread.
LEAST_CHANGE = 0.01


@dataclass(frozen=True)
class Change:
    """One number in both races.

    Attributes:
        name: The entrant's, or "OF against AGAINST" of a ratio.
        what: The number's, with its unit.
        old: In the race that is compared with.
        new: In the race that is looked at.
        verdict: Worse or better where the medians differ by more than the larger of both ranges.
    """

    name: str
    what: str
    old: Spread
    new: Spread
    verdict: Verdict

    @property
    def times(self) -> float | None:
        """The new median over the old one; None where that is 0."""
        return self.new.median / self.old.median if self.old.median else None


@dataclass(frozen=True)
class Comparison:
    """What differs between two races of the same settings.

    Attributes:
        numbers: Seconds, memory and energy of each entrant; less is better.
        ratios: Of the entrants of one race to one another, round by round; what slows the whole
            machine down leaves them as they are. More is better.
        machine: The median over entrants that are not ours of how many times as long as before
            the whole job takes: what is not a change of ours. None without such entrants.
        only_old: Names of entrants that the new race does not have.
        only_new: And the other way.
        machine_keys: Which parts of the two machines' descriptions differ: old and new value.
        given: Entrants that were given other settings in the new race.
        extrapolated: Entrants of either race of which a phase was measured in part, and that phase.
        rounds: Of the race that has fewer.
    """

    numbers: list[Change]
    ratios: list[Change]
    machine: float | None
    only_old: list[str]
    only_new: list[str]
    machine_keys: dict[str, tuple[object, object]]
    given: list[str]
    extrapolated: list[str]
    rounds: int

    @property
    def judged(self) -> list[Change]:
        return [*self.ratios, *self.numbers]

    @property
    def worse(self) -> list[Change]:
        """What became worse, by the largest factor first."""
        found = [change for change in self.judged if change.verdict == WORSE]
        return sorted(found, key=lambda change: -abs(math.log(change.times or 1.0)))

    @property
    def by_chance(self) -> float | None:
        """How many would be called worse although nothing had changed; None of one round."""
        if self.rounds == 1:
            return None
        known = sum(change.verdict != UNTOLD for change in self.judged)
        return known * CHANCE[min(self.rounds, max(CHANCE))]


def compare_races(new: RaceReport, old: RaceReport) -> Comparison:
    """Compare a race with an earlier one.

    Raises:
        ValueError: they ran with other settings, which are named; or have no entrant in common.
    """
    check_settings(new.settings, old.settings)
    names = {"new": [e.name for e in new.entrants], "old": [e.name for e in old.entrants]}
    both = [name for name in names["new"] if name in names["old"]]
    if not both:
        raise ValueError(
            f"the races have no entrant in common: {', '.join(names['new'])} and "
            f"{', '.join(names['old'])}; give the file of a race with the same recipes"
        )
    numbers = []
    for name in both:
        before, after = (list_spreads(race.entrant(name), race.settings) for race in (old, new))
        for what in after:
            if what in before:
                verdict = judge(before[what], after[what], more_is_better=False)
                numbers.append(Change(name, what, before[what], after[what], verdict))
    others = [name for name in both if new.entrant(name).kind != "ours"]
    return Comparison(
        numbers=numbers,
        ratios=_compare_ratios(new, old),
        machine=_machine_times([c for c in numbers if c.name in others and c.what == WHOLE_JOB]),
        only_old=[name for name in names["old"] if name not in both],
        only_new=[name for name in names["new"] if name not in both],
        machine_keys={
            key: (old.machine.get(key), new.machine.get(key))
            for key in MACHINE_KEYS
            if old.machine.get(key) != new.machine.get(key)
        },
        given=[n for n in both if new.entrant(n).settings != old.entrant(n).settings],
        extrapolated=list(dict.fromkeys(_extrapolated(old, both) + _extrapolated(new, both))),
        rounds=min(old.settings.rounds, new.settings.rounds),
    )


def check_settings(new: RaceSettings, old: RaceSettings) -> None:
    """Refuse two races that did not do the same work.

    Raises:
        ValueError: names each setting that differs.
    """
    differing = [
        f"{key} {getattr(old, key)} and {getattr(new, key)}"
        for key in RaceSettings.model_fields
        if key not in FREE_SETTINGS and getattr(old, key) != getattr(new, key)
    ]
    if differing:
        raise ValueError(
            f"the races differ in {'; '.join(differing)}; run the new one with the old one's "
            "settings (its `command` says how)"
        )


def judge(old: Spread, new: Spread, *, more_is_better: bool) -> Verdict:
    """Say whether two medians differ by more than the larger of the two ranges, and by 1 %."""
    if not (old.is_known and new.is_known):
        return UNTOLD
    difference = new.median - old.median
    if abs(difference) <= max(old.range, new.range, LEAST_CHANGE * old.median):
        return WITHIN
    return BETTER if (difference > 0) == more_is_better else WORSE


def _compare_ratios(new: RaceReport, old: RaceReport) -> list[Change]:
    before = {(ratio.of, ratio.against, ratio.what): ratio for ratio in old.ratios}
    changes = []
    for ratio in new.ratios:
        earlier = before.get((ratio.of, ratio.against, ratio.what))
        if earlier is not None:
            spreads = _spread(earlier, old.settings), _spread(ratio, new.settings)
            verdict = judge(*spreads, more_is_better=True)
            name = f"{ratio.of} against {ratio.against}"
            changes.append(Change(name, f"{ratio.what}, times as fast", *spreads, verdict))
    return changes


def _spread(ratio: Ratio, settings: RaceSettings) -> Spread:
    once = ratio.what == TOTAL and settings.sampling_rounds == 1
    known = settings.rounds > 1 and not once
    return Spread(ratio.value, ratio.low, ratio.high, is_known=known)


def _extrapolated(race: RaceReport, names: Sequence[str]) -> list[str]:
    phases = {name: extrapolated_phases(race.entrant(name)) for name in names}
    return [f"{n} ({', '.join(p).replace('_', ' ')})" for n, p in phases.items() if p]


def _machine_times(changes: Sequence[Change]) -> float | None:
    times = [change.times for change in changes if change.times is not None]
    return statistics.median(times) if times else None
