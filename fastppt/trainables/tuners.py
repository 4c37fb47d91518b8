"""Ways to change a frozen linear layer: their parameters, initial values and equations.

Those that add to the weight are here; those that rotate its inputs are in `rotations`. Parameters,
their names, initial values and equations are those of the peft library, so that it reads what was
trained here. Its layers are not called, for inside a training step they would synchronise with the
host (exact Cayley), write their weights in the forward pass (COFT), compute in float32 beside a
network in 16 bits, make the matrix of a Kronecker product, or build a CUDA extension (BOFT).

A layer's values are float32 (float64 where arithmetic is checked). What they make of the weight is
computed in that. What multiplies activations is rounded to their dtype, rotations and scales as
their difference from none; sums round as all sums of the network do.

Shape legend: I input width, O output width, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Values = Mapping[str, Tensor]
"""The parameters of one linear layer, by their names in peft's files."""


class Tuner(Protocol):
    """One of the ways, with its settings."""

    def check(self, widths: Mapping[str, int], key: str) -> None:
        """Refuse linear layers that the settings do not fit.

        Args:
            widths: Input width by the layer's name.
            key: Of the tuner's table in the configuration, for messages.

        Raises:
            UserError: one does not; it is named, and what would fit.
        """

    def shapes(self, linear: nn.Linear) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters by name."""

    def initialize_(self, values: Values, linear: nn.Linear, generator: torch.Generator) -> None:
        """Write initial values: random ones of a CPU generator, and nothing changes yet.

        Args:
            values: Written; zeros as they come.
            linear: The frozen layer.
            generator: On the CPU.
        """

    def project(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, values: Values
    ) -> Tensor:
        """Return the changed projection [..., O] of [..., I] inputs, in their dtype.

        Args:
            inputs: In the network's dtype, like weight and bias.
            weight: [O, I], frozen.
            bias: [O], frozen; or None.
            values: Get gradients by autograd.
        """


@dataclass(frozen=True)
class Dora:
    """Weight-decomposed low-rank adapters: the directions of W + s B A, and lengths of their own.

    W' = m * (W + s B A) / ||W + s B A||, row by row; the norm has no gradient.

    Source: Liu et al., arXiv 2402.09353, equations 5 and 11; initial values as LoRA's, m = ||W||.

    Attributes:
        rank: r.
        scale: s = alpha / r.
    """

    rank: int
    scale: float

    def check(self, widths: Mapping[str, int], key: str) -> None:
        """Accept all, as `Tuner` says."""

    def shapes(self, linear: nn.Linear) -> dict[str, tuple[int, ...]]:
        """Return those of A, B and m."""
        return {
            "lora_A.weight": (self.rank, linear.in_features),
            "lora_B.weight": (linear.out_features, self.rank),
            "lora_magnitude_vector": (linear.out_features,),
        }

    def initialize_(self, values: Values, linear: nn.Linear, generator: torch.Generator) -> None:
        """Draw A; B is zero, and m is the norm as passes compute it."""
        _draw_uniform_(values["lora_A.weight"], generator)
        values["lora_magnitude_vector"].copy_(self._norms(linear.weight.detach(), values))

    def project(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, values: Values
    ) -> Tensor:
        """Return x W'^T + bias, as `Tuner` says."""
        ratio = values["lora_magnitude_vector"] / self._norms(weight, values)
        down, up = values["lora_A.weight"], values["lora_B.weight"]
        low_rank = F.linear(inputs, down.to(inputs.dtype))
        change = F.linear(low_rank, up.to(inputs.dtype)) * (self.scale * ratio).to(inputs.dtype)
        return scale_beside_bias(F.linear(inputs, weight, bias), bias, ratio - 1) + change

    def _norms(self, weight: Tensor, values: Values) -> Tensor:
        """Return ||W + s B A|| by row, [O], without a graph."""
        down, up = values["lora_A.weight"].detach(), values["lora_B.weight"].detach()
        norms: Tensor = torch.linalg.vector_norm(weight + self.scale * (up @ down), dim=1)
        return norms


@dataclass(frozen=True)
class Loha:
    """Hadamard product of two low-rank matrices: W' = W + s (A1 B1) * (A2 B2).

    Source: Hyeon-Woo et al., arXiv 2108.06098, section 2.2; B2 starts at zero.

    Attributes:
        rank: r, of either matrix.
        scale: s = alpha / r.
    """

    rank: int
    scale: float

    def check(self, widths: Mapping[str, int], key: str) -> None:
        """Accept all, as `Tuner` says."""

    def shapes(self, linear: nn.Linear) -> dict[str, tuple[int, ...]]:
        """Return those of A1, B1, A2 and B2."""
        left, right = (linear.out_features, self.rank), (self.rank, linear.in_features)
        return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}

    def initialize_(self, values: Values, linear: nn.Linear, generator: torch.Generator) -> None:
        """Draw all but B2."""
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a"):
            _draw_uniform_(values[name], generator)

    def project(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, values: Values
    ) -> Tensor:
        """Return x W'^T + bias, as `Tuner` says."""
        change: Tensor = _HadamardProduct.apply(  # type: ignore[no-untyped-call]
            *(values[name] for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
        )
        change = (self.scale * change).to(inputs.dtype)
        return F.linear(inputs, weight, bias) + F.linear(inputs, change)


class _HadamardProduct(torch.autograd.Function):
    """(A1 B1) * (A2 B2); keeps the factors for the backward pass, and never a product [O, I]."""

    @staticmethod
    def forward(
        ctx: Any, left_1: Tensor, right_1: Tensor, left_2: Tensor, right_2: Tensor
    ) -> Tensor:
        ctx.save_for_backward(left_1, right_1, left_2, right_2)
        return (left_1 @ right_1) * (left_2 @ right_2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        left_1, right_1, left_2, right_2 = ctx.saved_tensors
        (grad,) = gradients
        grad_1 = grad * (left_2 @ right_2)
        grad_2 = grad * (left_1 @ right_1)
        return grad_1 @ right_1.T, left_1.T @ grad_1, grad_2 @ right_2.T, left_2.T @ grad_2


@dataclass(frozen=True)
class Lokr:
    """Kronecker product of two small matrices: W' = W + s C1 (x) C2.

    With the input as a matrix X of I1 rows, the change of the output is s C1 X C2^T: the product
    itself is never made. C2 is A B of rank r where r is less than half of C2's larger side.

    Source: Yeh et al., arXiv 2309.14859, section 3.2; C1 starts at zero.

    Attributes:
        rank: r.
        scale: s = alpha / r.
        largest_side: Of C1; None for the root of the weight's side.
    """

    rank: int
    scale: float
    largest_side: int | None

    def check(self, widths: Mapping[str, int], key: str) -> None:
        """Accept all, as `Tuner` says."""

    def shapes(self, linear: nn.Linear) -> dict[str, tuple[int, ...]]:
        """Return those of C1, and of C2 or its factors A and B."""
        outer_1, outer_2 = self.factorize(linear.out_features)
        inner_1, inner_2 = self.factorize(linear.in_features)
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (outer_1, inner_1)}
        if self.rank < max(outer_2, inner_2) / 2:
            shapes |= {"lokr_w2_a": (outer_2, self.rank), "lokr_w2_b": (self.rank, inner_2)}
        else:
            shapes["lokr_w2"] = (outer_2, inner_2)
        return shapes

    def initialize_(self, values: Values, linear: nn.Linear, generator: torch.Generator) -> None:
        """Draw C2, or both of its factors."""
        for name, value in values.items():
            if name != "lokr_w1":
                _draw_uniform_(value, generator)

    def project(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, values: Values
    ) -> Tensor:
        """Return x W'^T + bias, as `Tuner` says."""
        left = (self.scale * values["lokr_w1"]).to(inputs.dtype)
        names = ["lokr_w2"] if "lokr_w2" in values else ["lokr_w2_b", "lokr_w2_a"]
        change = inputs.unflatten(-1, (left.shape[1], -1))
        for name in names:
            change = F.linear(change, values[name].to(inputs.dtype))
        flat_change: Tensor = (left @ change).flatten(-2)
        return F.linear(inputs, weight, bias) + flat_change

    def factorize(self, size: int) -> tuple[int, int]:
        """Return the sides of C1 and C2 whose product is a side of the weight, as peft has them.

        A `largest_side` that divides it is that of C1. Else the first is the smaller one, and the
        two are as near to each other as they can be with the first up to `largest_side`.
        """
        limit = self.largest_side
        if limit is not None and size % limit == 0:
            return limit, size // limit
        limit = math.isqrt(size) if limit is None else min(limit, math.isqrt(size))
        first = max(each for each in range(1, limit + 1) if size % each == 0)
        return first, size // first


def scale_beside_bias(outputs: Tensor, bias: Tensor | None, factors: Tensor) -> Tensor:
    """Return outputs [..., O] whose part beside the bias is 1 + factors [O] times as long."""
    plain = outputs if bias is None else outputs - bias
    return outputs + plain * factors.to(outputs.dtype)


def _draw_uniform_(values: Tensor, generator: torch.Generator) -> None:
    """Draw as nn.Linear does: uniform in +-1/sqrt(columns)."""
    uniform = torch.rand(values.shape, generator=generator, dtype=torch.float32)
    values.copy_((2 * uniform - 1) * values.shape[1] ** -0.5)
