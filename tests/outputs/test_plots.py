"""What the plots show is what the metrics say."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.outputs import plots
from fastppt.outputs.plots import PLOTS, draw_plots, read_metrics
from fastppt.training.loop import train

NUM_BINS = 4
LAYERS = [f"up_blocks.{index}.attn2" for index in range(36)]


def row(step: int, *, with_base: bool = True, skipped: bool = False) -> dict[str, Any]:
    """Return a line of metrics.jsonl as a run with all of APT's objectives writes it."""
    part = 1 / step if with_base else None
    layers = dict.fromkeys(LAYERS, part)
    return {
        "stage": 0,
        "step": step,
        "loss": None if skipped else 1.0 + 1 / step,
        "denoising": None if skipped else 1.0,
        "anchor": 0.0,
        "grad_norm": None if skipped else 2.0 * step,
        "learning_rate": 1e-4,
        "skipped": int(skipped),
        "prediction_difference": part,
        "feature_mean": part,
        "attention_alignment": part,
        "gamma_bins": [None if index > step else index / NUM_BINS for index in range(NUM_BINS)],
        "layers": {"attention_alignment": layers, "feature_mean": {"up_blocks.0": part}},
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    return path


@pytest.mark.parametrize("num_steps", [1, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_plot_is_drawn_and_shows_something(tmp_path: Path, num_steps: int) -> None:
    rows = [row(step + 1, with_base=step % 2 == 0) for step in range(num_steps)]
    paths = draw_plots(write(tmp_path / "m.jsonl", rows), tmp_path / "plots", "a run")
    assert [path.stem for path in paths] == list(PLOTS)
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("L"), dtype=np.float64)
        assert min(pixels.shape) >= 200 and pixels.std() > 5


def test_a_run_without_a_base_pass_has_only_what_it_noted(tmp_path: Path) -> None:
    names = ("stage", "step", "loss", "denoising", "anchor", "grad_norm", "learning_rate")
    rows = [{name: row(step)[name] for name in names} for step in range(1, 5)]
    paths = draw_plots(write(tmp_path / "m.jsonl", rows), tmp_path, "a run")
    assert [path.name for path in paths] == ["losses.png", "optimizer.png"]


def test_curves_are_the_numbers_of_the_file_and_gaps_where_there_are_none() -> None:
    rows = [row(step, skipped=step == 3) for step in range(1, 9)]
    figure = plots.plot_losses(rows)
    assert figure is not None
    loss = figure.axes[0].lines[0]
    wanted = [each for each in rows if each["loss"] is not None]
    assert list(loss.get_xdata()) == [each["step"] for each in wanted]
    assert list(loss.get_ydata()) == [each["loss"] for each in wanted]
    # An anchor of zeros has no plot; a step that was left out has a mark in each.
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss", "denoising", "feature\nmean", "attention\nalignment"]
    assert all(list(axes.lines[-1].get_xdata()) == [3] for axes in figure.axes)


def test_the_smoothed_curve_is_the_mean_of_the_last_values() -> None:
    rows = [row(step) for step in range(1, 33)]
    figure = plots.plot_prediction_difference(rows)
    assert figure is not None
    raw, smooth = (line.get_ydata() for line in figure.axes[0].lines)
    wanted = [np.mean(raw[max(0, index - 3) : index + 1]) for index in range(32)]
    np.testing.assert_allclose(smooth, wanted, rtol=1e-12)


def test_the_indicator_has_a_curve_a_bin() -> None:
    rows = [row(step) for step in range(1, 6)]
    figure = plots.plot_indicator(rows)
    assert figure is not None
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == [
        "0 to 25 %",
        "25 to 50 %",
        "50 to 75 %",
        "75 to 100 %",
    ]
    assert list(lines[3].get_ydata())[2:] == [0.75] * 3
    assert all(math.isnan(value) for value in lines[3].get_ydata()[:2])


def test_stages_with_other_numbers_of_bins_have_plots_of_their_own() -> None:
    rows = [row(step) for step in range(1, 8)]
    for each in rows[5:]:
        each["gamma_bins"] = [0.5, 0.75]
    figure = plots.plot_indicator(rows)
    assert figure is not None
    first, second = figure.axes
    assert [line.get_label() for line in second.lines] == ["0 to 50 %", "50 to 100 %"]
    assert list(second.lines[1].get_ydata())[5:] == [0.75] * 2
    assert len(first.lines) == NUM_BINS
    assert all(math.isnan(value) for value in first.lines[3].get_ydata()[5:])


@pytest.mark.parametrize("num_steps", [1, 7, 400, 1003])
def test_layers_are_rows_of_the_mean_of_their_steps(num_steps: int) -> None:
    rows = [row(step + 1, with_base=step % 3 == 0) for step in range(num_steps)]
    figure = plots.plot_attention_alignment(rows)
    assert figure is not None
    (mesh,) = figure.axes[0].collections
    fields = mesh.get_array()
    assert fields is not None and fields.shape == (len(LAYERS), min(num_steps, 400))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == LAYERS
    assert fields[5, 0] == pytest.approx(1.0)
    if num_steps <= 400:
        known = ~np.ma.getmaskarray(fields)[0]
        assert list(np.flatnonzero(known)) == list(range(0, num_steps, 3))


def test_two_stages_with_layers_of_their_own_are_both_shown() -> None:
    first, second = row(1), row(2)
    second["layers"] = {"attention_alignment": {"mid_block.attn2": 0.5}}
    figure = plots.plot_attention_alignment([first, second])
    assert figure is not None
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == [*LAYERS, "mid_block.attn2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no step yet"),
        ('{"step": 1}\n{"step": ', "line 2 is not a step of a run"),
        ("[1]\n", "line 1 is not a step of a run"),
        ('{"loss": 1}\n', "line 1 is not a step of a run"),
        ('{"step": 1, "loss": "high"}\n', "line 1 is not a step of a run"),
        ('{"step": 1, "gamma_bins": [[]]}\n', "line 1 is not a step of a run"),
        ('{"step": 1, "layers": {"feature_mean": 3}}\n', "line 1 is not a step of a run"),
    ],
)
def test_damaged_metrics_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_metrics(file)


def test_plot_of_no_run_says_what_is_wanted(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plot", str(tmp_path)])
    assert result.exit_code == 2
    assert "there is no such file; give the folder of a run" in " ".join(result.output.split())


def test_a_run_draws_its_plots_and_the_command_draws_them_again(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config(**{"plots": True, "stage.0.steps": 3})
    assert config.output is not None
    result = train(config, Console(quiet=True))
    own = sorted((config.output / "plots").glob("*.png"))
    assert [path.name for path in own] == ["losses.png", "optimizer.png"]
    assert set(own) <= set(result.files)
    again = CliRunner().invoke(app, ["plot", str(config.output), "--output", str(tmp_path / "p")])
    assert again.exit_code == 0
    drawn = [Path(line) for line in again.output.split()]
    for old, new in zip(own, sorted(drawn), strict=True):
        assert np.array_equal(np.asarray(Image.open(old)), np.asarray(Image.open(new)))
