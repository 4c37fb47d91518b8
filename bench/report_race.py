"""A race on the report's page: its numbers in front, its tables, what they are made of."""

from collections.abc import Sequence

from bench.race_compare import BETTER, UNTOLD, WORSE, Change, Comparison
from bench.race_results import CACHED, PHASES, TOTAL, Entrant, Phase, RaceReport, Ratio, What
from bench.race_spreads import Spread, extrapolated_phases, phase_spread
from bench.race_tables import (
    EXTRAPOLATED,
    HEADINGS,
    decomposition_table,
    describe_machine,
    describe_ratio,
    describe_settings,
    find_headline,
    format_number,
    is_extrapolated,
    ratio_tables,
    seconds_table,
)
from bench.report_charts import Interval, draw_intervals, draw_stacks
from bench.report_html import Html, details, element, join, table
from bench.report_markdown import render

CLASS_IMAGES = "class_images"
# For a reader who knows none of it.
ABOUT = (
    "The whole job of teaching a model one subject, timed from the first file read to the last one "
    "written, by several ways that are given the same model, photos, settings and machine. Prior "
    "preservation is DreamBooth's way to keep a model from forgetting: it first samples pictures "
    "of the subject's class from the model (class images) and then trains on them beside the "
    "photos. Entrants called diffusers-style do what diffusers' training scripts do, re-enacted "
    "from its public interface with their defaults. The others are fastppt's recipes, each with "
    "its engine: eager runs a step op by op, graph replays it as a captured CUDA graph, compile "
    "fuses it with torch.compile. Encode is the photos' and the prompts' way through the model's "
    "encoders, first step has what is captured or compiled in it, and training is all other steps."
)


def race_section(report: RaceReport) -> Html:
    """Return all that a race says."""
    parts = decomposition_table(report)
    return join(
        element("p", ABOUT),
        element("p", f"{describe_settings(report.settings)} ({describe_machine(report)})."),
        _headline(report),
        element("h3", "Where the time goes"),
        _phases_chart(report, with_class_images=True),
        _phases_chart(report, with_class_images=False),
        render(seconds_table(report)),
        element("h3", "How many times as fast"),
        *(_ratio_chart(report, what) for what in (TOTAL, CACHED)),
        render(ratio_tables(report)),
        *([element("h3", "The method's part, and the engine's"), render(parts)] if parts else []),
        details("What each entrant was given, and what to know of it", _given(report)),
    )


def comparison_section(comparison: Comparison, old_name: str) -> Html:
    """Return what differs between a race and the earlier one of that name."""
    parts: list[object] = [
        element(
            "p",
            f"Against {old_name}. Marked is what differs by more than both the range over the "
            "rounds of either race and 1 %. A machine that is slower as a whole changes seconds "
            "and leaves the ratios between entrants of one race as they are.",
        )
    ]
    parts.append(element("p", describe_chance(comparison)))
    if comparison.machine is not None:
        text = f"Entrants that are not ours take {comparison.machine:.2f} times as long as before."
        parts.append(element("p", text, " Of what became slower, that much is not our code."))
    for text in list_warnings(comparison):
        parts.append(element("p", text, class_="warning"))
    worse = comparison.worse
    parts.append(element("h3", f"Worse: {len(worse) or 'nothing'}"))
    if worse:
        parts.append(changes_table(worse))
    parts.append(details("All that was compared", changes_table(comparison.judged)))
    return join(*parts)


def describe_chance(comparison: Comparison) -> str:
    """Return how many numbers would be called worse although nothing had changed."""
    known = sum(change.verdict != UNTOLD for change in comparison.judged)
    text = f"{known} numbers were held against their spread"
    if comparison.by_chance is None:
        return f"{text}, of one round each: how many noise alone calls worse is not known."
    return (
        f"{text} over {comparison.rounds} rounds; where nothing has changed, noise alone would "
        f"call about {comparison.by_chance:.1f} of them worse (more rounds, fewer)."
    )


def changes_table(changes: list[Change]) -> Html:
    """Return a line for each number, those that became worse or better marked."""
    marks = {
        index: "worse" if change.verdict == WORSE else "better"
        for index, change in enumerate(changes)
        if change.verdict in (WORSE, BETTER)
    }
    rows = [
        [
            f"{c.name}: {c.what}",
            *map(describe_spread, (c.old, c.new)),
            "" if c.times is None else f"{c.times:.2f}x",
            c.verdict,
        ]
        for c in changes
    ]
    return table(["", "before", "now", "now / before", ""], rows, marks=marks)


def describe_change(change: Change) -> str:
    """Return a change in one line, for a console."""
    times = "" if change.times is None else f" ({change.times:.2f}x)"
    old, new = describe_spread(change.old), describe_spread(change.new)
    return f"{change.name}: {change.what}: {old} -> {new}{times}: {change.verdict}"


def list_warnings(comparison: Comparison) -> list[str]:
    """Return what keeps two races from being alike, and what of them is not known."""
    texts = [
        f"The machines differ in {key}: {old} before, {new} now."
        for key, (old, new) in comparison.machine_keys.items()
    ]
    if comparison.given:
        texts.append(f"Was given other settings than before: {', '.join(comparison.given)}.")
    if comparison.only_old:
        texts.append(f"Not in the new race: {', '.join(comparison.only_old)}.")
    if comparison.only_new:
        texts.append(f"Not in the earlier race: {', '.join(comparison.only_new)}.")
    if comparison.extrapolated:
        texts.append(f"Extrapolated from a part of the work: {'; '.join(comparison.extrapolated)}.")
    if untold := sum(not (c.old.is_known and c.new.is_known) for c in comparison.numbers):
        texts.append(f"{untold} numbers are of one round, which says nothing of their spread.")
    return texts


def describe_spread(spread: Spread) -> str:
    median, low, high = map(format_number, (spread.median, spread.low, spread.high))
    return median if low == high else f"{median} ({low} to {high})"


def _headline(report: RaceReport) -> Html:
    """Return the ratios that the race is quoted for, large."""
    boxes = [
        element(
            "div",
            element("b", f"{part.whole.value:.1f}x"),
            element("span", f"{HEADINGS[part.what]}: {describe_ratio(report, part.whole)}"),
            element("span", f"{part.whole.of} against {part.whole.against}"),
            *_against_others(report, part.whole),
            *_labels(report, part.whole),
        )
        for part in find_headline(report)
    ]
    return element("div", *boxes, class_="figures") if boxes else Html()


def _against_others(report: RaceReport, quoted: Ratio) -> list[Html]:
    """Return the same ratio to all other jobs with prior preservation, stronger ones too."""
    key = quoted.of, quoted.what
    found = [ratio for ratio in report.ratios if (ratio.of, ratio.what) == key]
    return [
        element("span", f"{describe_ratio(report, ratio)} against {ratio.against}")
        for ratio in found
        if ratio.against != quoted.against
    ]


def _labels(report: RaceReport, ratio: Ratio) -> list[Html]:
    extrapolated = is_extrapolated(report, ratio)
    return [element("span", f"{EXTRAPOLATED} extrapolated, see below")] if extrapolated else []


def _phases_chart(report: RaceReport, *, with_class_images: bool) -> Html:
    shown = [name for name in PHASES if with_class_images or name != CLASS_IMAGES]
    bars = {
        f"{entrant.name}{_mark(entrant, shown)}": {
            name.replace("_", " "): spread.median
            for name in shown
            if (spread := phase_spread(entrant, name)) is not None
        }
        for entrant in report.entrants
    }
    title = "Seconds of the whole job" + (", class images on disk" * (not with_class_images))
    if any(_mark(entrant, shown) for entrant in report.entrants):
        title += f" ({EXTRAPOLATED} in part extrapolated)"
    parts = [name.replace("_", " ") for name in PHASES]
    return join(element("p", f"{title}:"), draw_stacks(bars, parts, unit="s", title=title))


def _mark(entrant: Entrant, shown: Sequence[Phase]) -> str:
    """Return what marks an entrant of which a phase that is shown was measured in part."""
    return EXTRAPOLATED if set(extrapolated_phases(entrant)) & set(shown) else ""


def _ratio_chart(report: RaceReport, what: What) -> Html:
    """Return each entrant against the first that others are held against."""
    ratios = [ratio for ratio in report.ratios if ratio.what == what]
    ratios = [ratio for ratio in ratios if ratio.against == ratios[0].against]
    if not ratios:
        return Html()
    title = f"Times as fast as {ratios[0].against}, {HEADINGS[what]}"
    marks = {ratio.of: EXTRAPOLATED * is_extrapolated(report, ratio) for ratio in ratios}
    title += f" ({EXTRAPOLATED} in part extrapolated):" if any(marks.values()) else ":"
    points = [Interval(r.of + marks[r.of], r.value, r.low, r.high) for r in ratios]
    return join(element("p", title), draw_intervals(points, title=title))


def _given(report: RaceReport) -> Html:
    rows = [
        [
            e.name,
            e.recipe or e.kind,
            e.engine,
            "yes" if e.prior else "no",
            ", ".join(f"{key} = {value}" for key, value in e.settings.items()),
            e.note,
        ]
        for e in report.entrants
    ]
    heads = ["", "recipe, or kind", "engine", "prior preservation", "settings of its own", "note"]
    return element("div", table(heads, rows), class_="texts")
