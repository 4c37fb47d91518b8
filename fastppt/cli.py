"""The command line: one function a command. Each imports the heavy libraries that it uses."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from fastppt import __version__, flags
from fastppt.config_io import build_config, render_toml, stage_tables
from fastppt.console import SafeConsole, SafeFormatter, printable, silence
from fastppt.endings import interruptions, print_result
from fastppt.faults import report, report_thread, user_errors
from fastppt.garbage import without_what_there_is
from fastppt.recipe_list import print_recipe, print_recipes
from fastppt.sweep.command import sweep
from fastppt.training.interrupt import (
    NOT_DONE,
    NOT_YET_RESUMED,
    NOTHING_TRAINED,
    ended_at_once,
    raised_at_once,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Teach a text-to-image model one subject without letting it forget the rest.",
)


def finite(value: float | None) -> float | None:
    """Refuse infinity, which an option without an upper bound lets in."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number, got {value:g}")
    return value


def main() -> None:
    """Run the command line; a mistake of the user's is one message and exit code 2."""
    # transformers announces at import which of its image processors it cannot use; none is used.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name need not be text in any encoding.
            stream.reconfigure(errors="backslashreplace")
    warnings = logging.StreamHandler()
    warnings.setFormatter(SafeFormatter())
    logging.getLogger("fastppt").addHandler(warnings)
    threading.excepthook = report_thread
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    # Commands report their own; what is left is `--help`, and the last of what was printed.
    except Exception as error:
        code = report(error)
        silence(sys.stdout)
        sys.exit(code)


@app.command()
def train(
    run: flags.Config = None,
    recipe: flags.Recipe = None,
    model: flags.Model = None,
    revision: flags.Revision = None,
    variant: flags.Variant = None,
    model_config: flags.ModelFolder = None,
    vae: flags.Vae = None,
    attention: flags.Attention = None,
    photos: flags.Photos = None,
    captions: flags.Captions = None,
    buckets: flags.Buckets = None,
    class_noun: flags.ClassNoun = None,
    token: flags.Token = None,
    output: flags.Output = None,
    name: flags.Name = None,
    steps: flags.Steps = None,
    seed: flags.Seed = None,
    resolution: flags.Resolution = None,
    batch_size: flags.BatchSize = None,
    rank: flags.Rank = None,
    learning_rate: flags.LearningRate = None,
    anchor_weight: flags.AnchorWeight = None,
    class_images: flags.ClassImages = None,
    num_class_images: flags.NumClassImages = None,
    init_lora: flags.InitLora = None,
    engine: flags.EngineName = None,
    gradient_checkpointing: flags.GradientCheckpointing = None,
    deterministic: flags.Deterministic = None,
    device: flags.Device = None,
    precision: flags.Precision = None,
    log_every: flags.LogEvery = None,
    sample_every: flags.SampleEvery = None,
    checkpoint_every: flags.CheckpointEvery = None,
    keep_checkpoints: flags.KeepCheckpoints = None,
    samples: flags.Samples = None,
    save_dtype: flags.SaveDtype = None,
    tensorboard: flags.Tensorboard = None,
    plots: flags.Plots = None,
    settings: flags.Settings = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Output folder of a run, or a checkpoint in it, to go on with."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run that the output folder holds.")
    ] = False,
) -> None:
    """Teach a model one subject from a folder of photos."""
    given = locals()
    console = SafeConsole()
    with user_errors(output) as place, interruptions():
        changes = [*flags.flag_settings(given), *flags.set_settings(settings)]
        if resume is not None:
            flags.check_resume_flags(run, recipe, overwrite)
            with ended_at_once(NOT_YET_RESUMED):
                from fastppt.training.loop import resume as resume_run
                from fastppt.training.resume import find_run

            run_folder = find_run(resume)[0]
            place.folder = run_folder.root
            stages = stage_tables(file=run_folder.config, settings=changes)
            changes = [*flags.stage_settings(given, stages), *changes]
            with without_what_there_is():
                resumed = resume_run(resume, changes, console)
            if resumed is not None:
                print_result(resumed, console)
            return
        stages = stage_tables(recipe, run, changes)
        changes = [*flags.stage_settings(given, stages), *changes]
        config = build_config(recipe, run, changes)
        place.folder = config.output
        with ended_at_once(NOTHING_TRAINED):
            from fastppt.training.loop import train as train_run

        with without_what_there_is():
            result = train_run(config, console, overwrite=overwrite)
        print_result(result, console)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    run: Annotated[
        Path | None, typer.Option(help="Folder of a finished run, or a checkpoint of one.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="LoRA file, or the folder of a run that trained a LoRA.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**62, help="Of the first picture; the next count on."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps.")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=0.0, callback=finite, help="Classifier-free guidance scale."),
    ] = None,
    resolution: Annotated[int | None, typer.Option(min=8, help="Side in pixels.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the pictures (default: generated, in the run's folder)."),
    ] = None,
    embedding: Annotated[
        Path | None,
        typer.Option(help="Embedding file of a learned word (default: the LoRA's, beside it)."),
    ] = None,
    model: flags.Model = None,
    revision: flags.Revision = None,
    variant: flags.Variant = None,
    model_config: flags.ModelFolder = None,
    vae: flags.Vae = None,
    attention: flags.Attention = None,
    device: flags.Device = None,
    precision: flags.Precision = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the table `model`."),
    ] = None,
) -> None:
    """Draw pictures with what a run has trained, or with a LoRA file."""
    given = locals()
    with user_errors(output), interruptions():
        model_settings = flags.model_settings(given, settings)
        with ended_at_once(NOT_DONE):
            from fastppt.outputs.generate import generate as generate_pictures

        with raised_at_once(NOT_DONE):
            paths = generate_pictures(
                lora,
                prompt,
                run=run,
                count=count,
                seed=seed,
                steps=steps,
                guidance_scale=guidance_scale,
                resolution=resolution,
                output=output,
                model=model_settings,
                embedding=embedding,
            )
        for path in paths:
            print(printable(str(path)))


@app.command()
def convert(
    file: Annotated[
        Path,
        typer.Argument(help="LoRA file, folder of a finished run, or a folder that peft saved."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORM", help="kohya, diffusers or peft.")],
    output: Annotated[
        Path | None, typer.Option(help="File, or folder for peft (default: beside FILE).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16 (default: as in FILE).")
    ] = None,
) -> None:
    """Write a LoRA in another form, bit for bit."""
    with user_errors(), interruptions():
        with ended_at_once(NOT_DONE):
            from fastppt.outputs.convert import convert as convert_lora

        with raised_at_once(NOT_DONE):
            path = convert_lora(file, to, output, dtype)
        print(printable(str(path)))


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a run, finished or not.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the pictures (default: OUT/plots).")
    ] = None,
) -> None:
    """Draw what a run noted: losses, by layer too, the overfitting indicator, the optimizer."""
    with user_errors(), interruptions():
        with ended_at_once(NOT_DONE):
            from fastppt.outputs.folder import RunFolder
            from fastppt.outputs.plots import draw_plots

        folder = RunFolder(run)
        with raised_at_once(NOT_DONE):
            paths = draw_plots(folder.metrics, output or folder.plots, run.resolve().name)
        for path in paths:
            print(printable(str(path)))


@app.command()
def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="OUT...", help="Folders of finished runs of one subject."),
    ],
    samples: Annotated[int, typer.Option(min=8, help="Pictures a set of prompts.")] = 64,
    sampler_steps: Annotated[int, typer.Option(min=1, help="Sampler steps of a picture.")] = 20,
    guidance_scale: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="Classifier-free guidance scale.")
    ] = 4.0,
    seed: Annotated[
        int, typer.Option(min=0, max=10**9, help="The same seed asks and draws the same.")
    ] = 0,
    photos: Annotated[
        Path | None, typer.Option(help="The subject's photos (default: as the runs recorded it).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for one report of all runs (default: one in each run's own)."),
    ] = None,
) -> None:
    """Measure runs on the mini world's model: the subject learned, and the rest not forgotten."""
    with user_errors(output), interruptions():
        with ended_at_once(NOT_DONE):
            from fastppt.evaluation.exam import EvaluationSettings
            from fastppt.evaluation.report import make_table, write_reports
            from fastppt.evaluation.runs import evaluate_runs
            from fastppt.outputs.lock import check_place

        if output is not None:
            check_place(output)
        console = SafeConsole()
        settings = EvaluationSettings(samples, sampler_steps, guidance_scale, seed)
        with raised_at_once(NOT_DONE):
            evaluation = evaluate_runs(
                runs, settings, photos, lambda line: console.print(line, markup=False)
            )
            # First: minutes of measuring are not lost where a file cannot be written.
            console.print(make_table(evaluation))
            paths = write_reports(evaluation, output)
        for path in paths:
            print(printable(str(path)))


app.command()(sweep)


@app.command()
def info(
    file: Annotated[
        Path,
        typer.Argument(
            help="LoRA or embedding file, folder of a finished run, or a folder that peft saved."
        ),
    ],
) -> None:
    """Print what a LoRA or an embedding is: family, rank, targets, what it adds, metadata."""
    with user_errors(), ended_at_once(NOT_DONE):
        from fastppt.outputs.info import print_info, read_info

        print_info(read_info(file), SafeConsole())


@app.command()
def doctor(
    run: flags.Config = None,
    model: flags.Model = None,
    revision: flags.Revision = None,
    variant: flags.Variant = None,
    model_config: flags.ModelFolder = None,
    vae: flags.Vae = None,
    attention: flags.Attention = None,
    output: flags.Output = None,
    engine: flags.EngineName = None,
    gradient_checkpointing: flags.GradientCheckpointing = None,
    device: flags.Device = None,
    precision: flags.Precision = None,
    settings: flags.Settings = None,
) -> None:
    """Say what is here, and whether a training (of --model) could start; exits with 1 if not."""
    given = locals()
    with user_errors(), ended_at_once(NOT_DONE):
        config = build_config(
            None, run, [*flags.flag_settings(given), *flags.set_settings(settings)]
        )
        from fastppt.doctor import can_train, examine, print_report

        report = examine(config)
        print_report(report, SafeConsole())
        if not can_train(report):
            raise typer.Exit(code=1)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Say where this one is from, and show it.")
    ] = None,
) -> None:
    """List the recipes, one published method each, and the families of models that they are for."""
    with user_errors():
        if name is None:
            print_recipes()
        else:
            print_recipe(name)


@app.command()
def config(
    run: flags.Config = None, recipe: flags.Recipe = None, settings: flags.Settings = None
) -> None:
    """Print a whole run as commented TOML, which `fastppt train` takes back."""
    with user_errors():
        print(render_toml(build_config(recipe, run, flags.set_settings(settings))), end="")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fastppt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass
