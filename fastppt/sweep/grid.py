"""From a grid of anchor weights to a configuration for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastppt.config import RunConfig
from fastppt.config_io import RECIPES, Table, build_config, load_recipe
from fastppt.errors import UserError

DEFAULT_WEIGHTS = "0,1e-4,1e-3,1e-2,1e-1"
"""Without an anchor, and around the recipes' default, a factor of ten apart: a first look."""


@dataclass(frozen=True)
class Point:
    """One weight of the grid.

    Attributes:
        weight: Of every anchor of the run.
        config: The run's.
    """

    weight: float
    config: RunConfig


def parse_weights(text: str) -> list[float]:
    """Return the weights of a grid such as ``0,1e-3,1e-2``.

    Raises:
        UserError: one is no number from 0 on, there are fewer than two, or they do not increase.
    """
    weights: list[float] = []
    for word in text.split(","):
        try:
            weight = float(word)
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(
                f"--weights {text}: {word.strip() or 'nothing'!r} is no weight; give numbers "
                "from 0 on, such as 0,1e-3,1e-2"
            )
        if weights and weight <= weights[-1]:
            raise UserError(
                f"--weights {text}: must increase, and {weight:g} comes after {weights[-1]:g}"
            )
        # Minus zero would name another folder.
        weights.append(abs(weight))
    if len(weights) < 2:
        raise UserError(f"--weights {text}: a sweep compares; give two weights or more")
    return weights


def make_grid(
    recipe: str | None,
    file: Path | None,
    settings: Sequence[tuple[str, Any]],
    stages: Sequence[Table],
    weights: Sequence[float],
    output: Path,
) -> list[Point]:
    """Return the runs of a sweep, one a weight; all of them are checked, and none is started.

    Args:
        recipe: As of `build_config`.
        file: Likewise.
        settings: Likewise.
        stages: Of the run, as `stage_tables` returns them.
        weights: Of the anchor.
        output: Folder of the sweep; a run has one of its own in there.

    Raises:
        UserError: no stage has an anchor, or a configuration is refused.
    """
    keys = [
        f"stage.{index}.objectives.anchor.weight"
        for index, stage in enumerate(stages)
        if isinstance(tables := stage.get("objectives"), dict) and "anchor" in tables
    ]
    if not keys:
        raise _no_anchor(build_config(recipe, file, settings))
    points = []
    for weight in weights:
        own = [(key, weight) for key in keys] + [("output", str(run_folder(output, weight)))]
        points.append(Point(weight, build_config(recipe, file, [*settings, *own])))
    return points


def run_folder(output: Path, weight: float) -> Path:
    """Return the folder of one weight's run, such as ``weight-0.001``; no two weights share one."""
    return output / f"weight-{repr(weight).removesuffix('.0')}"


def shared_settings(config: RunConfig) -> Table:
    """Return what the runs of a sweep have in common, as JSON has it: all but weight and output."""
    table = config.model_dump(mode="json", exclude={"output"})
    for stage in table["stage"]:
        if stage["objectives"]["anchor"] is not None:
            del stage["objectives"]["anchor"]["weight"]
    return table


def _no_anchor(config: RunConfig) -> UserError:
    """Return what refuses a run without an anchor."""
    having = [
        name
        for name in RECIPES
        if any("anchor" in stage["objectives"] for stage in load_recipe(name)[1]["stage"])
    ]
    return UserError(
        f"{config.method}: has no anchor whose weight could be swept; take a recipe that has one "
        f"({', '.join(having)}), or add one with --set stage.0.objectives.anchor.form=effective"
    )
