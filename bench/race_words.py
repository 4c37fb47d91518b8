"""A race in words, for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.race_plan import EntrantPlan
from bench.race_results import PHASES, Entrant, RaceReport, Ratio, Round
from bench.race_spreads import extrapolated_phases
from bench.race_tables import describe_reach, is_extrapolated

WIDTH = 52
MEANING = "process start and imports in no total; times as fast (* extrapolated)"


def describe_round(number: int, entrant: EntrantPlan, found: Round) -> str:
    """Return a line of what an entrant took in a round, counted from 0."""
    total = found.seconds("total")
    mark = " (extrapolated)" * bool(found.extrapolated)
    return f"  round {number + 1}, {entrant.name:<{WIDTH}} {total:9.2f} s{mark}"


def describe_race(report: RaceReport) -> str:
    """Return settings, machine, phases and ratios."""
    meaning = f"{MEANING}: the baseline's seconds over one's own, {describe_reach(report.settings)}"
    lines = [*_settings(report), "", *_phases(report), "", meaning]
    for baseline in dict.fromkeys(ratio.against for ratio in report.ratios):
        lines.append(f"against {baseline}:")
        for entrant in report.entrants:
            found = [r for r in report.ratios if (r.of, r.against) == (entrant.name, baseline)]
            if found:
                ratios = ", ".join(_ratio(report, ratio) for ratio in found)
                lines.append(f"  {entrant.name:<{WIDTH}} {ratios}")
    return "\n".join(lines)


def _settings(report: RaceReport) -> Iterator[str]:
    settings, machine = report.settings, report.machine
    yield (
        f"{settings.model} ({settings.family}), {settings.resolution} px, batch "
        f"{settings.batch_size}, {settings.precision}, rank {settings.rank}, {settings.steps} "
        f"steps; {settings.class_images} class images of {settings.sampler_steps} sampler steps, "
        f"guidance {settings.guidance_scale:g}; {settings.num_photos} photos, seed {settings.seed}"
    )
    names = ("python", "torch", "triton", "diffusers", "transformers", "peft")
    versions = ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name))
    yield (
        f"{machine.get('gpu') or machine.get('cpu')}, {settings.threads} CPU thread(s); "
        f"{versions}; {settings.rounds} round(s)"
    )


def _phases(report: RaceReport) -> Iterator[str]:
    """Yield a line an entrant: median seconds by phase."""
    names = [name.replace("_", " ") for name in PHASES]
    yield f"{'seconds (* extrapolated, + shared)':<{WIDTH}} {_cells(names)} {'total':>9}"
    for entrant in report.entrants:
        cells = [_phase(entrant, name) for name in PHASES]
        total = statistics.median(each.seconds("total") or 0.0 for each in entrant.rounds)
        mark = "*" * bool(extrapolated_phases(entrant))
        yield f"{entrant.name:<{WIDTH}} {_cells(cells)} {total:9.2f}{mark}"


def _phase(entrant: Entrant, name: str) -> str:
    found = [each.phases[name] for each in entrant.rounds if name in each.phases]
    if not found:
        return "-"
    marks = "*" * any(name in each.extrapolated for each in entrant.rounds)
    marks += "+" * any(name in each.taken_from for each in entrant.rounds)
    return f"{statistics.median(found):.2f}{marks}"


def _cells(texts: list[str]) -> str:
    return " ".join(f"{text:>12}" for text in texts)


def _ratio(report: RaceReport, ratio: Ratio) -> str:
    mark = "*" * is_extrapolated(report, ratio)
    return f"{ratio.what} {ratio.value:.2f}{mark} ({ratio.low:.2f} to {ratio.high:.2f})"
