"""What each option of a run costs a step: ``python -m bench.options --out bench/results``.

Whole runs of the trainer in rotation, as a user starts them; their steps alone are timed, the first
one not. Where an option promises the same gradients, its losses are compared with those of the run
without it before anything is reported.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from bench.interleave import order_of_round, summarise
from bench.machine import describe_machine
from bench.problems import DisagreementError
from bench.rows import Row, write_report
from fastppt.config_io import build_config
from fastppt.mini import draw_demo_photos
from fastppt.training.loop import train
from fastppt.training.result import RunResult

ROUNDS = 5
# The steps after the first: a multiple of every `base_every` and `refresh_every` below.
TIMED_STEPS = 32
RANK = 32
SAME_LOSSES = 1e-4

OBJECTIVES = "stage.0.objectives"
Settings = Mapping[str, object]
ADAPTIVE: Settings = {f"{OBJECTIVES}.denoising.weighting": "adaptive"}
FEATURES: Settings = {f"{OBJECTIVES}.feature_alignment.weight": 30.0}
ATTENTION: Settings = {f"{OBJECTIVES}.attention_alignment.weight": 3e-4}
APT: Settings = {**ADAPTIVE, **FEATURES, **ATTENTION}

PLAIN, CHECKPOINTED = "recipe `lora`", "`gradient_checkpointing`"
# What is laid over the recipe `lora`, by what a reader knows it as.
OPTIONS: dict[str, Settings] = {
    PLAIN: {},
    "`lora.targets=up`": {"stage.0.trainables.lora.targets": "up"},
    CHECKPOINTED: {"gradient_checkpointing": True},
    "`denoising.weighting=adaptive`": ADAPTIVE,
    "`feature_alignment`": FEATURES,
    "`attention_alignment`": ATTENTION,
    "all three": APT,
    "all three, `base_every=2`": {**APT, "stage.0.base_every": 2},
    "all three, `base_every=4`": {**APT, "stage.0.base_every": 4},
    "all three, `photos.refresh_every=16`": {**APT, "photos.refresh_every": 16},
}


def time_options(model: str, resolution: int | None, folder: Path) -> list[Row]:
    """Return a row for each option.

    Args:
        model: As ``--model`` takes it.
        resolution: Side of the photos in pixels; None for the model's own.
        folder: For photos and runs.

    Raises:
        DisagreementError: gradient checkpointing changed the losses.
    """
    draw_demo_photos(folder / "photos")
    names = list(OPTIONS)
    taken: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, RunResult] = {}
    losses: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        for name in order_of_round(names, number):
            results[name] = result = _run(model, resolution, folder, OPTIONS[name])
            taken[name].append(1e3 * result.seconds["train"] / TIMED_STEPS)
            losses[name] = _read_losses(result)
        check_losses(losses[CHECKPOINTED], losses[PLAIN])
    timings = {name: summarise(milliseconds) for name, milliseconds in taken.items()}
    return [
        {"suite": "options", "model": model, "batch": 1, "rank": RANK, "way": name}
        | {"resolution": results[name].config.photos.resolution}
        | {"engine": results[name].config.engine}
        | {"p20 ms": timing.p20, "p50 ms": timing.p50, "p80 ms": timing.p80}
        | {"rounds": ROUNDS, "times ours": timing.times(timings[PLAIN])}
        | {"peak bytes": results[name].peak_memory.get("train")}
        for name, timing in timings.items()
    ]


def check_losses(found: Sequence[float], wanted: Sequence[float]) -> None:
    """Refuse to report an option that changed what it must not.

    Raises:
        DisagreementError: a step's loss is more than `SAME_LOSSES` off, relatively.
    """
    for one, other in zip(found, wanted, strict=True):
        error = abs(one / other - 1)
        # A NaN is past every tolerance.
        if not error <= SAME_LOSSES:
            raise DisagreementError(
                f"{CHECKPOINTED}: a loss is {error:.2g} off, so nothing is reported"
            )


def _run(model: str, resolution: int | None, folder: Path, changes: Settings) -> RunResult:
    settings: Settings = {
        "model.path": model,
        "photos.folder": str(folder / "photos"),
        "photos.resolution": resolution,
        "prompts.class_noun": "robot",
        "output": str(folder / "run"),
        "samples.enabled": False,
        "stage.0.steps": 1 + TIMED_STEPS,
        "stage.0.trainables.lora.rank": RANK,
        **changes,
    }
    config = build_config("lora", settings=list(settings.items()))
    return train(config, Console(quiet=True), overwrite=True)


def _read_losses(result: RunResult) -> list[float]:
    lines = result.folder.metrics.read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.options", description=__doc__)
    parser.add_argument("--model", default="mini-sdxl")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    options = parser.parse_args(arguments)
    # More OpenMP threads than free cores make this many times slower.
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = describe_machine(device)
    with tempfile.TemporaryDirectory() as folder:
        rows = time_options(options.model, options.resolution, Path(folder))
    for row in rows:
        print(f"  {row['way']:<40} {row['p50 ms']:9.2f} ms  x{row['times ours']:.2f}")
    path = options.out / f"{device}-options-{machine['date']}.json"
    write_report(path, {"machine": machine, "rows": rows})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
