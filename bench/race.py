"""The race: the whole job by several ways, on one machine in one go: ``python -m bench.race``.

From the first file read to the last file written: a diffusers-style job with prior preservation,
and our recipes. Each entrant has a process of its own; the rounds are interleaved, and every other
one runs backwards. The JSON that is left has every phase of every round, and the ratios.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from bench.machine import describe_machine
from bench.race_plan import (
    ALL_RECIPES,
    ENGINES,
    LEAST_SAMPLED,
    LEAST_TRAINED,
    SAMPLING_BATCH,
    RacePlan,
    check_part,
    list_entrants,
    recipes_for,
)
from bench.race_ratios import make_report
from bench.race_results import RaceSettings, write_race
from bench.race_rounds import prepare_model, run_race
from bench.race_words import describe_race, describe_round
from fastppt.config import ModelConfig
from fastppt.data.photos import find_photos
from fastppt.errors import UserError
from fastppt.families.loading import (
    outline_family,
    resolve_device,
    resolve_dtype,
    resolve_resolution,
)
from fastppt.mini import draw_demo_photos
from fastppt.training.engine import why_not

RECIPES_HELP = f"Comma-separated; unset: {', '.join(ALL_RECIPES)}, those for the model's family."

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def race(
    output: Annotated[Path, typer.Option(help="Folder of the JSON.")],
    model: Annotated[
        str, typer.Option(help="Diffusers folder, mini model, or sd15, sdxl, sd3-medium (random).")
    ] = "mini-sdxl",
    recipes: Annotated[str | None, typer.Option(help=RECIPES_HELP)] = None,
    engines: Annotated[
        str | None, typer.Option(help="Comma-separated; unset: eager, on a GPU graph too.")
    ] = None,
    steps: Annotated[int, typer.Option(min=3, help="Training steps.")] = 200,
    class_images: Annotated[int, typer.Option(min=1, help="Of prior preservation.")] = 100,
    sampler_steps: Annotated[
        int | None, typer.Option(min=1, help="Of each of them; unset: the pipeline's default.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos in a step.")] = 1,
    resolution: Annotated[int | None, typer.Option(help="Pixels; unset: the model's.")] = None,
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Of the network.")
    ] = "auto",
    rank: Annotated[int, typer.Option(min=1, help="Of every LoRA.")] = 32,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often each entrant runs; of one, steps have a spread.")
    ] = 1,
    sampling_rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds that sample class images; unset: all.")
    ] = None,
    sampled_images: Annotated[
        int | None, typer.Option(help="Sample so many, extrapolate the others; unset: all.")
    ] = None,
    trained_steps: Annotated[
        int | None, typer.Option(help="Train so many, extrapolate the others; unset: all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every entrant.")] = 0,
    photos: Annotated[Path | None, typer.Option(help="Folder; unset: drawn ones.")] = None,
    class_noun: Annotated[str, typer.Option(help="What they show.")] = "robot",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each entrant.")] = 1,
    label: Annotated[
        str | None, typer.Option(help="In the file's name: tables show the latest race of each.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep what jobs write in this new folder; unset: delete it.")
    ] = None,
) -> None:
    """Run a race, print it, and leave its JSON in the output folder."""
    check_part("sampled-images", sampled_images, class_images, LEAST_SAMPLED, SAMPLING_BATCH)
    check_part("trained-steps", trained_steps, steps, LEAST_TRAINED)
    check_label(label)
    check_work(work)
    place = resolve_device(device)
    dtype = resolve_dtype(precision, place)
    with tempfile.TemporaryDirectory(prefix="fastppt-race-") as temporary:
        folder = Path(temporary) if work is None else work
        source = prepare_model(model, folder / "model", place.type, dtype)
        family = outline_family(ModelConfig(path=str(source), device=place.type), dtype)
        assert family is not None
        if photos is None:
            photos = folder / "photos"
            draw_demo_photos(photos)
        chosen = list(ENGINES[place.type]) if engines is None else split(engines)
        check_engines(chosen, place)
        settings = RaceSettings(
            model=model,
            family=family.name,
            resolution=resolve_resolution(resolution, family),
            batch_size=batch_size,
            precision=str(dtype).removeprefix("torch."),
            rank=rank,
            steps=steps,
            class_images=class_images,
            sampler_steps=sampler_steps or family.sampler_steps,
            guidance_scale=(family.sampler_guidance if guidance_scale is None else guidance_scale),
            num_photos=len(find_photos(photos)),
            seed=seed,
            rounds=rounds,
            sampling_rounds=sampling_rounds,
            threads=threads,
        )
        wanted = recipes_for(family.name) if recipes is None else split(recipes)
        plan = RacePlan(
            settings=settings,
            entrants=list_entrants(wanted, chosen, family.name),
            model=str(source),
            device=place.type,
            photos=photos.absolute(),
            class_noun=class_noun,
            work=folder.absolute(),
            keep=work is not None,
            sampled_images=sampled_images,
            trained_steps=trained_steps,
        )
        machine = describe_machine(place.type)
        # What each entrant is given, not this process.
        machine["threads"] = threads
        parts = [Path(model).absolute().name, *([label] if label else []), str(machine["date"])]
        path = output / f"{place.type}-race-{'-'.join(parts)}.json"
        for last, entrants in run_race(plan):
            print(describe_round(*last), flush=True)
            report = make_report(machine, settings, entrants, command(), label or "")
            write_race(path, report)
    print(describe_race(report))
    print(f"written: {path}")


def split(names: str) -> list[str]:
    """Return the names of a comma-separated list, each once."""
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def check_label(label: str | None) -> None:
    """Refuse what would make the file's name another one's, or no name at all.

    Raises:
        UserError: names the label.
    """
    if label is not None and not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", label):
        raise UserError(f"--label {label}: give small letters, digits and hyphens, a letter first")


def check_work(work: Path | None) -> None:
    """Refuse a folder with files in it: class images of an earlier race would not be sampled.

    Raises:
        UserError: names the folder.
    """
    if work is not None and work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise UserError(f"--work {work}: is no empty folder; give another one, or delete it")


def check_engines(names: list[str], device: torch.device) -> None:
    """Refuse an engine that there is not, or not on the device.

    Raises:
        UserError: with the reason.
    """
    known = ("eager", "compile", "graph", "graph+compile")
    for name in names:
        if name not in known:
            raise UserError(f"--engines {name}: is none; there are {', '.join(known)}")
        reason = why_not(name, device)
        if reason is not None:
            raise UserError(f"--engines {name}: {reason}; leave it out")


def command() -> str:
    """Return what was typed."""
    return shlex.join(["python", "-m", "bench.race", *sys.argv[1:]])


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
