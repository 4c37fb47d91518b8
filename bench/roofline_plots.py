"""The roofline of a run, and where the time of a step goes, as one PNG."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.rows import Row

DPI = 110
COLORS = {
    "class sampling": "tab:purple",
    "encode": "tab:brown",
    "forward": "tab:blue",
    "backward": "tab:orange",
    "update": "tab:green",
    "step": "black",
}


def draw_roofline(report: Row, path: Path) -> None:
    """Draw a report of `bench.roofline`.

    Args:
        report: As written.
        path: The PNG.
    """
    # Not pyplot: that has a state and a backend, which are the user's.
    figure = Figure(figsize=(13.0, 4.8), dpi=DPI, layout="constrained")
    roof, shares = figure.subplots(1, 2)
    _draw_roof(roof, report)
    _draw_shares(shares, report["profile"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_roof(axes: Axes, report: Row) -> None:
    ceilings = report["ceilings"]
    points = [row for row in report["phases"] if row["flops"] and row["p50 s"]]
    ridge = ceilings["ridge flop/byte"]
    reach = [ridge, *(row["flop/byte"] for row in points)]
    grid = np.geomspace(min(reach) / 4, max(reach) * 4, 200)
    top = ceilings["product tflop/s"]
    axes.plot(grid, np.minimum(top, grid * ceilings["copy gb/s"] / 1e3), color="0.3")
    axes.annotate(f"product, {top:.3g} TFLOP/s", (ridge, top), (4, 4), textcoords="offset points")
    axes.annotate(
        f"copy, {ceilings['copy gb/s']:.3g} GB/s",
        (grid[0], grid[0] * ceilings["copy gb/s"] / 1e3),
        (4, -12),
        textcoords="offset points",
    )
    for row in points:
        label = f"{row['phase']}: {row['share of roof']:.0%} of the roof, MFU {row['mfu']:.0%}"
        color = COLORS[row["phase"]]
        axes.plot(row["flop/byte"], row["tflop/s"], "o", color=color, label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (least bytes)")
    axes.set_ylabel("TFLOP/s")
    axes.grid(visible=True, which="both", color="0.92", linewidth=0.6)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _draw_shares(axes: Axes, profile: Row) -> None:
    rows = [row for row in profile["families"] if row["share"] > 0]
    names = [row["family"] for row in rows]
    bars = axes.barh(names, [100 * row["share"] for row in rows], color="tab:blue")
    axes.bar_label(bars, [f"{row['share']:.0%}" for row in rows], padding=2, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"% of a profiled step, {profile['engine']}")
