"""What each bench's report says on the page, but for a race."""

from collections.abc import Callable, Sequence

from bench.option_tables import options_table
from bench.preservation_tables import following_table, preservation_table
from bench.report_html import Html, details, element, join, table
from bench.report_markdown import render, render_inline
from bench.report_scaling import roofline_section
from bench.rows import Row
from bench.step_tables import cpu_step_table
from bench.tables import alignment_table, anchor_table, gpu_table, name_machine
from bench.toy2d_tables import toy2d_table

VERDICTS = {True: "met", False: "missed", None: "not measured"}
# What a row is of, as far as it says so; and its numbers: heading, format, factor.
LABELS = ("suite", "form", "workload", "model", "resolution", "batch", "rank", "mode")
NUMBERS: dict[str, tuple[str, str, float]] = {
    "p50 ms": ("ms, median", ".4g", 1.0),
    "p20 ms": ("p20", ".4g", 1.0),
    "p80 ms": ("p80", ".4g", 1.0),
    "times ours": ("times the first", ".2f", 1.0),
    "share of copy": ("of a copy's speed", ".1%", 1.0),
    "share of product": ("of a product's speed", ".1%", 1.0),
    "kernels": ("launches", ".0f", 1.0),
    "launches": ("launches", ".0f", 1.0),
    "extra bytes": ("extra memory, MB", ".4g", 1e-6),
    "peak bytes": ("peak memory, MB", ".4g", 1e-6),
    "error": ("error", ".1e", 1.0),
    "rounds": ("rounds", ".0f", 1.0),
}
ABOUT_RACES = (
    "Whole jobs on full-size networks of random weights. Of the class images and of the training "
    "steps a part was run; the ratios, and what the targets are held against, are extrapolated "
    "from it. Each race has a file of its own."
)


def step_section(report: Row) -> Html:
    return join(render(cpu_step_table(report, name_machine(report))), measured(report))


def options_section(report: Row) -> Html:
    return join(render(options_table(report, name_machine(report))), measured(report))


def anchor_section(report: Row) -> Html:
    return join(render(anchor_table(report)), measured(report))


def alignment_section(report: Row) -> Html:
    return join(render(alignment_table(report)), measured(report))


def gpu_section(report: Row) -> Html:
    return join(render(gpu_table(report)), measured(report))


def race_targets_section(report: Row) -> Html:
    """Return which races ran, on how much of the work, and what is asked of them."""
    rows = [
        [
            row["model"],
            ", ".join(f"{what} {times:.2f}x" for what, times in row["times as fast"].items()),
            f"{row['trained steps']} of {row['steps']}",
            f"{row['sampled images']} of {row['class images']}",
            row["file"],
            ", ".join(row["left out"]),
        ]
        for row in report["rows"]
    ]
    heads = ["", "times as fast, extrapolated", "steps trained", "class images sampled", "file"]
    races = element("div", table([*heads, "not run"], rows), class_="texts")
    return join(element("p", ABOUT_RACES), races, targets_section(report))


def preservation_section(report: Row) -> Html:
    return render(preservation_table(report, name_machine(report)))


def following_section(report: Row) -> Html:
    return render(following_table(report, name_machine(report)))


def toy2d_section(report: Row) -> Html:
    return render(toy2d_table(report, name_machine(report)))


def measured(report: Row) -> Html:
    """Return targets, what was refused or not measured, and every row, of any bench of times."""
    timed = details("All that was timed", rows_table(report["rows"]))
    return join(targets_section(report), timed)


def targets_section(report: Row) -> Html:
    """Return targets, and what was refused or not measured."""
    parts: list[object] = []
    if report.get("targets"):
        parts.append(targets_table(report["targets"]))
    for key in ("refused", "not measured"):
        texts = [", ".join(f"{k} {v}" for k, v in row.items()) for row in report.get(key) or []]
        parts += [element("p", f"{key}: {text}", class_="warning") for text in texts]
    return join(*parts)


def targets_table(targets: Sequence[Row]) -> Html:
    """Return what was wanted beside what was measured, misses marked."""
    rows = [
        [
            row["what"],
            f"{row['target']:g}",
            "" if row["measured"] is None else f"{row['measured']:.3g}",
            VERDICTS[row["met"]],
        ]
        for row in targets
    ]
    marks = {index: "worse" for index, row in enumerate(targets) if row["met"] is False}
    return table(["target", "wanted", "measured", ""], rows, marks=marks)


def rows_table(rows: Sequence[Row]) -> Html:
    """Return a line for each row, with every number that any of them has."""
    shown = [key for key in NUMBERS if any(row.get(key) is not None for row in rows)]
    lines = []
    for row in rows:
        labels = [
            f"{key} {row[key]}" if isinstance(row[key], int) else row[key]
            for key in LABELS
            if row.get(key) is not None
        ]
        cells = [_number(row.get(key), *NUMBERS[key][1:]) for key in shown]
        lines.append([", ".join(labels), render_inline(str(row.get("way", ""))), *cells])
    return table(["", "way", *(NUMBERS[key][0] for key in shown)], lines)


def _number(value: object, form: str, factor: float) -> str:
    return "" if value is None else f"{value * factor:{form}}"


SECTIONS: dict[str, Callable[[Row], Html]] = {
    "roofline": roofline_section,
    "gpu race": race_targets_section,
    "gpu": gpu_section,
    "step": step_section,
    "options": options_section,
    "anchor": anchor_section,
    "alignment": alignment_section,
    "adapters": measured,
    "preservation": preservation_section,
    "prompt following": following_section,
    "toy2d": toy2d_section,
}
