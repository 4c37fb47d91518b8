"""Runs a race's entrants in rounds, one process after the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import ROOT
from bench.networks import FULL_MODELS, build_pipeline
from bench.race_plan import EntrantPlan, Job, RacePlan
from bench.race_results import Entrant, Round
from fastppt.errors import UserError
from fastppt.families.checkpoints import without_bars
from fastppt.families.names import MINI_MODELS
from fastppt.families.sources import INDEX
from fastppt.mini import build_mini

# Of what a job that failed has written last.
LINES_SHOWN = 12
READ_BYTES = 1 << 24

Ran = tuple[int, EntrantPlan, Round]
"""The round from 0, who ran in it, and what it took."""


@dataclass(frozen=True)
class _Sampled:
    """Class images that an entrant has sampled: where they are, and the round that it did so."""

    folder: Path
    by: str
    round: Round


def prepare_model(model: str, folder: Path, device: str, dtype: torch.dtype) -> Path:
    """Return a model's diffusers folder, in the machine's memory of files as far as it fits.

    Args:
        model: That folder; or the name of a model without a file, which is written first.
        folder: Where to.
        device: Where full-size random weights are made.
        dtype: Of those.

    Raises:
        UserError: it is neither.
    """
    if model in MINI_MODELS or model in FULL_MODELS:
        if model in MINI_MODELS:
            pipeline = build_mini(model)
        else:
            pipeline = build_pipeline(model, device, dtype)
        with without_bars():
            pipeline.save_pretrained(folder)
        del pipeline
        if device == "cuda":
            torch.cuda.empty_cache()
    else:
        folder = Path(model).absolute()
        if not (folder / INDEX).is_file():
            names = ", ".join([*MINI_MODELS, *FULL_MODELS])
            raise UserError(
                f"--model {model}: is no diffusers folder (no {INDEX}), and none of {names}; "
                "download a model of the hub first, and give its folder"
            )
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            while content.read(READ_BYTES):
                pass
    return folder


def run_race(plan: RacePlan, *, until: float | None = None) -> Iterator[tuple[Ran, list[Entrant]]]:
    """Run all rounds; after each entrant yield it, and all so far, in the plan's order.

    Every other round runs backwards. Who samples the same class images in the same way shares them
    in a round: the first of them samples, and that is the time of all.

    Args:
        plan: The race.
        until: Of `time.monotonic`; what is not finished by then is left out.

    Raises:
        UserError: an entrant failed; with the last of what it wrote.
    """
    done: dict[str, list[Round]] = {}
    sampled: dict[str, _Sampled] = {}
    for number in range(plan.settings.rounds):
        if number < (plan.settings.sampling_rounds or plan.settings.rounds):
            sampled = {}
        order = plan.entrants if number % 2 == 0 else plan.entrants[::-1]
        for place, entrant in enumerate(order):
            folder = plan.work / f"round-{number + 1}-{place + 1}"
            found = _run_entrant(plan, entrant, folder, sampled, until)
            if found is None:
                return
            done.setdefault(entrant.name, []).append(found)
            yield (number, entrant, found), _collect_entrants(plan, done)


def run_job(job: Job, folder: Path, most_seconds: float | None = None) -> Round | None:
    """Do a job in a process of its own, its first step compiling anew: caches are empty.

    Args:
        job: The whole of it.
        folder: For the job's description, what it took, what it printed and what it compiled.
        most_seconds: After these it is ended.

    Returns:
        What it took; None where it was ended.

    Raises:
        UserError: it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, out, log = (folder / name for name in ("job.json", "round.json", "log.txt"))
    file.write_text(job.model_dump_json(indent=1))
    threads = str(job.settings.threads)
    compiled = folder / "compiled"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
    }
    with log.open("w") as text:
        command = [sys.executable, "-m", "bench.race_entrant", str(file), str(out)]
        try:
            process = subprocess.run(
                [*command, "--started", str(time.time())],
                cwd=ROOT,
                env=environment,
                stdout=text,
                stderr=subprocess.STDOUT,
                timeout=most_seconds,
            )
        except subprocess.TimeoutExpired:
            return None
        finally:
            shutil.rmtree(compiled, ignore_errors=True)
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-LINES_SHOWN:])
        raise UserError(f"{job.entrant.name}: failed (exit code {process.returncode}):\n{last}")
    return Round.model_validate_json(out.read_text())


def _run_entrant(
    plan: RacePlan,
    entrant: EntrantPlan,
    folder: Path,
    sampled: dict[str, _Sampled],
    until: float | None,
) -> Round | None:
    left = None if until is None else until - time.monotonic()
    if left is not None and left <= 0:
        return None
    shared = sampled.get(entrant.samples_like) if entrant.prior else None
    class_images = folder / "class-images" if shared is None else shared.folder
    output = folder / entrant.slug
    found = run_job(plan.job(entrant, output, class_images), folder, left)
    if not plan.keep:
        shutil.rmtree(output, ignore_errors=True)
    if found is None or not entrant.prior:
        return found
    if shared is not None:
        return take_class_images(found, shared.round, shared.by)
    sampled[entrant.samples_like] = _Sampled(class_images, entrant.name, found)
    return found


def take_class_images(found: Round, sampled: Round, by: str) -> Round:
    """Return a round whose class images were there already, with the time of who sampled them."""
    name = "class_images"
    joules = found.energy_joules
    if joules is not None and sampled.energy_joules is not None:
        joules = {**joules, name: sampled.energy_joules.get(name, 0.0)}
    extrapolated = {*found.extrapolated, *([name] if name in sampled.extrapolated else [])}
    changes: Mapping[str, object] = {
        "phases": {**found.phases, name: sampled.phases[name]},
        "batch_s": sampled.batch_s,
        "energy_joules": joules,
        "extrapolated": sorted(extrapolated),
        "taken_from": {name: by},
    }
    return Round.model_validate({**found.model_dump(), **changes})


def _collect_entrants(plan: RacePlan, done: Mapping[str, list[Round]]) -> list[Entrant]:
    """Return those entrants that have run, in the order of the plan."""
    return [
        Entrant(
            name=entrant.name,
            recipe=entrant.recipe,
            kind=entrant.kind,
            engine=entrant.engine,
            prior=entrant.prior,
            settings=entrant.settings(),
            note=entrant.note,
            rounds=done[entrant.name],
        )
        for entrant in plan.entrants
        if entrant.name in done
    ]
