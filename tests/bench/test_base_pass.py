"""Base and tuned pass as one batch: the same predictions, twice the activations."""

from __future__ import annotations

from collections.abc import Callable

from bench.base_pass import compare_base_passes
from fastppt.config import RunConfig
from fastppt.families.base import Family
from tests.training.objective_steps import prepared


def test_one_batch_keeps_twice_as_much(
    make_config: Callable[..., RunConfig], family: Family
) -> None:
    step, _ = prepared(make_config("lora"), family)
    costs = compare_base_passes(step, seconds=0.1)
    assert costs["batched"].kept_bytes > 1.9 * costs["sequential"].kept_bytes > 0
    assert all(cost.timing.p50 > 0 for cost in costs.values())
