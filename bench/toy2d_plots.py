"""The pictures of the experiment in the plane, as PNG files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bench.rows import Row
from bench.toy2d_measures import TIMESTEPS
from bench.toy2d_world import CLASSES

DPI = 100
# Points of each label that a panel shows: more hide one another, and make the file large.
SHOWN = 200
SUBJECT_COLOR = "black"
COLORS = {
    "standard": "tab:red",
    "prior preservation": "tab:blue",
    "anchor": "tab:green",
    "anchor, on the word too": "tab:olive",
    "the word alone": "tab:purple",
}
SWEPT = ("anchor", "anchor, on the word too")


@dataclass(frozen=True)
class Panel:
    """One model's points.

    Attributes:
        title: Says which model.
        personal: [n, 2], what was shown of the subject.
        points: [N, 2] of each class, and of the subject where the model knows it.
    """

    title: str
    personal: Tensor
    points: Sequence[Tensor]


def draw_panels(panels: Sequence[Panel], path: Path) -> None:
    """Draw each model's points side by side, by class, and around the personal points a ring."""
    # Not pyplot: that has a state and a backend, which are the user's.
    figure = Figure(figsize=(3.4 * len(panels), 4.0), dpi=DPI, layout="constrained")
    labels = [*CLASSES, "subject"]
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for index, points in enumerate(panel.points):
            color = SUBJECT_COLOR if index == len(CLASSES) else colormaps["tab10"](index)
            axes.scatter(*points[:SHOWN].T, s=3, color=color, label=labels[index])
        axes.scatter(*panel.personal.T, s=30, marker="x", color="red", label="personal points")
        centre = panel.personal.mean(0)
        around = {"s": 700, "facecolors": "none", "edgecolors": "red", "linewidths": 0.8}
        axes.scatter(*centre, **around)
        axes.set(title=panel.title, xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal")
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=10, fontsize="small", markerscale=2)
    figure.savefig(path)


def draw_sweep(rows: Sequence[Row], path: Path) -> None:
    """Draw subject against drift over all weights, what weights hold, and noise by timestep."""
    figure = Figure(figsize=(11.0, 8.0), dpi=DPI, layout="constrained")
    (own, others), (held, timesteps) = figure.subplots(2, 2)
    for axes, drift in ((own, "class drift"), (others, "other drift")):
        for way in COLORS:
            _draw_trade(axes, [row for row in rows if row["name"] == way], drift)
        axes.set_xlabel("subject distance (left is nearer)")
        axes.set_ylabel(f"{drift} (low is less)")
        axes.legend(fontsize="small")
    for way in SWEPT:
        _draw_held(held, [row for row in rows if row["name"] == way])
    held.set(xscale="log", yscale="log", xlabel="anchor weight")
    held.set_ylabel("solid: weight distance\ndashed: noise difference, other classes")
    held.legend(fontsize="small")
    for row in rows:
        # The word alone changes no prediction, and zero has no logarithm.
        shown = row["prior_weight"] in (0, 1) and row["anchor_weight"] in (0, 1)
        if shown and row["trains_network"]:
            name = "other noise difference by timestep"
            timesteps.plot(TIMESTEPS, row[name], "o-", color=COLORS[row["name"]], label=row["way"])
    timesteps.set(yscale="log", xlabel="timestep", ylabel="noise difference, other classes")
    timesteps.legend(fontsize="small")
    figure.savefig(path)


def _draw_trade(axes: Axes, rows: Sequence[Row], drift: str) -> None:
    """Draw one way's drift against its subject distance, a point a weight, with intervals."""
    x, y = ([row[name] for row in rows] for name in ("subject distance", drift))
    widths = [[row[f"{name} ±"] or 0.0 for row in rows] for name in ("subject distance", drift)]
    name = rows[0]["name"]
    axes.errorbar(x, y, widths[1], widths[0], "o-", color=COLORS[name], label=name, linewidth=1)
    for row, place in zip(rows, zip(x, y, strict=True), strict=True):
        if weight := row["anchor_weight"] or row["prior_weight"]:
            offset = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": "x-small"}
            axes.annotate(f"{weight:g}", place, **offset)


def _draw_held(axes: Axes, rows: Sequence[Row]) -> None:
    weights, color = [row["anchor_weight"] for row in rows], COLORS[rows[0]["name"]]
    axes.plot(
        weights, [row["weight distance"] for row in rows], "o-", color=color, label=rows[0]["name"]
    )
    axes.plot(weights, [row["other noise difference"] for row in rows], "o--", color=color)
