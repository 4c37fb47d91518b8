"""``python -m fastppt.mini.pretrain``: train the mini world's judge and mini-sdxl from nothing.

Parts, in order: the scenes are rendered; the judge learns to read them; the VAE learns; the network
learns on its latents; the decoder goes on alone; both models are written. Every part goes on where
it stopped. On two cores the judge and the VAE, and then the network and the decoder, can be trained
side by side with ``--only``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import numpy as np
import torch
import typer
from safetensors.torch import save

from fastppt.errors import UserError
from fastppt.mini.judge import WEIGHTS, Judge
from fastppt.mini.pretrain.judge import train_judge
from fastppt.mini.pretrain.scenes import Scenes, load_shards, make_shards
from fastppt.mini.pretrain.training import Deadline, OutOfTimeError
from fastppt.outputs.files import write_file

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

Part = Literal["scenes", "judge", "vae", "network", "decoder", "weights"]
PARTS: tuple[Part, ...] = get_args(Part)


def main(
    work: Annotated[Path, typer.Option(help="Folder of the scenes and of what is half done.")],
    only: Annotated[
        Part | None, typer.Option(help="This part, after the training that it needs.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long; run again to go on.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the weights are written.")] = WEIGHTS.parent,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU where there is one.")
    ] = "auto",
) -> None:
    """Train the judge and mini-sdxl on the mini world; a run that was stopped goes on."""
    torch.set_num_threads(1)
    try:
        pretraining = Pretraining(work, output, Deadline(minutes), _device_of(device))
        for part in PARTS if only is None else (only,):
            pretraining.run(part)
    except OutOfTimeError as stopped:
        typer.echo(f"{stopped}. Run the command again to go on.")
    except UserError as error:
        typer.echo(f"pretrain: {error}", err=True)
        raise typer.Exit(2) from error


def _device_of(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is found; leave the option out to train on the CPU")
    return torch.device(name)


class Pretraining:
    """The parts, each of which goes on where it stopped and reads what those before it left."""

    def __init__(self, work: Path, output: Path, deadline: Deadline, device: torch.device) -> None:
        self.work, self.output, self.deadline, self.device = work, output, deadline, device

    def run(self, part: Part) -> None:
        """Do one part.

        Raises:
            OutOfTimeError: the deadline has passed.
        """
        steps: dict[Part, Callable[[], object]] = {
            "scenes": lambda: make_shards(self.work / "scenes"),
            "judge": self.judge,
            "vae": self.vae,
            "network": self.network,
            "decoder": self.decoder,
            "weights": self.weights,
        }
        steps[part]()
        typer.echo(f"{part}: done")

    def scenes(self, kind: str) -> Scenes:
        """Read the rendered scenes of a kind: ``world`` or ``subjects``."""
        return load_shards(self.work / "scenes", kind)

    def judge(self) -> Judge:
        """Return the trained judge."""
        return train_judge(
            self.scenes("world"), self.scenes("subjects"), self.work, self.deadline, self.device
        )

    def vae(self) -> "StableDiffusionXLPipeline":
        """Return the pipeline with its encoder trained."""
        from fastppt.mini.pretrain.vae import train_vae
        from fastppt.mini.sdxl import build_mini_sdxl

        pipeline = build_mini_sdxl(seed=0)
        train_vae(pipeline.vae, self._all_pixels(), self.work, self.deadline, self.device)
        return pipeline

    def network(self) -> "StableDiffusionXLPipeline":
        """Return the pipeline with its encoder, UNet and text encoders trained."""
        from fastppt.mini.pretrain.network import encode_scenes, train_network

        pipeline, world = self.vae(), self.scenes("world")
        latents = encode_scenes(pipeline.vae, world.pixels, self.work, self.device)
        train_network(pipeline, latents, world, self.work, self.deadline, device=self.device)
        return pipeline

    def decoder(self) -> "StableDiffusionXLPipeline":
        """Return the pipeline with its whole VAE trained."""
        from fastppt.mini.pretrain.vae import train_decoder

        pipeline, judge = self.vae(), self.judge()
        pixels = self._all_pixels()
        train_decoder(pipeline.vae, judge, pixels, self.work, self.deadline, self.device)
        return pipeline

    def weights(self) -> None:
        """Write both models as the package ships them."""
        from fastppt.mini.save import save_weights

        pipeline = self.network()
        pipeline.vae = self.decoder().vae
        save_weights(pipeline, self.output / "mini-sdxl")
        halves = {
            name: value.half().contiguous() for name, value in self.judge().state_dict().items()
        }
        write_file(self.output / WEIGHTS.name, save(halves))

    def _all_pixels(self) -> np.ndarray:
        return np.concatenate([self.scenes(kind).pixels for kind in ("world", "subjects")])


if __name__ == "__main__":
    typer.run(main)
