"""The pictures of the preservation bench, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.preservation_plan import APT, PPT_DREAMBOOTH, PPT_LORA
from bench.preservation_statistics import cells_of
from bench.rows import Row

DPI = 110
FIDELITY = "subject_fidelity"
# Drift, and whether it spans orders of magnitude.
DRIFTS = {
    "class_noise": "class prompts: difference of the predicted noise",
    "other_noise": "other classes: difference of the predicted noise",
    "class_similarity": "class prompts: likeness to the subject's photos",
}
LOGARITHMIC = ("class_noise", "other_noise")
BASE = "base"
# Of a sweep, the line through its points.
LINES = {PPT_LORA: ("tab:green", "-"), PPT_DREAMBOOTH: ("tab:brown", "--")}


def draw_trade(rows: Sequence[Row], path: Path) -> None:
    """Draw subject fidelity against drift, each sweep as a line, and the time that each takes.

    Points have the numbers of the methods beside the times: their names would cover one another.
    """
    # Not pyplot: that has a state and a backend, which are the user's.
    figure = Figure(figsize=(15.0, 11.0), dpi=DPI, layout="constrained")
    *trades, times = figure.subplots(2, 2).flat
    for axes, (drift, text) in zip(trades, DRIFTS.items(), strict=True):
        _draw_points(axes, rows, drift)
        axes.set(xlabel=f"{text} (left is less)", ylabel="subject prompts: likeness to the photos")
    _draw_times(times, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points (drift, fidelity) no other one beats in both, by rising drift."""
    order = sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1]))
    front: list[int] = []
    for at in order:
        if not front or points[at][1] > points[front[-1]][1]:
            front.append(at)
    return front


def draw_indicator(cells: Sequence[Row], path: Path) -> None:
    """Draw the overfitting indicator of the recipe apt by timestep bin, mean over all cells."""
    courses = [cell["indicator"]["course"] for cell in cells_of(cells, APT) if cell["indicator"]]
    figure = Figure(figsize=(8.0, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    if courses:
        mean = np.mean(courses, axis=0)
        parts = np.linspace(0, 100, len(mean))
        for index, values in enumerate(mean.T):
            label = f"{100 * index // mean.shape[1]} to {100 * (index + 1) // mean.shape[1]} %"
            color = colormaps["viridis"]((index + 0.5) / mean.shape[1])
            axes.plot(parts, values, color=color, label=label)
        # Beside the curves, which fill the axes.
        axes.legend(
            title="part of the timesteps\n(0 %: least noise)",
            fontsize="small",
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
    axes.set(xlabel="part of the steps, %", ylabel="overfitting indicator", ylim=(-0.02, 1.02))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_points(axes: Axes, rows: Sequence[Row], drift: str) -> None:
    tuned = [row for row in rows if row["method"] != BASE]
    base = [row for row in rows if row["method"] == BASE]
    points = [(_mean(row, drift), _mean(row, FIDELITY)) for row in tuned]
    if drift in LOGARITHMIC:
        # None at all has no place on a logarithmic axis: it is drawn at the left, and said.
        least = min((x for x, _ in points if x > 0), default=1.0) / 2
        points = [(max(x, least), y) for x, y in points]
    front = [points[at] for at in pareto_front(points)]
    if front:
        axes.step(*zip(*front, strict=True), where="post", color="0.8", linewidth=6, zorder=0)
    for swept, (color, dashes) in LINES.items():
        sweep = sorted(
            (row for row in tuned if row["sweep"] == swept), key=lambda row: row["anchor weight"]
        )
        line = [(_mean(row, drift), _mean(row, FIDELITY)) for row in sweep]
        if line:
            label = f"{swept}, by anchor weight"
            axes.plot(*zip(*line, strict=True), dashes, color=color, linewidth=1, label=label)
    for index, (row, (x, y)) in enumerate(zip(tuned, points, strict=True)):
        color = _color(index)
        reach = {"xerr": _half(row, drift), "yerr": _half(row, FIDELITY)}
        axes.errorbar(x, y, **reach, fmt="o", color=color, markersize=5, elinewidth=0.5)
        name = f"{index + 1}" + " (0)" * (drift in LOGARITHMIC and _mean(row, drift) == 0)
        near = {"textcoords": "offset points", "fontsize": 9, "fontweight": "bold"}
        axes.annotate(name, (x, y), (4, 4), color=color, **near)
    if base:
        axes.axhline(_mean(base[0], FIDELITY), color="black", linestyle=":", label="base")
    if drift in LOGARITHMIC:
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", labelsize=6)
    axes.legend(fontsize="small", loc="lower right")


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    tuned = [row for row in rows if "training" in row["seconds"]]
    names = [f"{row['method']}  {number}" for number, row in enumerate(tuned, start=1)]
    training = [row["seconds"]["training"]["mean"] for row in tuned]
    drawing = [row["seconds"]["class images"]["mean"] for row in tuned]
    axes.barh(names, training, color="tab:blue", label="training")
    axes.barh(names, drawing, left=training, color="tab:orange", label="class images")
    cpu = [row["seconds"]["CPU of training and class images"]["mean"] for row in tuned]
    axes.plot(cpu, names, "k|", markersize=10, label="CPU time of both")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=9)
    for index, label in enumerate(axes.get_yticklabels()):
        label.set(color=_color(index), fontweight="bold")
    axes.set_xlabel("wall clock, s")
    axes.legend(fontsize="small")


def _color(index: int) -> tuple[float, ...]:
    """Return one of ten colours, none so light that a number in it could not be read."""
    return colormaps["tab10"](index % 10)


def _mean(row: Row, name: str) -> float:
    return row["numbers"][name]["mean"]


def _half(row: Row, name: str) -> float:
    return row["numbers"][name]["±"] or 0.0
