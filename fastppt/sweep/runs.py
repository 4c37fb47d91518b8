"""The runs of a sweep, one after the other, and what each has come to."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastppt.config_io import Table
from fastppt.errors import UserError
from fastppt.evaluation.exam import EvaluationSettings
from fastppt.evaluation.runs import evaluate_runs
from fastppt.families.names import WORLD_MODEL
from fastppt.mini.world import NOUNS
from fastppt.outputs.files import write_file
from fastppt.outputs.folder import RunFolder
from fastppt.outputs.lock import lock_output
from fastppt.outputs.plots import read_metrics
from fastppt.sweep.grid import Point, run_folder, shared_settings
from fastppt.sweep.measures import (
    Predictions,
    noise_differences,
    parameter_drift,
    predict_both,
    subject_loss,
)
from fastppt.training.loop import resume, train

RESULT_FILE = "sweep.json"

JUDGED = ("subject_fidelity", "class_similarity", "class_noise", "other_noise", "other_all")
"""What is told of an evaluation's measures, where there is one."""

JUDGED_SAMPLES = 32
"""Pictures a set of prompts of that evaluation: enough to see a trend, in little time."""


@dataclass(frozen=True)
class Outcome:
    """What one weight has come to. None is what was not measured, or has no meaning.

    Attributes:
        weight: Of the anchor.
        folder: Of the run, in that of the sweep.
        subject_loss: As `fastppt.sweep.measures` has it, and the next three.
        parameter_drift: Likewise.
        class_noise: Likewise.
        no_prompt_noise: Likewise.
        judged: What the mini world's judge says, by measure; where the model is not of that world,
            nothing.
    """

    weight: float
    folder: str
    subject_loss: float | None
    parameter_drift: float | None
    class_noise: float
    no_prompt_noise: float
    judged: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """A whole sweep.

    Attributes:
        outcomes: By weight.
        base: What the judge says of the base, as `Outcome.judged`.
    """

    outcomes: list[Outcome]
    base: dict[str, float]


def run_sweep(grid: Sequence[Point], output: Path, console: Console) -> Sweep:
    """Train every weight of a grid and measure what came of it; what is there already is kept.

    Runs that are finished are kept, one that was interrupted goes on, and weights that are in the
    folder but not in the grid stay as they are.

    Args:
        grid: Of `make_grid`.
        output: Folder of the sweep.
        console: For the runs' progress.

    Returns:
        The outcomes of the grid, which `RESULT_FILE` in the folder holds as well.

    Raises:
        UserError: the folder holds a sweep of other settings, or as `train`.
        Interrupted: as `train`; the same sweep goes on from there.
    """
    with lock_output(output, console):
        settings = shared_settings(grid[0].config)
        outcomes = _read_outcomes(output, settings)
        if not outcomes:
            # Before the first run: whatever ends that, this says what it was trained by.
            _write(output, settings, Sweep([], {}))
        base: Predictions | None = None
        for number, point in enumerate(grid, start=1):
            folder = run_folder(output, point.weight)
            console.print(f"weight {point.weight:g} ({number} of {len(grid)}): {folder}")
            trained = _train(point, folder, console)
            if not trained and point.weight in outcomes:
                continue
            base, tuned = predict_both(point.config, folder, base)
            outcomes[point.weight] = _outcome(point, folder, base, tuned)
            _write(output, settings, Sweep(_ordered(outcomes), {}))
            _free_memory()
        sweep = Sweep([outcomes[point.weight] for point in grid], _read_base(output))
        # A sweep may have been ended after its last run and before its judgement.
        if not sweep.base or any(not outcome.judged for outcome in sweep.outcomes):
            sweep = _judge(grid, sweep, output, console)
        everything = outcomes | {outcome.weight: outcome for outcome in sweep.outcomes}
        _write(output, settings, Sweep(_ordered(everything), sweep.base))
        return sweep


def _train(point: Point, folder: Path, console: Console) -> bool:
    """Train a weight, or go on with it; say whether there was something to do."""
    if not RunFolder(folder).config.exists():
        try:
            train(point.config, console)
        except UserError:
            if not _has_runs(folder.parent):
                (folder.parent / RESULT_FILE).unlink()
            raise
        return True
    return resume(folder, [], console) is not None


def _outcome(point: Point, folder: Path, base: Predictions, tuned: Predictions) -> Outcome:
    rows = read_metrics(RunFolder(folder).metrics)
    stages = enumerate(point.config.stage)
    held = max(index for index, stage in stages if stage.objectives.anchor is not None)
    drift = parameter_drift([row for row in rows if row["stage"] == held], point.weight)
    noise = noise_differences(base, tuned)
    return Outcome(point.weight, folder.name, subject_loss(rows), drift, **noise, judged={})


def _judge(grid: Sequence[Point], sweep: Sweep, output: Path, console: Console) -> Sweep:
    """Let the judge of the mini world look at the runs, where they draw that world."""
    config = grid[0].config
    judged = config.model.path == WORLD_MODEL and config.model.vae is None
    if not judged or config.prompts.class_noun not in NOUNS:
        return sweep
    folders = [run_folder(output, point.weight) for point in grid]
    evaluation = evaluate_runs(
        folders,
        EvaluationSettings(samples=JUDGED_SAMPLES),
        config.photos.folder,
        lambda line: console.print(line, markup=False),
    )
    told = [
        {name: run.scores[name].value for name in JUDGED if name in run.scores}
        for run in evaluation.runs
    ]
    outcomes = [
        Outcome(**{**asdict(outcome), "judged": each})
        for outcome, each in zip(sweep.outcomes, told, strict=True)
    ]
    of_base = evaluation.base_scores
    return Sweep(outcomes, {name: of_base[name].value for name in JUDGED if name in of_base})


def _read(output: Path) -> dict[str, Any]:
    """Return what a sweep's file says, its outcomes by weight; nothing where there is none.

    Raises:
        UserError: it is no such file.
    """
    path = output / RESULT_FILE
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        table["outcomes"] = {row["weight"]: Outcome(**row) for row in table["outcomes"]}
        if {"settings", "base"} <= table.keys():
            return table
        fault = "its keys are others"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        fault = repr(error)
    raise UserError(
        f"{path}: is no result of a sweep ({fault}); delete it, or choose another folder"
    )


def _read_outcomes(output: Path, settings: Table) -> dict[float, Outcome]:
    """Return what was found before, by weight.

    Raises:
        UserError: the folder holds a sweep of other settings; the first that differs is named.
    """
    table = _read(output)
    # Without a run the folder holds no more than a wish.
    if not table or not _has_runs(output):
        return {}
    wanted, found = (_flat(each) for each in (settings, table["settings"]))
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise UserError(
                f"output {output}: holds a sweep with {key} = {found.get(key)!r}, and this one has "
                f"{wanted.get(key)!r}; choose another folder"
            )
    outcomes: dict[float, Outcome] = table["outcomes"]
    return outcomes


def _has_runs(output: Path) -> bool:
    """Say whether a run has begun in the folder of a sweep."""
    return any(RunFolder(folder).config.exists() for folder in output.glob("weight-*"))


def _read_base(output: Path) -> dict[str, float]:
    base: dict[str, float] = _read(output).get("base", {})
    return base


def _write(output: Path, settings: Table, sweep: Sweep) -> None:
    table = {"settings": settings, **asdict(sweep)}
    write_file(output / RESULT_FILE, json.dumps(table, indent=1) + "\n")


def _ordered(outcomes: dict[float, Outcome]) -> list[Outcome]:
    return [outcomes[weight] for weight in sorted(outcomes)]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return a nested table as dotted keys and values."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        nested = (_flat(each, f"{key}.{name}" if key else str(name)) for name, each in parts)
        return {name: each for table in nested for name, each in table.items()}
    return {key: value}


def _free_memory() -> None:
    """Give back what a run's model took, so that the next one's fits."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
