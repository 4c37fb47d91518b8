"""The commands of the mini model: ``python -m fastppt.mini photos|export DIR``."""

from pathlib import Path
from typing import Annotated

import typer

from fastppt.mini.photos import draw_demo_photos

app = typer.Typer(help="The embedded small model and its demo photos.", no_args_is_help=True)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; made if missing.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed writes the same files.")]


@app.command()
def photos(directory: Directory, seed: Seed = 0) -> None:
    """Draw five photos of one subject, a toy robot, into DIR."""
    _refuse_file(directory, "photos")
    paths = draw_demo_photos(directory, seed)
    typer.echo(f"photos: wrote {len(paths)} images to {directory} ({paths[0].name} ...)")


@app.command()
def export(directory: Directory, seed: Seed = 0) -> None:
    """Save the mini SDXL of random weights into DIR, as a diffusers folder of safetensors."""
    _refuse_file(directory, "export")
    if directory.is_dir() and any(directory.iterdir()):
        _refuse(f"export: {directory} is not empty. Give a new or an empty folder.")
    # Here and not above: diffusers takes seconds to import, and the photos do not need it.
    from transformers.utils.logging import disable_progress_bar

    from fastppt.mini.sdxl import build_mini_sdxl

    disable_progress_bar()
    pipeline = build_mini_sdxl(seed)
    pipeline.save_pretrained(directory, safe_serialization=True)
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    num_parameters = sum(weight.numel() for net in networks for weight in net.parameters())
    typer.echo(
        f"export: wrote a mini SDXL pipeline of {num_parameters / 1e6:.2f} M parameters"
        f" (random weights, seed {seed}) to {directory}"
    )


def _refuse_file(directory: Path, command: str) -> None:
    """Refuse a path that cannot become a folder, because it or a parent of it is a file."""
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            _refuse(f"{command}: {path} is a file, but a folder is wanted. Give another path.")


def _refuse(message: str) -> None:
    """Print one line on the error stream and exit with 2, as typer does for wrong arguments."""
    typer.echo(message, err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app(prog_name="python -m fastppt.mini")
