"""A race as tables, in Markdown: for the README and for the page of `bench.report`."""

from collections.abc import Callable, Sequence

from bench.race_results import (
    CACHED,
    PHASES,
    STEP,
    TOTAL,
    WHATS,
    Decomposition,
    Entrant,
    MemoryKind,
    Phase,
    RaceReport,
    RaceSettings,
    Ratio,
    What,
)
from bench.race_spreads import (
    Spread,
    energy_spread,
    extrapolated_phases,
    memory_spread,
    phase_spread,
    seconds_spread,
    shared_phases,
)

Table = list[str]
HEADINGS: dict[What, str] = {
    TOTAL: "whole job",
    CACHED: "class images on disk already",
    STEP: "one step",
}
MEMORY: dict[MemoryKind, str] = {
    "allocated": "allocated on the GPU",
    "device": "GPU memory of the process",
    "resident": "resident memory of the process",
}
EXTRAPOLATED, SHARED = "†", "‡"


def race_tables(report: RaceReport | None) -> str:
    """Return the README's tables of a race: what it took, how many times as long, and why.

    Of one with a label, which stands beside another, without the tables of ratios, which
    `bench.report` shows.
    """
    head = "One subject, from the first file read to the last one written"
    if report is None:
        return f"**{head}** (not measured yet)."
    head = f"**{head}{', ' * bool(report.label)}{report.label.replace('-', ' ')}**"
    given = f"{describe_settings(report.settings)} ({describe_machine(report)})"
    ratios = "" if report.label else ratio_tables(report)
    parts = [f"{head}: {given}.", seconds_table(report), ratios, decomposition_table(report)]
    return "\n\n".join(part for part in parts if part)


def describe_settings(settings: RaceSettings) -> str:
    """Return all that the entrants were given alike, in words."""
    return (
        f"{settings.model} ({settings.family}) at {settings.resolution} pixels, {settings.steps} "
        f"steps on {settings.num_photos} photos, batch {settings.batch_size}, "
        f"{settings.precision}, rank {settings.rank}; prior preservation samples "
        f"{_count(settings.class_images, 'class image')} in "
        f"{_count(settings.sampler_steps, 'step')} each, guidance "
        f"{settings.guidance_scale:g}; {_count(settings.threads, 'thread')}, "
        f"{_count(settings.rounds, 'round')}, seed {settings.seed}"
    ) + (
        ""
        if settings.sampling_rounds is None or settings.sampling_rounds >= settings.rounds
        else f"; class images were sampled in {_count(settings.sampling_rounds, 'round')} of them"
    )


def describe_machine(report: RaceReport) -> str:
    """Return what a race ran on: the machine, versions, our engines, the day."""
    machine = report.machine
    gpu = machine.get("gpu")
    place = f"{gpu}, driver {machine.get('driver')}" if gpu else str(machine.get("cpu"))
    names = ("python", "torch", "triton", "diffusers", "transformers", "peft")
    versions = [f"{name} {machine[name]}" for name in names if machine.get(name)]
    engines = " and ".join(dict.fromkeys(e.engine for e in report.entrants if e.kind == "ours"))
    ours = [f"engine {engines}"] if engines else []
    return ", ".join([place, *versions, *ours, str(machine.get("date"))])


def seconds_table(report: RaceReport) -> str:
    """Return a line an entrant: its phases, the job, a step, memory; medians over rounds."""
    phases = [name for name in PHASES if any(phase_spread(e, name) for e in report.entrants)]
    readers: dict[str, Callable[[Entrant], str]] = {
        f"{name.replace('_', ' ')}, s": lambda entrant, name=name: _phase(entrant, name)
        for name in phases
    }
    readers["whole job, s"] = lambda entrant: _marked(entrant, seconds_spread(entrant, TOTAL))
    readers["step, ms"] = lambda entrant: _number(seconds_spread(entrant, STEP), 1e3)
    if any(memory_spread(entrant) for entrant in report.entrants):
        readers["peak memory, MB"] = lambda entrant: _number(memory_spread(entrant), 1e-6)
    if any(energy_spread(entrant) for entrant in report.entrants):
        readers["energy, J"] = lambda entrant: _marked(entrant, energy_spread(entrant))
    rows = [[e.name, *(read(e) for read in readers.values())] for e in report.entrants]
    text = "\n".join(table(["medians over rounds", *readers], rows))
    return "\n\n".join([text, *_explain(report)])


def ratio_tables(report: RaceReport) -> str:
    """Return a table for each entrant that others are held against; "" where there is none."""
    parts = []
    for against in dict.fromkeys(ratio.against for ratio in report.ratios):
        ratios = [ratio for ratio in report.ratios if ratio.against == against]
        names = dict.fromkeys(ratio.of for ratio in ratios)
        rows = [
            [name, *(describe_ratio(report, find_ratio(ratios, name, what)) for what in WHATS)]
            for name in names
        ]
        parts.append(f"Times as fast as *{against}*, {describe_reach(report.settings)}:")
        parts.append("\n".join(table(["", *(HEADINGS[what] for what in WHATS)], rows)))
    return "\n\n".join(parts)


def decomposition_table(report: RaceReport) -> str:
    """Return what each ratio is made of: a line a recipe and number; "" where there is none."""
    if not report.decomposition:
        return ""
    heads = ["", "of", "best engine", "whole", "eager", "trainer", "method", "engine"]
    rows = [
        [
            part.recipe,
            HEADINGS[part.what],
            report.entrant(part.whole.of).engine,
            *(
                describe_ratio(report, ratio)
                for ratio in (part.whole, part.eager, part.trainer, part.method, part.engine)
            ),
        ]
        for part in report.decomposition
    ]
    against = ", ".join(dict.fromkeys(part.whole.against for part in report.decomposition))
    text = (
        f"What makes the difference to *{against}*: whole = eager x engine, and eager = trainer x "
        "method. Trainer: our recipe with prior preservation of what this one trains, eager, "
        "against that job. Method: this recipe against that one, both eager: no class images, half "
        "the batch. Engine: the best engine against eager."
    )
    return "\n\n".join([text, "\n".join(table(heads, rows))])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return the lines of a Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def describe_ratio(report: RaceReport, ratio: Ratio | None, digits: int = 2) -> str:
    """Return a ratio with its reach, and marked where it rests on extrapolation."""
    if ratio is None:
        return ""
    value, low, high = (f"{number:.{digits}f}" for number in (ratio.value, ratio.low, ratio.high))
    mark = EXTRAPOLATED * is_extrapolated(report, ratio)
    return f"{value}x{mark}" if low == high else f"{value}x{mark} ({low} to {high})"


def describe_reach(settings: RaceSettings) -> str:
    """Return what stands in brackets behind a ratio."""
    if settings.rounds > 1:
        return "the median of the rounds (least to most of them)"
    return (
        "in one round (from where to where, had every step and batch of class images taken as long "
        "as the 20th percentile of them, or as the 80th)"
    )


def find_ratio(ratios: Sequence[Ratio], of: str, what: What) -> Ratio | None:
    return next((ratio for ratio in ratios if (ratio.of, ratio.what) == (of, what)), None)


def find_headline(report: RaceReport) -> list[Decomposition]:
    """Return the parts of the recipe that a race is quoted for: `ppt-lora`, or else the first."""
    recipes = [part.recipe for part in report.decomposition]
    quoted = "ppt-lora" if "ppt-lora" in recipes else next(iter(recipes), None)
    return [part for part in report.decomposition if part.recipe == quoted]


def _explain(report: RaceReport) -> list[str]:
    """Return what must be known to read the numbers of entrants."""
    parts = []
    extrapolated = {e.name: extrapolated_phases(e) for e in report.entrants}
    named = [f"{name}: {', '.join(phases)}" for name, phases in extrapolated.items() if phases]
    if named:
        marked = "; ".join(named).replace("_", " ")
        parts.append(f"{EXTRAPOLATED} measured on a part of the work and extrapolated: {marked}.")
    if any(shared_phases(entrant) for entrant in report.entrants):
        parts.append(
            f"{SHARED} the time of another entrant or round that did the very same (energy too, "
            "memory not)."
        )
    # On a GPU our eager steps have kernels of Triton.
    is_gpu = report.machine.get("device") == "cuda"
    if any(e.kind == "ours" and (is_gpu or "compile" in e.engine) for e in report.entrants):
        parts.append(
            "Each of our jobs compiles anew, on all cores (first step); outside of a race later "
            "jobs of the same shapes find that in the caches of Inductor and Triton."
        )
    own = [entrant for entrant in report.entrants if entrant.kind == "external"]
    if 0 < len(own) < len(report.entrants):
        loads = ", ".join(str(entrant.settings.get("load")) for entrant in own)
        parts.append(
            f"Own commands ran after the others (load {loads}; {report.machine.get('load')} before "
            "these), and what they import late is in *other*."
        )
    kinds = {each.memory_kind for e in report.entrants for each in e.rounds} - {None}
    if kinds:
        words = ", ".join(text for kind, text in MEMORY.items() if kind in kinds)
        parts.append(f"Peak memory: {words}. Process start and imports are in no time.")
    else:
        parts.append("Process start and imports are in no time.")
    return [" ".join(parts)]


def _phase(entrant: Entrant, name: Phase) -> str:
    text = _number(phase_spread(entrant, name))
    text += EXTRAPOLATED * (name in extrapolated_phases(entrant))
    return text + SHARED * (name in shared_phases(entrant))


def _marked(entrant: Entrant, whole: Spread | None) -> str:
    """Return a number of the whole job, marked where a phase of it is extrapolated."""
    return _number(whole) + EXTRAPOLATED * bool(whole and extrapolated_phases(entrant))


def _number(spread: Spread | None, factor: float = 1.0) -> str:
    return "" if spread is None else format_number(spread.median * factor)


def format_number(value: float) -> str:
    """Return a number with three digits; two of one below 1, which are small parts of a job."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def is_extrapolated(report: RaceReport, ratio: Ratio) -> bool:
    """Say whether a time that a ratio is made of was measured on a part of the work only."""
    phases = {
        phase
        for name in (ratio.of, ratio.against)
        for phase in extrapolated_phases(report.entrant(name))
    }
    # A step is timed as it is.
    left_out = (
        set(PHASES) if ratio.what == STEP else {"class_images"} if ratio.what == CACHED else set()
    )
    return bool(phases - left_out)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
