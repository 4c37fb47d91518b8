"""The numbers of the preservation bench as tables, on a console and in the README."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from bench.preservation_statistics import HOLDS, NOT_SHOWN
from bench.rows import Row

# Measure, heading, and digits.
NUMBERS = {
    "subject_fidelity": ("subject, likeness", 3),
    "subject_context": ("subject, place right", 2),
    "class_drift": ("class shows subject", 2),
    "class_noise": ("class, noise difference", 4),
    "other_all": ("others, all right", 2),
    "other_noise": ("others, noise difference", 4),
    "other_frechet": ("others, Frechet", 2),
    "parameter_distance": ("weights, distance", 2),
}
SECONDS = {
    "training": ("training, s", 1),
    "class images": ("class images, s", 1),
    "CPU of training and class images": ("CPU of both, s", 1),
}
WALL_CLOCK = ("training", "class images")
# Of a console, which has no place for more.
SHORT = {
    "subject_fidelity": "likeness",
    "class_drift": "class drift",
    "class_noise": "class noise",
    "other_noise": "other noise",
    "other_all": "others right",
}


def console_table(rows: Sequence[Row]) -> Table:
    """Return a line a method: what was learned, what was lost, and how long it took."""
    table = Table(
        title="means ± half the 95 % interval over subjects", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    for heading in ("", *SHORT.values(), "s"):
        table.add_column(heading)
    for row in rows:
        numbers = [_cell(row["numbers"], name, NUMBERS[name][1]) for name in SHORT]
        seconds = row["seconds"]
        spent = sum(seconds[name]["mean"] for name in WALL_CLOCK if name in seconds)
        table.add_row(row["method"], *numbers, f"{spent:.1f}" if spent else "")
    return table


def claims_table(claims: Sequence[Row]) -> Table:
    """Return a line a claim, and below it one for each of its parts."""
    table = Table(title="claims", box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("", "difference", ""):
        table.add_column(heading)
    for claim in claims:
        table.add_row(claim["claim"], "", claim["verdict"], style="bold")
        for part in claim["parts"]:
            table.add_row(f"  {part['what']}", _difference(part), part["verdict"] or "beside it")
        for what, value in claim["beside"].items():
            table.add_row(f"  {what}", value if isinstance(value, str) else f"{value:.1f}", "")
    return table


def preservation_table(report: Row | None, machine: str) -> str:
    """Return the README's table, and what became of the claims below it."""
    head = "**What methods teach, and what they cost the model**"
    if report is None:
        return f"{head} ({machine})."
    plan = report["plan"]
    columns = {**NUMBERS, **SECONDS}
    lines = [
        f"{head}: mini-sdxl, {plan['steps']} steps, {plan['subjects']} subjects, {plan['seeds']} "
        f"seeds each; means ± half the 95 % interval over subjects ({machine}):",
        "",
        "| | " + " | ".join(heading for heading, _ in columns.values()) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in report["rows"]:
        cells = [_cell(row["numbers"], name, digits) for name, (_, digits) in NUMBERS.items()]
        cells += [_cell(row["seconds"], name, digits) for name, (_, digits) in SECONDS.items()]
        lines.append("| " + " | ".join([row["method"], *cells]) + " |")
    lines += ["", "| claim | | what it rests on |", "|---|---|---|"]
    lines += [_claim_line(claim) for claim in report["claims"]]
    return "\n".join([*lines, *_weight_lines(report)])


def _weight_lines(report: Row) -> list[str]:
    """Return a line an anchor weight, and which are calibrated; none without a sweep."""
    weights = {
        swept: weight
        for swept, weight in report["calibrated anchor weights"].items()
        if weight is not None
    }
    if not weights:
        return []
    lines = [
        "",
        "| anchor weight of | | gain in likeness without an anchor, kept "
        "| Frechet distance of other classes without one, taken away | harmonic mean |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {swept} | {row['weight']:g} | {row['kept']:.2f} | {row['taken']:.2f} "
        f"| {row['balance']:.2f} |"
        for swept in weights
        for row in report["anchor weights"][swept]
    ]
    told = ", ".join(f"{swept} {weight:g}" for swept, weight in weights.items())
    return [*lines, "", f"The anchor weights that these numbers calibrate for mini-sdxl: {told}."]


def following_table(report: Row | None, machine: str) -> str:
    """Return the README's table of prompts that are followed, and of the judge's own mistakes."""
    head = "**How often the mini model draws what a prompt says**"
    if report is None:
        return f"{head} ({machine})."
    lines = [
        f"{head}: {report['prompts']} random prompts, {report['sampler steps']} sampler steps, "
        f"guidance {report['guidance scale']:g}, shares with 95 % intervals ({machine}):",
        "",
        "| read by the judge in | " + " | ".join(row["question"] for row in report["rows"]) + " |",
        "|---|" + "---|" * len(report["rows"]),
    ]
    for name, text in (("drawn", "its pictures"), ("rendered", "rendered scenes")):
        cells = [_share(row[name]) for row in report["rows"]]
        lines.append("| " + " | ".join([text, *cells]) + " |")
    return "\n".join(lines)


def _share(found: Row) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _claim_line(claim: Row) -> str:
    """Return a claim with the parts that decide: the first, or those that keep it from holding."""
    parts = [part for part in claim["parts"] if part["verdict"] is not None]
    counts = ", ".join(
        f"{sum(part['verdict'] == verdict for part in parts)} {verdict}"
        for verdict in dict.fromkeys(part["verdict"] for part in parts)
    )
    against = [part for part in parts if part["verdict"] != HOLDS] or parts[:2]
    shown = [
        f"{part['what']} {_difference(part)}" + (" (not shown)" * (part["verdict"] == NOT_SHOWN))
        for part in against[:3]
    ]
    return f"| {claim['claim']} | {claim['verdict']} | {counts}; {'; '.join(shown)} |"


def _difference(part: Row) -> str:
    if part["difference"] is None:
        return "not measured"
    return f"{part['difference']:+.3g}" + ("" if part["±"] is None else f" ± {part['±']:.2g}")


def _cell(numbers: Row, name: str, digits: int) -> str:
    if name not in numbers:
        return ""
    found = numbers[name]
    text = f"{found['mean']:.{digits}f}"
    return text if found["±"] is None else f"{text} ± {found['±']:.{digits}f}"
