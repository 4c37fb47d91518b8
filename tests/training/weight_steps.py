"""Steps that train the network's own weights, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.families.loading import load_family
from fastppt.trainables.trainables import Trainables
from fastppt.training.step import Step
from tests.training.objective_steps import prepared_trainables

Table = Mapping[str, Any]

DENOISING: Table = {"denoising": {}}
APT: Table = {
    "denoising": {"weighting": "adaptive"},
    "feature_alignment": {},
    "attention_alignment": {},
}
"""The objectives that compare with the base."""

FULL: Table = {"full": {"learning_rate": 1e-3}}
WORD: Table = {"custom_diffusion": {"learning_rate": 1e-3}, "tokens": {}}


def stage(trainables: Table, objectives: Table = DENOISING, **settings: Any) -> dict[str, Any]:
    return {"steps": 6, "trainables": trainables, "objectives": objectives} | settings


def weights_config(
    photos: Path, stages: list[dict[str, Any]], model: str = "mini-sdxl", **settings: object
) -> RunConfig:
    """A small run of these stages."""
    return small_config(photos, model, "lora", **{"stage": stages, "photos.views": 2} | settings)


def small_config(photos: Path, model: str, recipe: str, **settings: object) -> RunConfig:
    """A small run of a recipe."""
    small: dict[str, object] = {
        "model.path": model,
        "model.device": "cpu",
        "photos.folder": str(photos),
        "prompts.class_noun": "robot",
        "output": str(photos.parent / "never-written"),
        "samples.enabled": False,
        "log_every": 4,
    }
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    return build_config(recipe, settings=[*(small | keys).items()])


def anchored(weight: float = 0.1, **settings: object) -> Table:
    return DENOISING | {"anchor": {"weight": weight} | settings}


def prepare(
    photos: Path,
    trainables: Table = FULL,
    objectives: Table = DENOISING,
    model: str = "mini-sdxl",
    dtype: torch.dtype | None = None,
    **settings: object,
) -> tuple[Step, Trainables]:
    of_stage = {k.removeprefix("stage__"): v for k, v in settings.items() if "stage__" in k}
    of_run = {k: v for k, v in settings.items() if "stage__" not in k}
    if "tokens" in trainables:
        of_run["prompts__token"] = "<v>"
    config = weights_config(photos, [stage(trainables, objectives, **of_stage)], model, **of_run)
    return prepared_trainables(config, load_family(config.model, dtype=dtype))


def stir(trainables: Trainables, size: float = 0.02) -> None:
    """Move the weights from where they started."""
    chance = torch.Generator().manual_seed(3)
    for values in trainables.network.tensors.values():
        values += size * torch.randn(values.shape, generator=chance, dtype=values.dtype)
    trainables.network.refresh()


def values_of(trainables: Trainables) -> Tensor:
    return trainables.network.arenas[""].flat.detach().clone()


def cut(trainables: Trainables, flat: Tensor) -> dict[str, Tensor]:
    """What lies in another tensor where each trained one lies in its arena."""
    return {
        name: flat.as_strided(values.shape, values.stride(), values.storage_offset())
        for name, values in trainables.network.tensors.items()
    }
