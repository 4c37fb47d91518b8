"""Orthogonal changes of a frozen linear layer: OFT and BOFT, as `tuners` says.

Shape legend: I input width, O output width, n blocks of b inputs each, m factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastppt.errors import UserError
from fastppt.trainables.tuners import Values, scale_beside_bias


@dataclass(frozen=True)
class Oft:
    """Rotated inputs, block by block: W' = W R^T, R = (I - Q)(I + Q)^-1, Q = -Q^T.

    The Cayley transform is exact, as in the method's own code, not peft's series, which is far off
    where rotations are large.

    Source: Qiu et al., arXiv 2306.07280, section 3.3, equation 5; Q starts at zero.

    Attributes:
        block_size: b; None where `num_blocks` says it.
        num_blocks: n.
        constraint: Furthest that a rotation goes (see `hold_`); None for no limit.
    """

    block_size: int | None
    num_blocks: int | None
    constraint: float | None = None

    def check(self, widths: Mapping[str, int], key: str) -> None:
        """Ask that blocks fill the widths, as `Tuner` says."""
        if self.block_size is not None:
            _check_divides(self.block_size, widths, f"{key}.block_size")
            return
        assert self.num_blocks is not None
        _check_divides(self.num_blocks, widths, f"{key}.num_blocks")
        name, width = min(widths.items(), key=lambda item: item[1])
        if self.num_blocks * 2 > width:
            raise UserError(
                f"{key}.num_blocks: {self.num_blocks} blocks of the {width} inputs of {name} are "
                f"of one input each, which nothing can rotate; set it to {width // 2} or less"
            )

    def shapes(self, linear: nn.Linear) -> dict[str, tuple[int, ...]]:
        """Return that of Q's upper triangles."""
        size = self.block_size or linear.in_features // (self.num_blocks or 1)
        return {"oft_R.weight": (linear.in_features // size, size * (size - 1) // 2)}

    def initialize_(self, values: Values, linear: nn.Linear, generator: torch.Generator) -> None:
        """Leave zeros: no rotation."""

    def project(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, values: Values
    ) -> Tensor:
        """Return x R W^T + bias, as `Tuner` says."""
        change = cayley_change(_skew(values["oft_R.weight"]))
        return F.linear(inputs + _by_blocks(inputs, change), weight, bias)

    def hold_(self, values: Values, skipped: Tensor) -> None:
        """Shorten each block's Q to where ||Q|| <= constraint * b^2 / sqrt(n), in place.

        Source: arXiv 2306.07280, section 3.4 (COFT); the radius by its public code, which the paper
        leaves open.

        Args:
            values: Of one layer; written.
            skipped: 0-dim bool; where true nothing changes, bit for bit.
        """
        assert self.constraint is not None
        triangles = values["oft_R.weight"]
        num_blocks, num_elements = triangles.shape
        size = _side(num_elements)
        radius = self.constraint * size**2 / math.sqrt(num_blocks)
        norms = math.sqrt(2) * torch.linalg.vector_norm(triangles, dim=1, keepdim=True)
        factors = radius / norms.clamp(min=radius)
        triangles.mul_(torch.where(skipped, torch.ones_like(factors), factors))


@dataclass(frozen=True)
class Boft:
    """Inputs rotated m times, over blocks ever further apart, and outputs scaled.

    W' = s * W (R_m ... R_1)^T, R_i = P_i diag((I - Q)(I + Q)^-1) P_i^T, Q = (X - X^T) / 2, with P_i
    the block butterfly permutation: within groups of 2^(i-1) blocks it brings the even halves of
    blocks before the odd ones.

    Source: Liu et al., arXiv 2311.06243, section 4; X starts at zero and s at one.

    Attributes:
        block_size: b.
        factors: m.
    """

    block_size: int
    factors: int

    def check(self, widths: Mapping[str, int], key: str) -> None:
        """Ask that groups of blocks fill the widths, as `Tuner` says."""
        if self.factors > 1 and self.block_size % 2:
            raise UserError(
                f"{key}.block_size: {self.block_size} has no halves, and factors above 1 take them "
                f"apart; set it to {self.block_size + 1}"
            )
        size = self.block_size * 2 ** (self.factors - 1)
        what = f"{key}.block_size" if self.factors == 1 else f"{key}: block_size * 2^(factors - 1)"
        _check_divides(size, widths, what)

    def shapes(self, linear: nn.Linear) -> dict[str, tuple[int, ...]]:
        """Return those of X and s."""
        num_blocks = linear.in_features // self.block_size
        return {
            "boft_R": (self.factors, num_blocks, self.block_size, self.block_size),
            "boft_s": (linear.out_features, 1),
        }

    def initialize_(self, values: Values, linear: nn.Linear, generator: torch.Generator) -> None:
        """Set s to one; X is zero."""
        values["boft_s"].fill_(1.0)

    def project(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, values: Values
    ) -> Tensor:
        """Return the scaled projection of the rotated inputs, as `Tuner` says."""
        blocks = values["boft_R"]
        changes = cayley_change(0.5 * (blocks - blocks.mT).flatten(0, 1)).unflatten(
            0, blocks.shape[:2]
        )
        # An input is a row: the last rotation is the first that it meets.
        for index in reversed(range(self.factors)):
            together = _by_blocks(self._together(inputs, index), changes[index])
            inputs = inputs + self._apart(together, index)
        return scale_beside_bias(
            F.linear(inputs, weight, bias), bias, values["boft_s"].flatten() - 1
        )

    def _together(self, inputs: Tensor, index: int) -> Tensor:
        """Return x P: what a block rotates, side by side."""
        return self._regroup(inputs, (2, 2**index))

    def _apart(self, inputs: Tensor, index: int) -> Tensor:
        """Return x P^T: everything back in its place."""
        return self._regroup(inputs, (2**index, 2))

    def _regroup(self, inputs: Tensor, grid: tuple[int, int]) -> Tensor:
        if 1 in grid:
            return inputs
        halves: Tensor = inputs.unflatten(-1, (-1, *grid, self.block_size // 2))
        return halves.transpose(-3, -2).flatten(-4)


def cayley_change(skew: Tensor) -> Tensor:
    """Return (I - Q)(I + Q)^-1 - I of skew-symmetric matrices Q [n, b, b]: zero of zero, exactly.

    Products of matrices alone make the inverse, which a CUDA graph can hold; solvers' libraries may
    allocate, or wait for the device. It is that of `_invert`, as far as ||Q||^2 / 2 is up to
    `FURTHEST`, which is rotations by up to 179.9 degrees.
    """
    change: Tensor = _CayleyChange.apply(skew)  # type: ignore[no-untyped-call]
    return change


class _CayleyChange(torch.autograd.Function):
    """-2 Q M with M = (I + Q)^-1 = I + change / 2, so that the result is all that is kept.

    d change = -2 M dQ M.
    """

    @staticmethod
    def forward(ctx: Any, skew: Tensor) -> Tensor:
        change = -2 * (skew @ _invert(skew))
        ctx.save_for_backward(change)
        return change

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (change,) = ctx.saved_tensors
        (grad,) = gradients
        # -2 M^T G M^T, where 2 M^T = 2 I + change^T.
        turned = torch.baddbmm(grad, change.mT, grad, beta=2)
        return torch.baddbmm(turned, turned, change.mT, beta=-1, alpha=-0.5)


def _invert(skew: Tensor) -> Tensor:
    """Return (I + Q)^-1 by Newton's iteration X <- c X (2 I - (I + Q) X), with no look at the host.

    From X = a (I + Q)^T the eigenvalues y of (I + Q) X are real, a (1 + q^2), and with the norm of
    Q in a they lie in [l, 2 - l]. A step takes y to c y (2 - y), and its c is the one that makes
    the new interval symmetric about 1 again.

    Source: Schulz (1933) for the iteration; Pan and Schreiber (SIAM J. Sci. Stat. Comput. 12, 1991,
    section 5) for the scaled steps.
    """
    half_square = 0.5 * skew.square().sum((-2, -1), keepdim=True)
    identity = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
    matrix = identity + skew
    inverse = (identity - skew) / (1 + 0.5 * half_square)
    for factor in STEP_FACTORS:
        inverse = torch.baddbmm(inverse, inverse, matrix @ inverse, beta=2 * factor, alpha=-factor)
    return inverse


def _step_factors(furthest: float) -> list[float]:
    """Return c of each step of `_invert`, until what is left is rounding in float64.

    Args:
        furthest: Largest ||Q||^2 / 2, so that no q^2 is larger.
    """
    least, factors = 2 / (2 + furthest), []
    while 1 - least > 1e-15:
        low = least * (2 - least)
        factors.append(2 / (1 + low))
        least = low * factors[-1]
    return factors


FURTHEST = 1e6
"""Largest ||Q||^2 / 2 of a block that `cayley_change` is exact for, up to rounding."""
STEP_FACTORS = _step_factors(FURTHEST)


def _skew(triangles: Tensor) -> Tensor:
    """Return the skew-symmetric matrices [n, b, b] of upper triangles [n, b (b - 1) / 2]."""
    size = _side(triangles.shape[1])
    rows, columns = torch.triu_indices(size, size, 1, device=triangles.device)
    upper = triangles.new_zeros(len(triangles), size, size)
    upper[:, rows, columns] = triangles
    return upper - upper.mT


def _side(num_elements: int) -> int:
    """Return b of the b (b - 1) / 2 elements above a diagonal."""
    return (1 + math.isqrt(1 + 8 * num_elements)) // 2


def _by_blocks(inputs: Tensor, matrices: Tensor) -> Tensor:
    """Return each block of [..., n*b] inputs times its matrix of [n, b, b], [..., n*b]."""
    blocks = inputs.unflatten(-1, matrices.shape[:2])
    return torch.einsum("...nb,nbc->...nc", blocks, matrices.to(inputs.dtype)).flatten(-2)


def _check_divides(size: int, widths: Mapping[str, int], what: str) -> None:
    """Refuse a size that does not divide the inputs of every layer."""
    for name, width in widths.items():
        if width % size:
            fitting = ", ".join(map(str, _divisors(math.gcd(*widths.values()))))
            raise UserError(
                f"{what} is {size}, which does not divide the {width} inputs of {name}; "
                f"what divides those of all: {fitting}"
            )


def _divisors(number: int) -> Iterator[int]:
    return (each for each in range(2, number + 1) if number % each == 0)
