"""A stage that is ready to run, and what is left of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.data.photos import find_photos
from fastppt.families.loading import load_family
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.trainables import Trainables
from fastppt.training.build import build_trainables
from fastppt.training.encoding import encode
from fastppt.training.loop import resolve
from fastppt.training.metric_names import metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.run import new_generator
from fastppt.training.runners import StageRunner
from fastppt.training.schedule import learning_rate_factor
from fastppt.training.snapshot import written_tensors
from fastppt.training.stage import build_steps
from fastppt.training.step import Step

# Adaptive weighting and both alignments, so a base pass.
WITH_BASE: dict[str, object] = {
    "stage.0.objectives.denoising.weighting": "adaptive",
    "stage.0.objectives.feature_alignment.weight": 30.0,
    "stage.0.objectives.attention_alignment.weight": 3e-4,
    "photos.views": 2,
}
ROWS = 64


def build_stage(
    make_config: Callable[..., RunConfig],
    model: str = "mini-sdxl",
    dtype: torch.dtype | None = None,
    **settings: object,
) -> tuple[list[Step], LoraAdapters]:
    """The steps of the buckets of a run's first stage, and the adapters that they train."""
    config = make_config(**{"model.path": model, **settings})
    steps, trainables = next(build_stages(config, dtype))
    return steps, trainables.lora


def build_stages(
    config: RunConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[list[Step], Trainables]]:
    """The steps of each stage of a run, made when they are asked for, and all that it trains."""
    family = load_family(config.model, dtype=dtype)
    config = resolve(config, family)
    masters = torch.promote_types(family.dtype, torch.float32)
    trainables = build_trainables(config, family, dtype=masters)
    if config.gradient_checkpointing:
        family.checkpoint_blocks()
    photos = find_photos(config.photos.folder)
    buckets, _ = encode(config, family, photos, Console(quiet=True))
    ring = MetricRing(metric_names(config.stage), ROWS, family.device)
    generator = new_generator(config, family)
    for stage in config.stage:
        yield (
            build_steps(config, stage, family, trainables, buckets, ring, generator),
            trainables,
        )


def run_stage(runner: StageRunner, steps: Sequence[Step], num_steps: int) -> None:
    """Take steps as the loop does, from bucket to bucket."""
    for number in range(num_steps):
        step = steps[number % len(steps)]
        step.learning_rate.fill_(1e-3 * learning_rate_factor(step.stage, number))
        runner.run(number % len(steps), number)


def state_of(step: Step) -> list[Tensor]:
    """Copies of all that a stage goes on with."""
    return [
        *(tensor.detach().clone() for tensor in written_tensors(step)),
        step.generator.get_state(),
    ]


def are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two states are equal bit for bit, missing metrics (NaN) among them."""
    return all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(map(_flat, first), map(_flat, second), strict=True)
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten()
