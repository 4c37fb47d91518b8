"""Runs that train a network, or words, by every means: configuration, and what they learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastppt.config import RunConfig
from fastppt.config_io import build_config, render_toml
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.outputs.results import write_results
from fastppt.trainables.trainables import Trainables
from fastppt.training.build import build_trainables

WORD = "<v>"
KINDS = ("full", "custom_diffusion", "svdiff", "dora", "loha", "lokr", "oft", "boft")
# How far values are moved: enough to change a picture.
STRENGTH = {"full": 0.02, "custom_diffusion": 0.2, "svdiff": 0.3, "oft": 0.05}
MakeRun = Callable[..., "Trained"]


class Trained:
    """A run on a mini model, as if it had trained: config, family, trainables, files."""

    def __init__(
        self, folder: Path, photos: Path, name: str, *kinds: str, **settings: object
    ) -> None:
        tables = "\n".join(f"[stage.trainables.{kind}]" for kind in kinds)
        file = folder.parent / f"{folder.name}.toml"
        file.write_text(f"[[stage]]\n{tables}\n[stage.objectives.denoising]\nweight = 1.0\n")
        given = {
            "model.path": f"mini-{name}",
            "model.device": "cpu",
            "photos.folder": str(photos),
            "photos.resolution": 64,
            "prompts.class_noun": "robot",
            "output": str(folder),
            "name": "my robot",
            "samples.enabled": False,
        }
        if "tokens" in kinds:
            given |= {"prompts.token": WORD, "prompts.subject": "{token}"}
        if "oft" in kinds:
            given |= {"stage.0.trainables.oft.block_size": 16}
        more = {key.replace("__", "."): value for key, value in settings.items()}
        self.folder = folder
        self.config: RunConfig = build_config(file=file, settings=list((given | more).items()))
        self.family: Family = load_family(self.config.model)
        self.trainables: Trainables = build_trainables(self.config, self.family)
        self.move()
        self.files: list[Path] = []

    @torch.no_grad()
    def move(self) -> None:
        """Give every value a push, as training does."""
        generator = torch.Generator().manual_seed(5)
        for kind, part in self.trainables.parts.items():
            for tensor in part.tensors.values():
                push = torch.randn(tensor.shape, generator=generator)
                tensor.add_(STRENGTH.get(kind, 0.2) * push.to(tensor.dtype))
            part.refresh()

    def write(self) -> Trained:
        """Write the run's folder."""
        self.files = write_results(
            self.folder, self.config, self.family, self.trainables, {(64, 64): 5}
        )
        (self.folder / "config.toml").write_text(render_toml(self.config))
        return self

    @property
    def prompt(self) -> str:
        return f"a photo of {WORD if 'tokens' in self.trainables.parts else 'sks robot'} in snow"

    def draw(self) -> np.ndarray:
        """The picture that the run's own network draws."""
        (image,) = self.family.sample(
            self.family.encode_prompts([self.prompt]),
            self.family.encode_negative(),
            seeds=[3],
            resolution=64,
            steps=3,
            guidance_scale=4.0,
        )
        return np.asarray(image, dtype=np.int16)


def draw_stock(pipe, trained: Trained) -> np.ndarray:
    """The same picture, by a stock pipeline."""
    pipe.set_progress_bar_config(disable=True)
    prompt, options = trained.prompt, dict(trained.family.prompt_options)
    if not hasattr(pipe, "load_textual_inversion"):
        # The largest text encoder reads the prompt as it is written.
        options |= {"prompt_3": prompt}
        prompt = trained.family.text.expand(prompt)
    (image,) = pipe(
        prompt,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        height=64,
        width=64,
        **options,
    ).images
    return np.asarray(image, dtype=np.int16)


def share_that_differs(one: np.ndarray, other: np.ndarray) -> float:
    return float((np.abs(one - other) > 2).mean())
