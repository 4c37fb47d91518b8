"""What whole runs cost: by their number of steps, and of subjects taught one after the other."""

import itertools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from bench.interleave import order_of_round, summarise
from bench.rows import Row
from bench.scaling_axes import RUN, Axis
from bench.step_ways import RECIPES, rank_settings
from fastppt.config_io import build_config, load_recipe
from fastppt.training.loop import train

ROUNDS, LEAST_ROUNDS = 3, 2
PRIOR = "stage.0.objectives.prior_preservation"


@dataclass(frozen=True)
class RunWork:
    """What every run of an axis is given alike.

    Attributes:
        model: As ``--model`` of the trainer takes it.
        resolution: Of the photos; None for the model's own.
        steps: Of a run, where they are not what grows.
        class_images: That a recipe with prior preservation samples.
        sampler_steps: Of each of these.
        photos: Folder with the photos of every subject: what they show costs nothing.
    """

    model: str
    device: str
    engine: str
    resolution: int | None
    batch_size: int
    rank: int
    steps: int
    class_images: int
    sampler_steps: int
    photos: Path


def time_runs(
    axis: Axis,
    values: Sequence[int],
    work: RunWork,
    *,
    recipes: Sequence[str],
    folder: Path,
    rounds: int = ROUNDS,
    most_seconds: float | None = None,
) -> list[Row]:
    """Return a row for each recipe and value, in that order: the seconds of a whole job.

    The rounds are in rotation, each first of a run that nobody times, for what the first use of
    libraries takes. Runs are in this process, whose start is in no time.

    Args:
        axis: That of steps, or that of subjects. The subjects of a round share the class images of
            their class, and the first of them draws these.
        values: How many of them.
        work: What is the same for all.
        recipes: Of `bench.step_ways.RECIPES`, or of the trainer's, with one stage each.
        folder: For runs.
        rounds: How often each value is timed, at least `LEAST_ROUNDS`.
        most_seconds: No round beyond these is begun later; None is no limit.
    """
    end = None if most_seconds is None else time.monotonic() + most_seconds
    values = sorted(values)
    taken: dict[tuple[str, int], list[float]] = {
        (recipe, value): [] for recipe in recipes for value in values
    }
    peaks: dict[str, int | None] = {}
    for recipe in recipes:
        peaks[recipe] = _run(replace(work, steps=1), recipe, folder / "warm-up", folder)
    for number in range(rounds):
        if number >= LEAST_ROUNDS and end is not None and time.monotonic() >= end:
            break
        if axis.of == RUN:
            for name in order_of_round(list(map(str, values)), number):
                for recipe in recipes:
                    runs = replace(work, steps=int(name))
                    start = time.perf_counter()
                    peaks[recipe] = _run(runs, recipe, folder / "run", folder)
                    taken[recipe, int(name)].append(time.perf_counter() - start)
        else:
            for recipe in order_of_round([*recipes], number):
                elapsed = _subjects(work, recipe, values[-1], folder)
                for value in values:
                    taken[recipe, value].append(elapsed[value - 1])
    return [
        {"recipe": recipe, "label": str(value), "x": value}
        | _percentiles(seconds)
        | {"peak bytes": peaks[recipe], "memory": None if peaks[recipe] is None else "allocated"}
        | {"flops": None}
        for (recipe, value), seconds in taken.items()
    ]


def _subjects(work: RunWork, recipe: str, count: int, folder: Path) -> list[float]:
    """Teach so many subjects one after the other; returns the seconds up to the end of each."""
    shutil.rmtree(folder / "class-images", ignore_errors=True)
    seconds = []
    for number in range(count):
        start = time.perf_counter()
        _run(work, recipe, folder / f"subject-{number}", folder)
        seconds.append(time.perf_counter() - start)
    return [*itertools.accumulate(seconds)]


def _run(work: RunWork, recipe: str, output: Path, folder: Path) -> int | None:
    """Train once; returns the most bytes that a GPU had allocated, None on the CPU."""
    name, changes = RECIPES.get(recipe, (recipe, {}))
    settings: dict[str, object] = {
        **changes,
        "model.path": work.model,
        "model.device": work.device,
        "photos.folder": str(work.photos),
        "photos.resolution": work.resolution,
        "prompts.class_noun": "robot",
        "output": str(output),
        "engine": work.engine,
        "samples.enabled": False,
        "stage.0.steps": work.steps,
        "stage.0.batch_size": work.batch_size,
        **rank_settings(name, work.rank),
    }
    if has_class_images(name):
        settings[f"{PRIOR}.num_images"] = work.class_images
        settings[f"{PRIOR}.steps"] = work.sampler_steps
        settings[f"{PRIOR}.cache"] = str(folder / "class-images")
    config = build_config(name, settings=list(settings.items()))
    result = train(config, Console(quiet=True), overwrite=True)
    return max(result.peak_memory.values(), default=None)


def has_class_images(recipe: str) -> bool:
    """Say whether a recipe's first stage has prior preservation."""
    _, table = load_recipe(recipe)
    return "prior_preservation" in table["stage"][0]["objectives"]


def _percentiles(seconds: Sequence[float]) -> Row:
    timing = summarise([*seconds])
    values = {"p20 s": timing.p20, "p50 s": timing.p50, "p80 s": timing.p80}
    return values | {"rounds": len(seconds)}
