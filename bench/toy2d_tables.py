"""The numbers of the experiment in the plane as tables, on a console and in the README."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from bench.rows import Row

# What is shown, under which heading, and with how many digits.
COLUMNS = {
    "subject distance": ("subject, distance", 3),
    "subject share": ("subject, share on it", 2),
    "class drift": ("its class, drift", 3),
    "class share on subject": ("its class, share on the subject", 2),
    "other drift": ("other classes, drift", 3),
    "other noise difference": ("other classes, noise difference", 5),
    "weight distance": ("weights, distance", 2),
    "cpu seconds": ("CPU s", 2),
}
# Of a console, which has no place for more.
SHORT = {"subject distance": "subject", "class drift": "its class", "other drift": "other classes"}


def console_table(rows: Sequence[Row]) -> Table:
    """Return a line a way and weight: what was learned, and what was lost."""
    table = Table(title="means over seeds ± half the 95 % interval", box=SIMPLE, padding=0)
    for heading in ("", *SHORT.values()):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["way"], *(_cell(row, name) for name in SHORT))
    return table


def toy2d_table(report: Row | None, machine: str) -> str:
    """Return the README's table, and what the sweeps and the comparison say below it."""
    head = "**A concept learned in the plane**"
    if report is None:
        return f"{head} ({machine})."
    plan = report["plan"]
    lines = [
        f"{head}, {plan['tune_steps']} steps, means of {plan['seeds']} seeds ± half the 95 % "
        f"interval ({machine}):",
        "",
        "| | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for row in report["rows"]:
        lines.append(
            "| " + " | ".join([row["way"], *(_cell(row, name) for name in COLUMNS)]) + " |"
        )
    differences = [
        f"{row['what']} {row['difference']:+.3f}{_interval(row['±'], 3)}"
        for row in report["anchor minus prior preservation"]
    ]
    lines += ["", "Anchor minus prior preservation, both of weight 1, seed by seed: "]
    lines[-1] += ", ".join(differences) + "."
    falls = [
        f"{row['what']} in {row['seeds that fall']} of {row['seeds']} ({row['way']})"
        for row in report["sweeps"]
    ]
    lines += ["", "Seeds in which each larger anchor weight made it smaller: "]
    lines[-1] += ", ".join(falls) + "."
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    return f"{row[name]:.{COLUMNS[name][1]}f}{_interval(row[f'{name} ±'], COLUMNS[name][1])}"


def _interval(half_width: float | None, digits: int) -> str:
    return "" if half_width is None else f" ± {half_width:.{digits}f}"
