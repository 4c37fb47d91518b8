"""Plots of what a run noted, as PNG files: the curves that papers show of a training.

Drawn from metrics.jsonl alone, so at any time, also while the run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastppt.errors import UserError
from fastppt.outputs.files import write_file

Rows = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl, by step."""
Values = NDArray[np.float64]
"""[steps], or [series, steps]; NaN where a step has no value."""

WIDTH, HEIGHT, DPI = 9.0, 4.5, 120
"""Of a plot: inches, inches, and pixels an inch."""
LAYER_HEIGHT = 0.2
"""Inches of a layer's row."""
MOST_COLUMNS = 400
"""Steps are averaged to so many at most, where each layer is a row of coloured fields."""
SMOOTHED_PART, MOST_SMOOTHED = 1 / 8, 50
"""Of the steps, how many the moving average has that is drawn over what is noisy."""
LOSS_TERMS = (
    *("loss", "denoising", "anchor", "feature_mean", "feature_std"),
    *("attention_alignment", "direct_consistency", "prior_preservation"),
)
SINGLE_NUMBERS = (*LOSS_TERMS, "prediction_difference", "grad_norm", "learning_rate")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl.

    Raises:
        UserError: there is none, it holds no step yet, or a line is damaged; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; give the folder of a run that has begun to train"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    rows = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
    if not rows:
        raise UserError(f"{path}: holds no step yet; wait until the run has looked at its metrics")
    return rows


def draw_plots(metrics: Path, folder: Path, title: str) -> list[Path]:
    """Draw every plot that there is data for.

    Args:
        metrics: The run's metrics.jsonl.
        folder: Where to; files of the same names are replaced.
        title: Stands above each plot.

    Returns:
        The PNG files.

    Raises:
        UserError: as `read_metrics`; or a file cannot be written.
    """
    rows = read_metrics(metrics)
    paths = []
    for name, draw in PLOTS.items():
        figure = draw(rows)
        if figure is not None:
            figure.suptitle(title)
            path = folder / f"{name}.png"
            write_file(path, _png(figure))
            paths.append(path)
    return paths


def plot_losses(rows: Rows) -> Figure | None:
    """Plot the loss and its unweighted terms, each in a plot of its own."""
    series = {name: _series(rows, name) for name in LOSS_TERMS}
    # An anchor that does not pull is 0 throughout.
    terms = {name: values for name, values in series.items() if (np.nan_to_num(values) != 0).any()}
    if not terms:
        return None
    figure = _new_figure(height=1.5 * len(terms) + 1)
    all_axes = np.atleast_1d(figure.subplots(len(terms), 1, sharex=True))
    for axes, (name, values) in zip(all_axes, terms.items(), strict=True):
        _plot_noisy(axes, rows, values)
        axes.set_ylabel(name.replace("_", "\n"))
    _mark_skipped(all_axes, rows)
    all_axes[-1].set_xlabel("step")
    return figure


def plot_indicator(rows: Rows) -> Figure | None:
    """Plot the overfitting indicator of each timestep bin (arXiv 2507.02687, equation 3).

    Stages with other numbers of bins have plots of their own.
    """
    counts = dict.fromkeys(len(row.get("gamma_bins") or ()) for row in rows)
    tables = [table for count in counts if _any(table := _table(rows, "gamma_bins", count))]
    if not tables:
        return None
    figure = _new_figure(HEIGHT * len(tables))
    all_axes = np.atleast_1d(figure.subplots(len(tables), 1, sharex=True))
    for axes, bins in zip(all_axes, tables, strict=True):
        for index, values in enumerate(bins):
            first, last = (round(100 * edge / len(bins)) for edge in (index, index + 1))
            color = colormaps["viridis"]((index + 0.5) / len(bins))
            axes.plot(_steps(rows), values, color=color, label=f"{first} to {last} %")
        axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel("overfitting indicator")
        axes.legend(
            title="part of the timesteps\n(0 %: least noise)",
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            fontsize="small",
        )
    all_axes[-1].set_xlabel("step")
    return figure


def plot_prediction_difference(rows: Rows) -> Figure | None:
    """Plot how far the network's prediction is from the base's: their mean squared difference."""
    values = _series(rows, "prediction_difference")
    if not _any(values):
        return None
    figure = _new_figure()
    axes = figure.subplots()
    _plot_noisy(axes, rows, values)
    axes.set_ylabel("mean squared difference of\ntuned and base prediction")
    axes.set_xlabel("step")
    return figure


def plot_attention_alignment(rows: Rows) -> Figure | None:
    """Plot the attention alignment loss of each layer."""
    return _plot_layers(rows, ["attention_alignment"])


def plot_feature_alignment(rows: Rows) -> Figure | None:
    """Plot both feature alignment losses of each layer."""
    return _plot_layers(rows, ["feature_mean", "feature_std"])


def plot_optimizer(rows: Rows) -> Figure | None:
    """Plot the gradient's norm before clipping, and the learning rate."""
    norms, rates = _series(rows, "grad_norm"), _series(rows, "learning_rate")
    if not _any(norms) and not _any(rates):
        return None
    figure = _new_figure()
    upper, lower = figure.subplots(2, 1, sharex=True)
    _plot_noisy(upper, rows, norms)
    if (norms[np.isfinite(norms)] > 0).any():
        upper.set_yscale("log")
    upper.set_ylabel("gradient norm")
    lower.plot(_steps(rows), rates)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    _mark_skipped([upper, lower], rows)
    return figure


PLOTS: dict[str, Callable[[Rows], Figure | None]] = {
    "losses": plot_losses,
    "indicator": plot_indicator,
    "prediction-difference": plot_prediction_difference,
    "attention-alignment": plot_attention_alignment,
    "feature-alignment": plot_feature_alignment,
    "optimizer": plot_optimizer,
}
"""Names of the files, and what is in them."""


def _plot_layers(rows: Rows, terms: Sequence[str]) -> Figure | None:
    """Plot terms by layer: a row of fields a layer, in the network's order from top to bottom."""
    tables = {term: _layers(rows, term) for term in terms}
    tables = {term: layers for term, layers in tables.items() if layers}
    if not tables:
        return None
    num_layers = max(len(layers) for layers in tables.values())
    figure = _new_figure(height=len(tables) * (LAYER_HEIGHT * num_layers + 1.2) + 0.6)
    all_axes = np.atleast_1d(figure.subplots(len(tables), 1, sharex=True))
    for axes, (term, layers) in zip(all_axes, tables.items(), strict=True):
        edges, fields = _in_columns(_steps(rows), np.stack(list(layers.values())))
        # What is zero has no logarithm: it stays white, like steps without a base pass.
        fields = np.ma.masked_where(~(fields > 0), fields)
        places = np.arange(len(layers) + 1)
        norm = LogNorm() if fields.count() else None
        colors = axes.pcolormesh(edges, places, fields, norm=norm, cmap="viridis")
        axes.set_yticks(places[:-1] + 0.5, list(layers), fontsize="x-small")
        axes.invert_yaxis()
        axes.set_title(term.replace("_", " "), fontsize="medium")
        if norm is not None:
            axes.figure.colorbar(colors, ax=axes, label="loss of the layer")
    all_axes[-1].set_xlabel("step")
    return figure


def _plot_noisy(axes: Axes, rows: Rows, values: Values) -> None:
    """Plot values and their moving average, over the steps that have one."""
    known = np.isfinite(values)
    steps, values = _steps(rows)[known], values[known]
    axes.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=0.8)
    width = min(round(SMOOTHED_PART * len(values)), MOST_SMOOTHED)
    if width > 1:
        sums = np.concatenate([[0.0], np.cumsum(values)])
        last = np.arange(1, len(values) + 1)
        first = np.maximum(last - width, 0)
        smooth = (sums[last] - sums[first]) / (last - first)
        label = f"mean of {width} values"
        axes.plot(steps, smooth, color="tab:blue", linewidth=1.6, label=label)
        axes.legend(fontsize="x-small", loc="upper right")


def _mark_skipped(all_axes: Sequence[Axes] | NDArray[Any], rows: Rows) -> None:
    """Mark the steps that were left out, at the foot of each plot."""
    skipped = [row["step"] for row in rows if row.get("skipped")]
    for axes in all_axes if skipped else ():
        height = np.zeros(len(skipped))
        foot = axes.get_xaxis_transform()
        axes.plot(skipped, height, "r^", transform=foot, clip_on=False, label="left out")
        axes.legend(fontsize="x-small", loc="upper right")


def _new_figure(height: float = HEIGHT) -> Figure:
    # Not pyplot: that has a state and a backend, which are the user's.
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _steps(rows: Rows) -> Values:
    return np.array([row["step"] for row in rows], dtype=np.float64)


def _series(rows: Rows, name: str) -> Values:
    """Return a metric by step."""
    return np.array([_number(row.get(name)) for row in rows])


def _table(rows: Rows, name: str, num_entries: int) -> Values:
    """Return a metric that is a list, [entries, steps], of the steps that have so many entries."""
    lists = [row.get(name) or () for row in rows]
    missing = [None] * num_entries
    table = [values if len(values) == num_entries else missing for values in lists]
    numbers = [[_number(value) for value in values] for values in table]
    return np.array(numbers, dtype=np.float64).reshape(len(rows), num_entries).T


def _layers(rows: Rows, term: str) -> dict[str, Values]:
    """Return a term by layer, those layers that have a value in any step."""
    tables = [(row.get("layers") or {}).get(term) or {} for row in rows]
    names = dict.fromkeys(name for table in tables for name in table)
    layers = {name: np.array([_number(table.get(name)) for table in tables]) for name in names}
    return {name: values for name, values in layers.items() if _any(values)}


def _in_columns(steps: Values, values: Values) -> tuple[Values, Values]:
    """Return the edges of columns of steps, and the mean of the values [series, steps] in each."""
    count = min(len(steps), MOST_COLUMNS)
    places = np.linspace(0, len(steps), count + 1).astype(int)
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), places[:-1], axis=1)
    counts = np.add.reduceat(known.astype(np.float64), places[:-1], axis=1)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    edges = np.append(steps[places[:-1]], steps[-1] + 1) - 0.5
    return edges, means


def _any(values: Values) -> bool:
    return bool(np.isfinite(values).any())


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        row["step"] = int(row["step"])
        layers = [] if row.get("layers") is None else [*row["layers"].values()]
        lists = [row.get("gamma_bins") or [], *(table.values() for table in layers)]
        numbers = [row.get(name) for name in SINGLE_NUMBERS]
        for value in (*numbers, *(value for values in lists for value in values)):
            _number(value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: line {number} is not a step of a run ({error!r})") from None
    return row
