"""The command `fastppt sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastppt import flags
from fastppt.config_io import stage_tables
from fastppt.console import SafeConsole
from fastppt.endings import interruptions
from fastppt.errors import UserError
from fastppt.faults import user_errors
from fastppt.sweep.grid import DEFAULT_WEIGHTS, make_grid, parse_weights
from fastppt.training.interrupt import NOTHING_TRAINED, Interrupted, ended_at_once, raised_at_once

GO_ON = "the same `fastppt sweep` goes on with it and with the weights after it"


def sweep(
    run: flags.Config = None,
    recipe: flags.Recipe = None,
    weights: Annotated[
        str, typer.Option(help="Anchor weights, from 0 on and increasing.")
    ] = DEFAULT_WEIGHTS,
    model: flags.Model = None,
    revision: flags.Revision = None,
    variant: flags.Variant = None,
    model_config: flags.ModelFolder = None,
    photos: flags.Photos = None,
    captions: flags.Captions = None,
    class_noun: flags.ClassNoun = None,
    token: flags.Token = None,
    output: flags.Output = None,
    steps: flags.Steps = None,
    seed: flags.Seed = None,
    resolution: flags.Resolution = None,
    batch_size: flags.BatchSize = None,
    rank: flags.Rank = None,
    learning_rate: flags.LearningRate = None,
    engine: flags.EngineName = None,
    gradient_checkpointing: flags.GradientCheckpointing = None,
    device: flags.Device = None,
    precision: flags.Precision = None,
    samples: flags.Samples = None,
    settings: flags.Settings = None,
) -> None:
    """Train a run once for each of several anchor weights, and compare what it gains and loses."""
    given = locals()
    console = SafeConsole()
    with user_errors(output), interruptions():
        changes = [*flags.flag_settings(given), *flags.set_settings(settings)]
        stages = stage_tables(recipe, run, changes)
        changes = [*flags.stage_settings(given, stages), *changes]
        grid_weights = parse_weights(weights)
        if output is None:
            raise UserError("a sweep needs --output: a folder for its runs and what they come to")
        grid = make_grid(recipe, run, changes, stages, grid_weights, output)
        with ended_at_once(NOTHING_TRAINED):
            from fastppt.sweep.report import draw_sweep, make_table
            from fastppt.sweep.runs import RESULT_FILE, run_sweep

        try:
            with raised_at_once("nothing more is trained"):
                found = run_sweep(grid, output, console)
        except Interrupted:
            console.print(GO_ON)
            raise
        picture = output / Path(RESULT_FILE).with_suffix(".png")
        draw_sweep(found, picture)
        console.print(make_table(found))
        console.print("wrote:")
        for path in (output / RESULT_FILE, picture):
            console.print(f"  {path}", soft_wrap=True, markup=False)
