"""The commands of the mini models: ``python -m fastppt.mini photos|export|checkpoint PATH``."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError

from fastppt.errors import UserError
from fastppt.families.names import WORLD_MODEL
from fastppt.mini import MiniModel, build_mini
from fastppt.mini.photos import DEMO_NOUN, DEMO_SEED, draw_subject_photos
from fastppt.mini.world import random_subject

app = typer.Typer(help="The embedded small models and their demo photos.", no_args_is_help=True)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; made if missing.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="File to write; ends in .safetensors.")]
Model = Annotated[MiniModel, typer.Option(help="Which of the mini models.")]
Noun = Annotated[str, typer.Option(help="What the subject is: a robot, a cat, a chair ...")]
# The judge's training begins with the next one.
LAST_SUBJECT = 999_999
SubjectSeed = Annotated[
    int, typer.Option(min=0, max=LAST_SUBJECT, help="Another number is another subject.")
]
Count = Annotated[int, typer.Option(min=1, help="How many photos.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed writes the same files.")]
WeightSeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Of random weights. Without it mini-sdxl has its trained ones, the others seed 0.",
    ),
]


@app.command()
def photos(
    directory: Directory,
    noun: Noun = DEMO_NOUN,
    subject: SubjectSeed = DEMO_SEED,
    count: Count = 5,
    seed: Seed = 0,
) -> None:
    """Draw photos of one subject of the mini world into DIR: a toy robot, or another."""
    _refuse_file(directory, "photos")
    try:
        shown = random_subject(subject, noun)
    except ValueError as error:
        _refuse(f"photos: --noun: {error}")
    with _refused_when_unwritable(directory, "photos"):
        paths = draw_subject_photos(directory, shown, count, seed)
    images = "1 image" if count == 1 else f"{count} images"
    typer.echo(f"photos: wrote {images} to {directory} ({paths[0].name} ...)")


@app.command()
def export(directory: Directory, model: Model = "mini-sdxl", seed: WeightSeed = None) -> None:
    """Save a mini model into DIR, as a diffusers folder of safetensors."""
    _refuse_file(directory, "export")
    if directory.is_dir() and any(directory.iterdir()):
        _refuse(f"export: {directory} is not empty. Give a new or an empty folder.")
    # Here and not above: torch takes seconds to import, and the photos do not need it.
    from fastppt.families.checkpoints import without_bars

    pipeline = _build(model, seed, "export")
    with _refused_when_unwritable(directory, "export"), without_bars():
        _fill_folder(directory, pipeline.save_pretrained)
    typer.echo(f"export: wrote {_describe(pipeline, model, seed)} to {directory}")


@app.command()
def checkpoint(file: File, model: Model = "mini-sdxl", seed: WeightSeed = None) -> None:
    """Save a mini model as one file in the layout of published checkpoints."""
    _refuse_file(file.parent, "checkpoint")
    if file.suffix != ".safetensors":
        _refuse(f"checkpoint: {file} does not end in .safetensors. Give another name.")
    if file.exists():
        _refuse(f"checkpoint: {file} exists already. Delete it, or give another name.")
    from safetensors.torch import save

    from fastppt.mini.single_file import original_state

    pipeline = _build(model, seed, "checkpoint")
    content = save(original_state(pipeline), metadata={"format": "pt"})
    with _refused_when_unwritable(file, "checkpoint"):
        _write_file(file, content)
    typer.echo(f"checkpoint: wrote {_describe(pipeline, model, seed)} to {file}")


def _build(model: str, seed: int | None, command: str) -> Any:
    try:
        return build_mini(model, seed)
    except UserError as error:
        _refuse(f"{command}: {error}")


def _describe(pipeline: Any, model: str, seed: int | None) -> str:
    from torch import nn

    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    num_parameters = sum(weight.numel() for net in networks for weight in net.parameters())
    is_trained = seed is None and model == WORLD_MODEL
    weights = "trained" if is_trained else f"random weights, seed {seed or 0}"
    return f"{model} of {num_parameters / 1e6:.2f} M parameters ({weights})"


def _fill_folder(directory: Path, write: Callable[[Path], object]) -> None:
    """Write a diffusers folder in a corner of its own, and move its parts into place.

    ``model_index.json`` comes last: a folder without it is no model. The folder itself stays what
    it is, since it may be somebody's working directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f".{os.getpid()}.tmp"
    try:
        write(aside)
        for part in sorted(aside.iterdir(), key=lambda part: part.name == "model_index.json"):
            part.replace(directory / part.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_file(file: Path, content: bytes) -> None:
    """Write a file beside its place and rename it: it is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _refused_when_unwritable(path: Path, command: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        _refuse(f"{command}: {path} cannot be written ({reason}). Give another path.")


def _refuse_file(directory: Path, command: str) -> None:
    """Refuse a path that cannot become a folder, because it or a parent of it is a file."""
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            _refuse(f"{command}: {path} is a file, but a folder is wanted. Give another path.")


def _refuse(message: str) -> NoReturn:
    """Print one line on the error stream and exit with 2, as typer does for wrong arguments."""
    typer.echo(message, err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app(prog_name="python -m fastppt.mini")
