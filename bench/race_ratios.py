"""How many times as fast: the ratios of a race, and what they are made of."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from bench.race_results import (
    WHATS,
    Decomposition,
    Entrant,
    RaceReport,
    RaceSettings,
    Ratio,
    Round,
    What,
)

EAGER = "eager"
# The recipe that does with class images what another does without.
WITH_CLASS_IMAGES = {
    "ppt-lora": "lora-prior",
    "apt": "lora-prior",
    "dco": "lora-prior",
    "ppt-dreambooth": "dreambooth-prior",
    "ppt-custom-diffusion": "custom-diffusion-prior",
}
# It trains the whole network of sd, and a LoRA of the others.
RARE_TOKEN = "rare-token"
OF_RARE_TOKEN = {"sd": "dreambooth-prior", "sdxl": "lora-prior", "sd3": "lora-prior"}


def make_report(
    machine: dict[str, object],
    settings: RaceSettings,
    entrants: Sequence[Entrant],
    command: str = "",
    label: str = "",
) -> RaceReport:
    """Return a race with the ratios that follow from its entrants.

    Raises:
        ValueError: two entrants have one name.
    """
    return RaceReport(
        machine=machine,
        settings=settings,
        command=command,
        label=label,
        entrants=list(entrants),
        ratios=list_ratios(entrants),
        decomposition=decompose(entrants, settings.family),
    )


def list_ratios(entrants: Sequence[Entrant]) -> list[Ratio]:
    """Return the ratios of every entrant to each of the others' jobs with prior preservation."""
    baselines = [each for each in entrants if each.kind != "ours" and each.prior]
    found = [
        compare(entrant, baseline, what)
        for baseline in baselines
        for entrant in entrants
        if entrant is not baseline
        for what in WHATS
    ]
    return [ratio for ratio in found if ratio is not None]


def compare(entrant: Entrant, baseline: Entrant, what: What) -> Ratio | None:
    """Return how many times the entrant's seconds the baseline's are; None where one has none.

    What slows a whole round down leaves its ratio as it is, so each is of one round's two.
    """
    mine, others = seconds_by_round(entrant, what), seconds_by_round(baseline, what)
    if mine is None or others is None:
        return None
    if len(mine) != len(others):
        longest = max(len(mine), len(others))
        mine, others = (
            each if len(each) == longest else [statistics.median(each)] * longest
            for each in (mine, others)
        )
    ratios = [other / own for own, other in zip(mine, others, strict=True)]
    low, high = min(ratios), max(ratios)
    if len(ratios) == 1:
        low, high = _reach(entrant.rounds[0], baseline.rounds[0], what) or (low, high)
    return Ratio(
        of=entrant.name,
        against=baseline.name,
        what=what,
        value=statistics.median(ratios),
        low=low,
        high=high,
    )


def _reach(mine: Round, other: Round, what: What) -> tuple[float, float] | None:
    """Return the least and the most that a ratio is in one round; None where that is not known."""
    own, others = mine.reach(what), other.reach(what)
    if own is None or others is None:
        return None
    return others[0] / own[1], others[1] / own[0]


def seconds_by_round(entrant: Entrant, what: What) -> list[float] | None:
    """Return the seconds of each round; None where one of them was not timed."""
    found = [each.seconds(what) for each in entrant.rounds]
    timed = [seconds for seconds in found if seconds is not None]
    return timed if len(timed) == len(found) else None


def decompose(entrants: Sequence[Entrant], family: str) -> list[Decomposition]:
    """Return what the recipes' ratios to the diffusers-style job are made of.

    Of recipes that ran eager; empty without that job. The best engine is, of each thing measured,
    the one of the least median seconds.
    """
    baseline = next((each for each in entrants if each.kind == "diffusers" and each.prior), None)
    eager = {
        each.recipe: each
        for each in entrants
        if each.recipe is not None and each.kind == "ours" and each.engine == EAGER
    }
    if baseline is None:
        return []
    found = [
        _decompose(own, best, baseline, eager.get(_counterpart(recipe, family)), what)
        for recipe, own in eager.items()
        for what in WHATS
        if (best := _best(entrants, recipe, what)) is not None
    ]
    return [each for each in found if each is not None]


def _decompose(
    eager: Entrant, best: Entrant, baseline: Entrant, counterpart: Entrant | None, what: What
) -> Decomposition | None:
    whole, slow = compare(best, baseline, what), compare(eager, baseline, what)
    engine = compare(best, eager, what)
    if whole is None or slow is None or engine is None:
        return None
    if best is eager:
        # Against itself it is 1 in every step.
        engine = engine.model_copy(update={"low": engine.value, "high": engine.value})
    assert eager.recipe is not None
    return Decomposition(
        recipe=eager.recipe,
        what=what,
        whole=whole,
        trainer=None if counterpart is None else compare(counterpart, baseline, what),
        method=None if counterpart is None else compare(eager, counterpart, what),
        eager=slow,
        engine=engine,
    )


def _counterpart(recipe: str, family: str) -> str | None:
    if recipe == RARE_TOKEN:
        return OF_RARE_TOKEN[family]
    return WITH_CLASS_IMAGES.get(recipe)


def _best(entrants: Sequence[Entrant], recipe: str, what: What) -> Entrant | None:
    """Return the engine's entrant that takes the least; None where none was timed."""
    timed = list(_timed(entrants, recipe, what))
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def _timed(entrants: Sequence[Entrant], recipe: str, what: What) -> Iterator[tuple[float, Entrant]]:
    for entrant in entrants:
        if entrant.kind == "ours" and entrant.recipe == recipe:
            seconds = seconds_by_round(entrant, what)
            if seconds is not None:
                yield statistics.median(seconds), entrant
