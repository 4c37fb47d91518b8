"""What fastppt costs as one thing grows: ``python -m bench.scaling --output bench/results``.

Seconds, bytes and operations of a training step against resolution, batch, rank and number of
adapter tensors; seconds of whole runs against their steps, and against the number of subjects
taught one after the other. Each cost gets a fitted exponent with its 95 % interval, and it is said
where its points are no power law. One JSON, and a picture for each axis beside it.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from bench.machine import describe_machine
from bench.race_rounds import prepare_model
from bench.rows import Row, write_report
from bench.scaling_axes import AXES, RUNS, STEP, Axis, check_values, list_points
from bench.scaling_fits import fit
from bench.scaling_plots import draw_axis
from bench.scaling_runs import RunWork, time_runs
from bench.scaling_steps import Measured, time_axis
from bench.step_ways import MODELS, RECIPES, Source, Work, open_source
from bench.time_limit import OutOfTimeError, at_most
from fastppt.errors import UserError
from fastppt.families.loading import resolve_device, resolve_resolution
from fastppt.mini import draw_demo_photos

# The timed rounds of an axis of steps: on a CPU all points together.
SECONDS = {"cpu": 40.0, "cuda": 12.0}
# What a GPU is lent for; a CPU has time.
MOST_SECONDS = {"cpu": None, "cuda": 520.0}
MODEL = {"cpu": "mini-sdxl", "cuda": "sdxl"}
ENGINE = {"cpu": "eager", "cuda": "graph"}
# Subjects are taught by the recipe, and by prior preservation: what its class images cost is
# shared by the subjects of a class.
PRIOR_RECIPE = "lora-prior"
# Keys of a row's costs, and their units.
COSTS = {"seconds": ("p50 s", "s"), "bytes": ("peak bytes", "byte"), "flops": ("flops", "FLOP")}


def measure_axis(
    axis: Axis,
    values: Sequence[float],
    source: Source,
    runs: RunWork,
    *,
    recipe: str,
    seconds: float,
    folder: Path,
    most_seconds: float | None = None,
) -> Row:
    """Return an entry of the report's axes.

    Args:
        axis: What grows.
        values: On it.
        source: The model, and what is trained unless the axis says otherwise.
        runs: What whole runs are given.
        recipe: Of the steps and runs.
        seconds: About what timing an axis of steps may take.
        folder: For runs.
        most_seconds: Then no further point of steps is begun, nor a further round of runs.
    """
    if axis.of == STEP:
        points = list_points(axis, values, source.work, source)
        measured = time_axis(
            axis,
            points,
            source,
            recipe=recipe,
            engine=runs.engine,
            device=runs.device,
            seconds=seconds,
            most_seconds=most_seconds,
        )
    else:
        recipes = list(dict.fromkeys((recipe, PRIOR_RECIPE))) if axis.of == RUNS else [recipe]
        whole = [int(value) for value in values]
        rows = time_runs(
            axis, whole, runs, recipes=recipes, folder=folder, most_seconds=most_seconds
        )
        measured = Measured(rows, [], None)
    return {
        "axis": axis.name,
        "x": axis.x,
        "of": axis.of,
        "drift": measured.drift,
        "rows": measured.rows,
        "refused": measured.refused,
        "fits": list_fits(axis, measured.rows),
    }


def list_fits(axis: Axis, rows: Sequence[Row]) -> list[Row]:
    """Return the fits of an axis: for each recipe, of every cost that two points have or more."""
    fits: list[Row] = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        for what, (key, unit) in COSTS.items():
            points = {r["x"]: r for r in rows if r["recipe"] == recipe and r[key]}
            if len(points) < 2:
                continue
            xs = sorted(points)
            ys = [points[x][key] for x in xs]
            spread = max(_spread(points[x]) for x in xs) if what == "seconds" else 0.0
            found = fit(xs, ys, spread)
            fits.append(
                {"recipe": recipe, "what": what, "spread": spread} | found.row(unit, axis.unit)
            )
    return fits


def _spread(row: Row) -> float:
    """Return how far a time is off, relatively: half of what lies between p20 and p80."""
    return (row["p80 s"] - row["p20 s"]) / 2 / row["p50 s"]


def print_axis(axis: Row) -> None:
    print(f"{axis['axis']} ({axis['of']})")
    for row in axis["rows"]:
        line = f"  {row['recipe']:<12} {row['x']:>9} {axis['x']}: {row['p50 s']:9.4f} s "
        line += f"({row['p20 s']:.4f} to {row['p80 s']:.4f})"
        if row["peak bytes"]:
            line += f", {row['peak bytes'] / 1e9:.3f} GB {row['memory']}"
        print(line)
    for row in axis["refused"]:
        print(f"  {row['label']}: {row['refused']}")
    if axis["drift"] is not None:
        print(f"  a large product ran {axis['drift']:.2f} times as fast after it as before it")
    for found in axis["fits"]:
        print(f"  {found['recipe']}, {found['what']}: {found['in words']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the axes that are asked for; return the exit code.

    Raises:
        UserError: there is no such device, or the model has no such resolution.
    """
    options = _parse(arguments)
    resolve_device(options.device)
    # More OpenMP threads than free cores make this many times slower.
    torch.set_num_threads(1)
    machine = describe_machine(options.device)
    end = None if options.most_seconds is None else time.monotonic() + options.most_seconds
    axes: list[Row] = []
    stem = f"{options.device}-scaling-{options.model}"
    path = options.output / f"{stem}-{machine['date']}.json"
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "bench.scaling", *typed])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, runs = _open(options, folder)
        report = {"kind": "scaling", "machine": machine, "command": command}
        report |= {"settings": _settings(options, source)}
        for axis in [AXES[each] for each in options.axes]:
            left = None if end is None else end - time.monotonic()
            entry = _measure_in_time(axis, options, source, runs, folder, left)
            print_axis(entry)
            picture = path.with_name(f"{stem}-{axis.name}-{machine['date']}.png")
            if entry["rows"]:
                draw_axis(entry, picture)
            axes.append(entry | {"picture": picture.name if entry["rows"] else None})
            write_report(path, report | {"axes": axes})
    print(f"written: {path}")
    return 0 if any(entry["rows"] for entry in axes) else 1


def _measure_in_time(
    axis: Axis,
    options: argparse.Namespace,
    source: Source,
    runs: RunWork,
    folder: Path,
    left: float | None,
) -> Row:
    """Measure an axis, or say why it was not: the time was up, or the model refuses it."""
    try:
        if left is not None and left <= 0:
            raise OutOfTimeError("the time was up")
        with nullcontext() if left is None else at_most(left):
            return measure_axis(
                axis,
                options.values or axis.values(options.model),
                source,
                runs,
                recipe=options.recipe,
                seconds=options.seconds,
                folder=folder,
                # So that the points that were measured by then are kept.
                most_seconds=None if left is None else left / 2,
            )
    except (OutOfTimeError, UserError) as error:
        entry: Row = {"axis": axis.name, "x": axis.x, "of": axis.of, "drift": None, "rows": []}
        return entry | {"refused": [{"label": "all", "refused": str(error)}], "fits": []}


def _open(options: argparse.Namespace, folder: Path) -> tuple[Source, RunWork]:
    """Return the model as steps take it, and as runs do, which load it from a folder."""
    photos = folder / "photos"
    draw_demo_photos(photos)
    work = Work(options.model, options.batch_size, options.resolution, options.rank)
    source = open_source(work, options.device, photos)
    path = ""
    if any(AXES[name].of != STEP for name in options.axes):
        path = str(prepare_model(options.model, folder / "model", options.device, source.dtype))
    return source, RunWork(
        model=path,
        device=options.device,
        engine=options.engine,
        resolution=options.resolution,
        batch_size=options.batch_size,
        rank=options.rank,
        steps=options.run_steps,
        class_images=options.class_images,
        sampler_steps=options.sampler_steps,
        photos=photos,
    )


def _settings(options: argparse.Namespace, source: Source) -> Row:
    """Return what decides the numbers, of which the axes change one at a time."""
    names = ("model", "recipe", "engine", "resolution", "batch_size", "rank")
    names += ("run_steps", "class_images", "sampler_steps")
    settings = {name: getattr(options, name) for name in names}
    settings["resolution"] = resolve_resolution(options.resolution, source.make_family())
    return settings | {"precision": str(source.dtype).removeprefix("torch.")}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--model", choices=MODELS, help="default: mini-sdxl; sdxl on a GPU")
    parser.add_argument("--recipe", choices=RECIPES, default="ppt-lora")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=[*AXES], metavar="AXIS")
    parser.add_argument(
        "--values", nargs="+", type=float, help="on the axis, of which one is given"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--engine", choices=("eager", "compile", "graph", "graph+compile"))
    parser.add_argument("--resolution", type=int, help="where it is not what grows; so the others")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--run-steps", type=int, default=20, help="of each subject's run")
    parser.add_argument("--class-images", type=int, default=8, help="of the subjects' class")
    parser.add_argument("--sampler-steps", type=int, default=10, help="of each of these")
    parser.add_argument("--seconds", type=float, help="of timing an axis of steps")
    parser.add_argument("--most-seconds", type=float, help="for all of it; on a CPU no limit")
    parser.add_argument("--output", type=Path, required=True, help="folder of JSON and pictures")
    options = parser.parse_args(arguments)
    if options.values:
        if len(options.axes) != 1:
            parser.error("--values: say by --axes which one axis they are on")
        try:
            check_values(AXES[options.axes[0]], options.values)
        except ValueError as error:
            parser.error(f"--values: {error}")
    tables = {"model": MODEL, "engine": ENGINE, "seconds": SECONDS, "most_seconds": MOST_SECONDS}
    for name, by_device in tables.items():
        if getattr(options, name) is None:
            setattr(options, name, by_device[options.device])
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
