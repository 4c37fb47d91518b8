"""Rotations by Cayley's transform: exact however far they go, by products of matrices alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastppt.trainables.rotations import FURTHEST, cayley_change
from fastppt.trainables_config import BoftConfig, OftConfig
from tests.trainables.peft_cases import Small, draw_inputs, small_adapters


def skew_of(size: int, half_square: float) -> Tensor:
    """Skew-symmetric matrices [5, b, b] in float64 with ||Q||^2 / 2 as given."""
    values = torch.randn(5, size, size, generator=torch.Generator().manual_seed(0)).double()
    skew = values - values.mT
    return skew * math.sqrt(2 * half_square) / torch.linalg.matrix_norm(skew)[:, None, None]


def exact_change(skew: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 - I by a solver."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return (identity - skew) @ torch.linalg.inv(identity + skew) - identity


@pytest.mark.parametrize("size", [2, 3, 8, 32, 80])
@pytest.mark.parametrize("half_square", [1e-4, 1e-2, 1.0, 30.0, 1e3, FURTHEST])
def test_change_is_that_of_a_solver(size: int, half_square: float) -> None:
    skew = skew_of(size, half_square)
    expected = exact_change(skew)
    change = cayley_change(skew)
    # What a solver makes of it has such an error too: it grows with the condition, and with 1 / Q,
    # because the solver's I is taken away.
    tolerance = 1e-15 * size * (1 + half_square**0.5 + half_square**-0.5)
    assert (change - expected).abs().max() <= tolerance * expected.abs().max()
    rotation = change + torch.eye(size, dtype=torch.float64)
    assert (rotation @ rotation.mT - torch.eye(size)).abs().max() <= 1e-13 * (1 + half_square**0.5)
    narrow = cayley_change(skew.float()).double()
    assert (narrow - expected).abs().max() <= 6e8 * tolerance * expected.abs().max()


def test_no_rotation_changes_nothing_at_all() -> None:
    assert torch.equal(cayley_change(torch.zeros(3, 8, 8)), torch.zeros(3, 8, 8))


@pytest.mark.parametrize("half_square", [1e-2, 1.0, 1e3])
def test_gradients_are_those_of_a_solver(half_square: float) -> None:
    found = []
    for function in (cayley_change, exact_change):
        skew = skew_of(8, half_square).requires_grad_()
        weights = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(1)).double()
        (function(skew) * weights).sum().backward()
        assert skew.grad is not None
        found.append(skew.grad)
    assert (found[0] - found[1]).norm() <= 1e-11 * found[1].norm()


class _Names(TorchDispatchMode):
    """Notes the names of all operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [OftConfig(block_size=8), BoftConfig(block_size=4, factors=2)])
def test_no_solver_runs_in_a_pass(config: OftConfig | BoftConfig) -> None:
    """Those of CUDA's libraries may allocate or wait, which no capture allows."""
    _, run = small_adapters(Small(), config)
    with _Names() as seen:
        run(draw_inputs()).sum().backward()
    assert "aten.baddbmm.default" in seen.names
    assert not {each for each in seen.names if "linalg" in each or "inv" in each}
