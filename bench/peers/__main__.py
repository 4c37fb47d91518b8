"""Another trainer's own command, timed into a race: ``python -m bench.peers``."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import ValidationError

from bench.machine import describe_machine
from bench.networks import FAMILY_OF
from bench.peers.entrant import time_trainer
from bench.peers.jobs import PeerJob
from bench.peers.trainers import PIPELINE_SAMPLING, TRAINERS
from bench.race_plan import EntrantPlan
from bench.race_ratios import make_report
from bench.race_results import (
    WHATS,
    Entrant,
    RaceReport,
    RaceSettings,
    read_race,
    write_race,
)
from bench.race_rounds import prepare_model
from fastppt.config import ModelConfig
from fastppt.data.photos import list_pictures
from fastppt.errors import UserError
from fastppt.families.loading import detect_family
from fastppt.mini import draw_demo_photos

REQUIRED = ("model", "steps", "resolution")
DEFAULTS: dict[str, Any] = {"seed": 0, "batch_size": 1, "rank": 32, "class_images": 100}
DEFAULTS |= {"rounds": 1}
# Of the machine's description: what has to be that of the race.
MACHINE_KEYS = ("device", "cpu", "gpu", "driver")

Precision = Literal["float32", "bfloat16", "float16"]

app = typer.Typer(add_completion=False)


@app.command()
def main(
    trainer: Annotated[str, typer.Option(help=f"one of {', '.join(TRAINERS)}")],
    checkout: Annotated[Path, typer.Option(help="folder with its sources")],
    python: Annotated[Path, typer.Option(help="the interpreter of its own environment")],
    output: Annotated[Path, typer.Option(help="folder for all that it writes, and race.json")],
    race: Annotated[Path | None, typer.Option(help="a race to join: has all settings")] = None,
    model: Annotated[str | None, typer.Option(help="as bench.race, or a file")] = None,
    photos: Annotated[Path | None, typer.Option(help="default: the embedded demo's")] = None,
    class_noun: Annotated[str, typer.Option(help="what they show")] = "robot",
    steps: Annotated[int | None, typer.Option(help="training steps")] = None,
    resolution: Annotated[int | None, typer.Option(help="side of the pictures, pixels")] = None,
    seed: Annotated[int | None, typer.Option(help="default: 0")] = None,
    batch_size: Annotated[int | None, typer.Option(help="photos in a step; default: 1")] = None,
    rank: Annotated[int | None, typer.Option(help="of the LoRA; default: 32")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="default: bfloat16 on a GPU, float32 on the CPU")
    ] = None,
    class_images: Annotated[int | None, typer.Option(help="with --prior; default: 100")] = None,
    rounds: Annotated[int | None, typer.Option(help="how often it is run; default: 1")] = None,
    prior: Annotated[bool, typer.Option("--prior", help="with prior preservation")] = False,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="default: cuda where there is one")
    ] = None,
    name: Annotated[str | None, typer.Option(help="what the race calls it")] = None,
    extra: Annotated[list[str] | None, typer.Argument(help="after --: for the trainer")] = None,
) -> None:
    """Run a trainer on a race's model, photos, steps and seed, and read its it/s and memory.

    Nothing else may be using the GPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {"model": model, "steps": steps, "resolution": resolution, "seed": seed}
    given |= {"batch_size": batch_size, "rank": rank, "precision": precision}
    given |= {"class_images": class_images, "rounds": rounds}
    called = name or f"{trainer}, its own command{', prior preservation' * prior}"
    try:
        if trainer not in TRAINERS:
            raise UserError(f"--trainer {trainer}: there are {', '.join(TRAINERS)}")
        if not checkout.is_dir():
            raise UserError(f"--checkout {checkout}: is no folder. Is the path right?")
        path = output / "race.json"
        # Of one that failed too: a trainer takes class images that it finds.
        if path.exists() or any(output.glob("round-*")):
            raise UserError(f"--output {output}: holds a race already; give another folder")
        joined = None if race is None else read_race(race)
        pictures = find_pictures(photos, output)
        if joined is None:
            settings = make_settings(given, device, len(pictures))
        else:
            settings = take_settings(joined.settings, given, len(pictures))
            check_machine(joined.machine, describe_machine(device))
        TRAINERS[trainer].check(trainer, settings, device, prior=prior)
        job = PeerJob(
            settings=settings,
            entrant=EntrantPlan(name=called, kind="external", prior=prior),
            model=find_model(settings, output.absolute() / "model", device),
            device=device,
            photos=pictures[0].parent,
            class_noun=class_noun,
            output=output.absolute(),
            class_images=output.absolute(),
            sampled_images=settings.class_images,
            trained_steps=settings.steps,
            checkout=checkout.absolute(),
            # Not resolved: the link is what makes it that environment's.
            python=python.absolute(),
            extra=tuple(extra or ()),
        )
        entrant = time_trainer(trainer, TRAINERS[trainer], job, pictures)
        report = join(entrant, settings, joined, device)
        write_race(path, report)
    except ValueError as error:
        typer.echo(f"bench.peers: {error}", err=True)
        raise typer.Exit(2) from None
    show(report, entrant)
    typer.echo(f"written: {path}")


def find_pictures(photos: Path | None, output: Path) -> list[Path]:
    """Return the photos; those of the demo are drawn where none are given."""
    if photos is None:
        photos = output / "photos"
        draw_demo_photos(photos)
    return list_pictures(photos.absolute(), "--photos")


def make_settings(given: Mapping[str, Any], device: str, num_photos: int) -> RaceSettings:
    """Return the settings of a race of its own, from the flags.

    Raises:
        UserError: one is missing, or is none; names the flag.
    """
    for key in REQUIRED:
        if given[key] is None:
            raise UserError(f"{_flag(key)}: give it, or a race to join with --race")
    known = {key: value for key, value in given.items() if value is not None}
    # Of those of random weights, the name says it.
    family = FAMILY_OF.get(known["model"]) or detect_family(ModelConfig(path=known["model"]))
    steps, guidance = PIPELINE_SAMPLING[family]
    keys = {"precision": "bfloat16" if device == "cuda" else "float32"} | DEFAULTS | known
    keys |= {"family": family, "sampler_steps": steps, "guidance_scale": guidance}
    keys |= {"num_photos": num_photos, "threads": 1 if device == "cpu" else torch.get_num_threads()}
    try:
        return RaceSettings.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{_flag(first['loc'][0])} {first['input']}: {first['msg']}") from None


def take_settings(
    settings: RaceSettings, given: Mapping[str, Any], num_photos: int
) -> RaceSettings:
    """Return those of the race that is joined.

    Raises:
        UserError: a flag says other.
    """
    for key, value in (given | {"num_photos": num_photos}).items():
        wanted = getattr(settings, key)
        if value is not None and value != wanted:
            flag = "--photos" if key == "num_photos" else _flag(key)
            raise UserError(f"{flag}: the race has {wanted}, got {value}; leave the flag out")
    return settings


def check_machine(raced: Mapping[str, object], here: Mapping[str, object]) -> None:
    """Refuse to join a race of another machine: no ratio to it would mean anything.

    Raises:
        UserError: says what differs.
    """
    for key in MACHINE_KEYS:
        if raced.get(key) != here.get(key):
            raise UserError(
                f"--race: it ran on {key} {raced.get(key)}, and this is {here.get(key)}; run the "
                "race here first, or give --device"
            )


def find_model(settings: RaceSettings, folder: Path, device: str) -> str:
    """Return the path of the race's model; one that is built is written to the folder."""
    path = Path(settings.model)
    if path.is_file():
        return str(path.absolute())
    dtype = getattr(torch, settings.precision)
    return str(prepare_model(settings.model, folder, device, dtype))


def join(
    entrant: Entrant, settings: RaceSettings, joined: RaceReport | None, device: str
) -> RaceReport:
    """Return the race with one more entrant, in the place of an earlier one of its name."""
    command = shlex.join(["python", "-m", "bench.peers", *sys.argv[1:]])
    if joined is None:
        return make_report(describe_machine(device), settings, [entrant], command)
    others = [each for each in joined.entrants if each.name != entrant.name]
    command = f"{joined.command}; {command}"
    return make_report(joined.machine, settings, [*others, entrant], command, joined.label)


def show(report: RaceReport, entrant: Entrant) -> None:
    """Print what the rounds took, and how the others compare."""
    for each in entrant.rounds:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in each.phases.items())
        typer.echo(f"{entrant.name}: {phases}, {each.peak_memory_bytes / 1e9:.2f} GB")
    typer.echo(f"  printed: {entrant.settings['it/s, as printed']} it/s")
    for what in WHATS:
        for ratio in report.ratios:
            if ratio.against == entrant.name and ratio.what == what:
                typer.echo(f"  {what}: {ratio.of} is {ratio.value:.2f}x as fast")


def _flag(key: object) -> str:
    return f"--{str(key).replace('_', '-')}"


if __name__ == "__main__":
    app()
