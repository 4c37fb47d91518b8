"""Base and tuned pass one after the other, or as two halves of one batch: time and memory.

Two halves are one launch for two, but the backward pass then goes through the base's half too, and
keeps its activations. Here the adapters work on both halves, and nothing looks into the layers: a
batch that took them off the base's half would take longer still. The product runs one after the
other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.interleave import Timing, interleave, stopwatch_of
from fastppt.families.base import PromptEmbeddings
from fastppt.training.batch import Batch, draw, make_batch
from fastppt.training.step import Step, base_pass


@dataclass(frozen=True)
class PassCost:
    """What base forward, tuned forward and backward cost together.

    Attributes:
        timing: Milliseconds.
        kept_bytes: What the forward pass keeps for the backward pass, weights not counted.
    """

    timing: Timing
    kept_bytes: int


def compare_base_passes(step: Step, *, seconds: float) -> dict[str, PassCost]:
    """Return the cost of both ways, `sequential` and `batched`.

    Args:
        step: Of any stage. Its gradients are added to, its generator goes on.
        seconds: About what the timed rounds may take together.

    Raises:
        AssertionError: the two ways do not predict the same.
    """
    batch = make_batch(step, draw(step))
    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "sequential": lambda: _one_after_the_other(step, batch),
        "batched": lambda: _as_one_batch(step, batch),
    }
    for pair in zip(*(way() for way in ways.values()), strict=True):
        torch.testing.assert_close(*pair, rtol=0.05, atol=0.05)

    def train(way: Callable[[], tuple[Tensor, Tensor]]) -> None:
        _, prediction = way()
        (prediction.float() - batch.target).square().mean().backward()

    calls = {name: (lambda way=way: train(way)) for name, way in ways.items()}
    timings = interleave(calls, seconds=seconds, stopwatch=stopwatch_of(step.family.device.type))
    return {name: PassCost(timings[name], _kept_bytes(step, way)) for name, way in ways.items()}


def _one_after_the_other(step: Step, batch: Batch) -> tuple[Tensor, Tensor]:
    base = base_pass(step, batch)
    prompts = step.prompts.subject(batch.photos)
    tuned = step.family.predict(batch.noisy, batch.timesteps, prompts, batch.sizes)
    return base, tuned


def _as_one_batch(step: Step, batch: Batch) -> tuple[Tensor, Tensor]:
    base = step.prompts.plain_class(batch.photos)
    subject = step.prompts.subject(batch.photos)
    pooled = None
    if base.pooled is not None and subject.pooled is not None:
        pooled = torch.cat([base.pooled, subject.pooled])
    prompts = PromptEmbeddings(torch.cat([base.tokens, subject.tokens]), pooled)
    noisy, timesteps, sizes = (
        torch.cat([half, half]) for half in (batch.noisy, batch.timesteps, batch.sizes)
    )
    first, second = step.family.predict(noisy, timesteps, prompts, sizes).chunk(2)
    return first.detach(), second


def _kept_bytes(step: Step, way: Callable[[], tuple[Tensor, Tensor]]) -> int:
    weights = {each.untyped_storage().data_ptr() for each in step.family.network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The prediction holds what was kept; without it an address could come up twice.
        prediction = way()
    del prediction
    return sum(kept.values())
