"""A sweep as a table and as a picture."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from fastppt.outputs.files import write_file
from fastppt.sweep.runs import Outcome, Sweep

DPI, WIDTH, ROW_HEIGHT = 120, 7.0, 2.0

OF_ANY_MODEL = {
    "subject_loss": "subject: loss of the last steps",
    "parameter_drift": "weights: distance from the anchor",
    "class_noise": "class prompt: noise difference",
    "no_prompt_noise": "no prompt: noise difference",
}
OF_THE_MINI_WORLD = {
    "subject_fidelity": "subject: likeness to the photos",
    "class_similarity": "class: likeness to the photos",
    "other_all": "other classes: all right",
}
"""What is shown, and how it is called."""


def make_table(sweep: Sweep) -> Table:
    """Return a line a number, and a column a weight; where pictures were judged, the base first."""
    weights = [f"{outcome.weight:g}" for outcome in sweep.outcomes]
    table = Table("anchor weight", *(["base"] if sweep.base else []), *weights)
    for name, text in shown(sweep).items():
        cells = [_cell(value_of(outcome, name)) for outcome in sweep.outcomes]
        own = sweep.base.get(name) if name in OF_THE_MINI_WORLD else None
        table.add_row(text, *([_cell(own)] if sweep.base else []), *cells)
    return table


def shown(sweep: Sweep) -> dict[str, str]:
    """Return the numbers that a sweep has, by name, and how they are called."""
    return {**OF_ANY_MODEL, **(OF_THE_MINI_WORLD if sweep.base else {})}


def draw_sweep(sweep: Sweep, path: Path) -> None:
    """Draw each number over the weights, one plot below the other, and write the PNG.

    Raises:
        UserError: the file cannot be written.
    """
    names = shown(sweep)
    # Not pyplot: that has a state and a backend, which are the user's.
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(names)), dpi=DPI, layout="constrained")
    # A weight of zero has no place on a logarithmic axis, so each weight has a place of its own.
    places = range(len(sweep.outcomes))
    all_axes = figure.subplots(len(names), 1, sharex=True)
    for axes, (name, text) in zip(all_axes, names.items(), strict=True):
        values = [value_of(outcome, name) for outcome in sweep.outcomes]
        known = [
            (place, value) for place, value in zip(places, values, strict=True) if value is not None
        ]
        axes.plot(*zip(*known, strict=True) if known else ((), ()), marker="o")
        if name in sweep.base and name in OF_THE_MINI_WORLD:
            axes.axhline(sweep.base[name], color="0.5", linestyle=":", label="base")
            axes.legend(fontsize="small")
        axes.set_ylabel(text.replace(": ", ":\n"), fontsize="small")
        axes.grid(alpha=0.3)
    weights = [f"{outcome.weight:g}" for outcome in sweep.outcomes]
    all_axes[-1].set_xticks(list(places), weights)
    all_axes[-1].set_xlabel("anchor weight")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())


def value_of(outcome: Outcome, name: str) -> float | None:
    """Return a number of an outcome by its name; None where it was not measured."""
    value: float | None
    value = getattr(outcome, name) if name in OF_ANY_MODEL else outcome.judged.get(name)
    return value


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
