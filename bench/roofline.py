"""How near a run comes to what its machine can do: ``python -m bench.roofline --output DIR``.

Counted operations and bytes of each phase (load, class sampling, encoding; forward, backward and
update of a training step) against ceilings measured in the same run: the fastest square product of
the network's dtype, and a large copy. And where the time of a step goes, by families of kernels:
eager on the CPU, captured on a GPU. One JSON, and a picture beside it.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.kernel_families import profile_steps
from bench.machine import describe_machine
from bench.race_rounds import prepare_model
from bench.roofline_phases import Phase, measure_preparation, measure_step
from bench.roofline_plots import draw_roofline
from bench.roofline_rows import Ceilings, describe_phase, measure_ceilings, print_phases
from bench.rows import Row, write_report
from bench.step_ways import MODELS, RECIPES, Source, TrainerStep, Work, open_source
from bench.time_limit import OutOfTimeError, at_most
from bench.traffic import add_traffic
from fastppt.errors import UserError
from fastppt.families.loading import resolve_device, resolve_resolution
from fastppt.mini import draw_demo_photos

# Steps that are timed, and those that are profiled one by one.
ROUNDS = 25
PROFILED_STEPS = 5
STEP = "step"


def measure(
    source: Source, path: str, recipe: str, engine: str, *, sampler_steps: int, rounds: int
) -> Row:
    """Return ceilings, phases and profile of a recipe.

    Args:
        source: Model, photos, and what is trained.
        path: Folder of the same model.
        recipe: One of `bench.step_ways.RECIPES`.
        engine: One of the configuration's.
        sampler_steps: Of class images.
        rounds: Steps that are timed.
    """
    device = source.device.type
    ceilings = measure_ceilings(device, source.dtype)
    preparation = measure_preparation(source, path, engine, sampler_steps)
    step = TrainerStep(source, recipe, engine)
    parts = measure_step(step, device, rounds)
    rows = [_describe(phase, ceilings) for phase in (*preparation, *parts)]
    whole = _describe_step(parts, rows, ceilings)
    # The machine may be another one by now: a ceiling that fell says so.
    again = measure_ceilings(device, source.dtype)
    return {
        "ceilings": ceilings.row(),
        "ceilings at the end": again.row(),
        "phases": [*rows, whole],
        "mfu": whole["mfu"],
        "profile": {"engine": engine} | profile_steps(step, device, PROFILED_STEPS),
    }


def _describe(phase: Phase, ceilings: Ceilings) -> Row:
    return describe_phase(
        phase.name, phase.seconds, phase.flops, phase.traffic, ceilings, phase.note
    )


def _describe_step(parts: Sequence[Phase], rows: Sequence[Row], ceilings: Ceilings) -> Row:
    """Return the row of the whole step, whose floor is that of its parts, one after the other."""
    floors = {row["phase"]: row["floor s"] for row in rows}
    return describe_phase(
        STEP,
        sum(part.seconds for part in parts),
        sum(part.flops for part in parts),
        add_traffic(part.traffic for part in parts),
        ceilings,
        "the medians of its parts, added",
        sum(floors[part.name] for part in parts),
    )


def print_profile(profile: Row) -> None:
    print(f"a step by kernel family ({profile['engine']}, {profile['profiled step s']:.4f} s)")
    for row in profile["families"]:
        calls = "" if row["calls"] is None else f", {row['calls']} calls"
        print(f"  {row['family']:<26} {row['share']:6.1%}  {1e3 * row['s']:9.3f} ms{calls}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and leave one JSON; return the exit code.

    Raises:
        UserError: there is no such device, or the model cannot be trained as is asked.
    """
    options = _parse(arguments)
    resolve_device(options.device)
    # More OpenMP threads than free cores make this many times slower.
    torch.set_num_threads(1)
    machine = describe_machine(options.device)
    name = f"{options.device}-roofline-{options.model}-{machine['date']}.json"
    path = options.output / name
    start = time.monotonic()
    try:
        with at_most(options.most_seconds), tempfile.TemporaryDirectory() as folder:
            report = _measure_model(options, Path(folder))
    except OutOfTimeError:
        print(f"bench.roofline: not done in {options.most_seconds:g} s", file=sys.stderr)
        return 1
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "bench.roofline", *typed])
    report = {"kind": "roofline", "machine": machine, "command": command} | report
    report |= {"seconds": time.monotonic() - start, "picture": path.with_suffix(".png").name}
    write_report(path, report)
    draw_roofline(report, path.with_suffix(".png"))
    print_phases(report["phases"])
    print_profile(report["profile"])
    print(f"written: {path}")
    return 0


def _measure_model(options: argparse.Namespace, folder: Path) -> Row:
    photos = folder / "photos"
    draw_demo_photos(photos)
    work = Work(options.model, options.batch_size, options.resolution, options.rank)
    source = open_source(work, options.device, photos)
    path = prepare_model(options.model, folder / "model", options.device, source.dtype)
    names = ("model", "recipe", "engine", "resolution", "batch_size", "rank", "sampler_steps")
    settings = {name: getattr(options, name) for name in names}
    settings["resolution"] = resolve_resolution(options.resolution, source.make_family())
    settings["precision"] = str(source.dtype).removeprefix("torch.")
    measured = measure(
        source,
        str(path),
        options.recipe,
        options.engine,
        sampler_steps=options.sampler_steps,
        rounds=options.rounds,
    )
    return {"settings": settings} | measured


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("--model", choices=MODELS, help="default: mini-sdxl; sdxl on a GPU")
    parser.add_argument("--recipe", choices=RECIPES, default="ppt-lora")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--engine", choices=("eager", "graph", "graph+compile"))
    parser.add_argument("--resolution", type=int, help="default: the model's own")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sampler-steps", type=int, default=10, help="of class images")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps that are timed")
    parser.add_argument("--most-seconds", type=float, default=500.0, help="then it is given up")
    parser.add_argument("--output", type=Path, required=True, help="folder of JSON and picture")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.model = options.model or ("sdxl" if on_gpu else "mini-sdxl")
    options.engine = options.engine or ("graph" if on_gpu else "eager")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
