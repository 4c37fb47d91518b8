"""A picture for each axis of `bench.scaling`: what it costs, and the law that was fitted."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.rows import Row

DPI = 110
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
# What is drawn of a row: its key, unit, and the factor into that unit.
COSTS = {
    "seconds": ("p50 s", "s", 1.0),
    "bytes": ("peak bytes", "GB", 1e-9),
    "flops": ("flops", "TFLOP", 1e-12),
}


def draw_axis(axis: Row, path: Path) -> None:
    """Draw an entry of the report's axes: a panel for each cost that was measured.

    Args:
        axis: With its rows and fits.
        path: The PNG.
    """
    costs = [what for what, (key, _, _) in COSTS.items() if any(r[key] for r in axis["rows"])]
    width = 5.2 * max(len(costs), 1)
    # Not pyplot: that has a state and a backend, which are the user's.
    figure = Figure(figsize=(width, 4.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, max(len(costs), 1), squeeze=False)[0]
    for panel, what in zip(panels, costs, strict=False):
        _draw_cost(panel, axis, what)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_cost(panel: Axes, axis: Row, what: str) -> None:
    key, unit, factor = COSTS[what]
    recipes = list(dict.fromkeys(row["recipe"] for row in axis["rows"]))
    for recipe, color in zip(recipes, COLORS, strict=False):
        rows = [row for row in axis["rows"] if row["recipe"] == recipe and row[key]]
        if not rows:
            continue
        xs = [row["x"] for row in rows]
        ys = [factor * row[key] for row in rows]
        spread = _spread(rows, ys, factor) if what == "seconds" else None
        panel.errorbar(xs, ys, yerr=spread, fmt="o", color=color, capsize=3, label=recipe)
        fits = [f for f in axis["fits"] if (f["recipe"], f["what"]) == (recipe, what)]
        for fit in fits:
            grid = np.geomspace(xs[0], xs[-1], 60)
            label = f"exponent {fit['exponent']:.2f}"
            if fit["exponent_half"] is not None:
                label += f" ± {fit['exponent_half']:.2f}"
            style = "-" if fit["law"] == "power law" else ":"
            power = _power(xs, ys, fit["exponent"], grid)
            panel.plot(grid, power, style, color=color, linewidth=1, label=label)
            if fit["law"] == "fixed and a unit":
                line = factor * (fit["fixed"] + fit["unit"] * grid)
                text = f"{factor * fit['fixed']:.3g} + {factor * fit['unit']:.3g} x"
                panel.plot(grid, line, "--", color=color, linewidth=1.5, label=f"{text} {unit}")
    panel.set(xscale="log", yscale="log", xlabel=axis["x"], ylabel=f"{unit}, {axis['of']}")
    ticks = sorted({row["x"] for row in axis["rows"]})
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    panel.set_xticks([], minor=True)
    panel.grid(visible=True, which="both", color="0.92", linewidth=0.6)
    panel.legend(fontsize="small")


def _power(xs: Sequence[float], ys: Sequence[float], exponent: float, grid: object) -> object:
    """Return the power law of this exponent that is fitted to the points, on the grid."""
    factor = np.exp(np.mean(np.log(ys) - exponent * np.log(xs)))
    return factor * np.asarray(grid) ** exponent


def _spread(rows: Sequence[Row], ys: Sequence[float], factor: float) -> list[list[float]]:
    below = [y - factor * row["p20 s"] for row, y in zip(rows, ys, strict=True)]
    above = [factor * row["p80 s"] - y for row, y in zip(rows, ys, strict=True)]
    return [below, above]
