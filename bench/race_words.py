"""A race in words, for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.race_plan import EntrantPlan
from bench.race_results import PHASES, Entrant, RaceReport, Ratio, Round

WIDTH = 52
# Where every number is a reader's own: what the ratios mean.
MEANING = (
    "times as fast: the baseline's seconds over the entrant's, the median of the rounds (least to "
    "most); process start and imports in no total"
)


def describe_round(number: int, entrant: EntrantPlan, found: Round) -> str:
    """Return a line of what an entrant took in a round, counted from 0."""
    total = found.seconds("total")
    return f"  round {number + 1}, {entrant.name:<{WIDTH}} {total:9.2f} s"


def describe_race(report: RaceReport) -> str:
    """Return settings, machine, phases and ratios."""
    lines = [*_settings(report), "", *_phases(report), "", MEANING]
    for baseline in dict.fromkeys(ratio.against for ratio in report.ratios):
        lines.append(f"against {baseline}:")
        for entrant in report.entrants:
            found = [r for r in report.ratios if (r.of, r.against) == (entrant.name, baseline)]
            if found:
                lines.append(f"  {entrant.name:<{WIDTH}} {', '.join(map(_ratio, found))}")
    return "\n".join(lines)


def _settings(report: RaceReport) -> Iterator[str]:
    settings, machine = report.settings, report.machine
    yield (
        f"{settings.model} ({settings.family}), {settings.resolution} px, batch "
        f"{settings.batch_size}, {settings.precision}, rank {settings.rank}, {settings.steps} "
        f"steps; {settings.class_images} class images of {settings.sampler_steps} sampler steps, "
        f"guidance {settings.guidance_scale:g}; {settings.num_photos} photos, seed {settings.seed}"
    )
    yield (
        f"{machine.get('gpu') or machine.get('cpu')}, {settings.threads} CPU thread(s); torch "
        f"{machine.get('torch')}, triton {machine.get('triton')}, diffusers "
        f"{machine.get('diffusers')}, Python {machine.get('python')}; {settings.rounds} round(s)"
    )


def _phases(report: RaceReport) -> Iterator[str]:
    """Yield a line an entrant: median seconds by phase."""
    names = [name.replace("_", " ") for name in PHASES]
    yield f"{'seconds (* extrapolated, + shared)':<{WIDTH}} {_cells(names)} {'total':>9}"
    for entrant in report.entrants:
        cells = [_phase(entrant, name) for name in PHASES]
        total = statistics.median(each.seconds("total") or 0.0 for each in entrant.rounds)
        yield f"{entrant.name:<{WIDTH}} {_cells(cells)} {total:9.2f}"


def _phase(entrant: Entrant, name: str) -> str:
    found = [each.phases[name] for each in entrant.rounds if name in each.phases]
    if not found:
        return "-"
    marks = "*" * any(name in each.extrapolated for each in entrant.rounds)
    marks += "+" * any(name in each.taken_from for each in entrant.rounds)
    return f"{statistics.median(found):.2f}{marks}"


def _cells(texts: list[str]) -> str:
    return " ".join(f"{text:>12}" for text in texts)


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.what} {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
