"""Steps with the objectives that compare with the base, for tests."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.photos import find_photos
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.trainables import Trainables
from fastppt.training.build import build_trainables
from fastppt.training.compiling import _allow_variants
from fastppt.training.encoding import encode
from fastppt.training.loop import resolve
from fastppt.training.metric_names import metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.run import new_generator
from fastppt.training.stage import build_steps, learning_rates
from fastppt.training.step import Step

OBJECTIVES = "stage.0.objectives"
APT = {
    f"{OBJECTIVES}.denoising.weighting": "adaptive",
    f"{OBJECTIVES}.feature_alignment.weight": 30.0,
    f"{OBJECTIVES}.attention_alignment.weight": 3e-4,
    "photos.views": 3,
}
"""The settings of all objectives that compare with the base."""


# One model in the fast tests, the others in the slow ones.
ONE_FAST = (
    pytest.param("mini-sd", marks=pytest.mark.slow),
    "mini-sdxl",
    pytest.param("mini-sd3", marks=pytest.mark.slow),
)


def load(model: str, dtype: torch.dtype | None = None) -> Family:
    return load_family(ModelConfig(path=model, device="cpu"), dtype=dtype)


def prepared(config: RunConfig, family: Family) -> tuple[Step, LoraAdapters]:
    """A step of the first stage, and its adapters."""
    step, trainables = prepared_trainables(config, family)
    return step, trainables.lora


def prepared_trainables(config: RunConfig, family: Family) -> tuple[Step, Trainables]:
    """A step of the first stage, its learning rates set, and all that it trains."""
    config = resolve(config, family)
    dtype = torch.promote_types(family.dtype, torch.float32)
    trainables = build_trainables(config, family, dtype=dtype)
    photos = find_photos(config.photos.folder, config.photos.captions)
    buckets, _ = encode(config, family, photos, Console(quiet=True))
    ring = MetricRing(metric_names(config.stage), 64, family.device)
    generator = new_generator(config, family)
    (step,) = build_steps(config, config.stage[0], family, trainables, buckets, ring, generator)
    rates = learning_rates(config.stage[0])
    for name, rate in step.learning_rates.items():
        rate.fill_(rates[name])
    return step, trainables


def stir(adapters: LoraAdapters, size: float = 0.1) -> None:
    """Give the up-projections values: at the start they are zero and hide half of the gradients."""
    chance = torch.Generator().manual_seed(3)
    for pair in adapters.pairs:
        pair.up.copy_(size * torch.randn(pair.up.shape, generator=chance, dtype=pair.up.dtype))
    adapters.refresh()


def metrics_of(step: Step, num_steps: int) -> list[dict[str, float]]:
    step.ring.start_read(0, num_steps)
    return step.ring.finish_read()


def compile_blocks_by(backend: str, family: Family) -> None:
    """Compile the blocks as the engine does, by another backend."""
    _allow_variants()
    for module in family.network.modules():
        if type(module).__name__ in family.repeated_blocks:
            module.compile(backend=backend)
