"""Adapters of projections that share an input, computed together.

    y_i = x W_i^T + b_i + s (x A_i^T) B_i^T,   i = 1..n

Three products whatever n: all bases, all down-projections, all up-projections. Backward, with g_i
the gradient of y_i and l = x A^T kept from the forward pass:

    dl_i = s g_i B_i,   dB_i = s g_i^T l_i,   dA = dl^T x,   dx = g W + dl A

five products (three where x needs no gradient). dA and dB are added where the optimizer reads them.

Source: Hu et al., arXiv 2106.09685; the grouping is our choice.

Shape legend: M rows of an input, I input width, O output width, r rank, n linears, a of them
adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastppt.families.attention import AdapterSwitch, part


class JointLora:
    """The adapters of n linears of one input; not all of these need one.

    Args:
        down: [a*r, I], the trained down-projections, one below the other; ``.grad`` is written.
        up: [a, O, r], the trained up-projections; ``.grad`` is written.
        working_down: `down` in the dtype that the network computes in.
        working_up: `up` in that dtype.
        whole: The parameter that `down` and `up` are parts of; it makes autograd call the backward.
        adapted: Which of the n linears have an adapter.
        scale: alpha / rank.
        switch: Turns the adapters off for a base pass.
    """

    def __init__(
        self,
        *,
        down: nn.Parameter,
        up: nn.Parameter,
        working_down: Tensor,
        working_up: Tensor,
        whole: nn.Parameter,
        adapted: Sequence[bool],
        scale: float,
        switch: AdapterSwitch,
    ) -> None:
        assert down.grad is not None and up.grad is not None
        self.down, self.up = down, up
        self.scale = scale
        self.switch = switch
        self.num_linears, self.num_adapted = len(adapted), len(up)
        self.adapted = tuple(adapted)
        self._whole = whole
        self._places = _evenly_spaced(adapted)
        # Views once and for all: a view costs the host as much as a product.
        self._down, self._down_t = working_down, working_down.t()
        self._down_grad = down.grad
        # One linear alone has no need of a third dimension: a batch of one product costs the host
        # two views more a product, and more in itself.
        self._is_alone = self.num_linears == 1
        ups = (working_up, working_up.mT, up.grad)
        self._up, self._up_t, self._up_grad = (up[0] for up in ups) if self._is_alone else ups

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Return the n projections, each [..., O], in the inputs' dtype.

        Args:
            inputs: [..., I], in the working dtype.
            weight: [n*O, I], frozen, in that dtype.
            bias: [n*O], frozen, in that dtype; or None.
        """
        # A compiled backward must not write anywhere but into what it returns.
        if torch.compiler.is_compiling():
            return self.formula(inputs, weight, bias)
        outputs: tuple[Tensor, ...] = _Project.apply(inputs, self._whole, self, weight, bias)  # type: ignore[no-untyped-call]
        return outputs

    def formula(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Return the same, linear by linear, with gradients by autograd."""
        down, ups = self.down.to(inputs.dtype), self.up.to(inputs.dtype).unbind()
        low_ranks = F.linear(inputs, down).chunk(len(ups), dim=-1)
        deltas = iter(self.scale * F.linear(*pair) for pair in zip(low_ranks, ups, strict=True))
        bases = part(F.linear(inputs, weight, bias), self.num_linears)
        return tuple(
            base + next(deltas) if adapted else base
            for base, adapted in zip(bases, self.adapted, strict=True)
        )

    def project(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return y [M, n*O] and l [M, a*r] of rows [M, I]; no graph."""
        low_ranks = rows.mm(self._down_t)
        outputs = F.linear(rows, weight, bias)
        if self._is_alone:
            outputs.addmm_(low_ranks, self._up_t, alpha=self.scale)
        else:
            self._adapted_blocks(outputs).baddbmm_(
                _blocks(low_ranks, self.num_adapted), self._up_t, alpha=self.scale
            )
        return outputs, low_ranks

    def low_rank_gradients(self, grad: Tensor, low_ranks: Tensor) -> Tensor:
        """Return dl [M, a*r] of g [M, n*O] and l [M, a*r]."""
        low_rank_grads = torch.empty_like(low_ranks)
        if self._is_alone:
            return low_rank_grads.addmm_(grad, self._up, beta=0, alpha=self.scale)
        _blocks(low_rank_grads, self.num_adapted).baddbmm_(
            self._adapted_blocks(grad), self._up, beta=0, alpha=self.scale
        )
        return low_rank_grads

    def add_gradients(
        self, grad: Tensor, rows: Tensor, low_ranks: Tensor, low_rank_grads: Tensor
    ) -> None:
        """Add dA and dB to the gradients of the adapters.

        Args:
            grad: g [M, n*O].
            rows: x [M, I].
            low_ranks: l [M, a*r].
            low_rank_grads: dl [M, a*r].
        """
        if not self._is_alone:
            grad, low_ranks = self._adapted_blocks(grad), _blocks(low_ranks, self.num_adapted)
        add_product_(self._up_grad, grad.mT, low_ranks, self.scale)
        add_product_(self._down_grad, low_rank_grads.t(), rows, 1.0)

    def add_row_gradients_(self, row_grads: Tensor, low_rank_grads: Tensor) -> Tensor:
        """Add dl A to [M, I] gradients in place, and return these."""
        return row_grads.addmm_(low_rank_grads, self._down)

    def _adapted_blocks(self, rows: Tensor) -> Tensor:
        blocks = _blocks(rows, self.num_linears)
        return blocks if self.num_adapted == self.num_linears else blocks[self._places]


class _Project(torch.autograd.Function):
    """The formulas at the head of this module."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        whole: Tensor,
        lora: JointLora,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Return n tensors [..., O] of inputs [..., I]."""
        rows = inputs.flatten(0, -2)
        outputs, low_ranks = lora.project(rows, weight, bias)
        ctx.save_for_backward(rows, low_ranks)
        ctx.lora, ctx.weight, ctx.shape = lora, weight, inputs.shape
        return part(outputs.view(*inputs.shape[:-1], -1), lora.num_linears)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Add to the gradients of the adapters; return that of the inputs, if it is needed."""
        rows, low_ranks = ctx.saved_tensors
        lora: JointLora = ctx.lora
        grad = (grads[0] if len(grads) == 1 else torch.cat(grads, dim=-1)).flatten(0, -2)
        low_rank_grads = lora.low_rank_gradients(grad, low_ranks)
        if ctx.needs_input_grad[1]:
            lora.add_gradients(grad, rows, low_ranks, low_rank_grads)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        row_grads = lora.add_row_gradients_(grad.mm(ctx.weight), low_rank_grads)
        return row_grads.view(ctx.shape), None, None, None, None


def _evenly_spaced(flags: Sequence[bool]) -> slice:
    """Return where the flags are set, as one slice: true of any choice of up to three."""
    places = [place for place, flag in enumerate(flags) if flag]
    step = places[1] - places[0] if len(places) > 1 else 1
    result = slice(places[0], places[-1] + 1, step)
    assert list(range(len(flags))[result]) == places
    return result


def _blocks(rows: Tensor, num_blocks: int) -> Tensor:
    """Return the column blocks of [M, n*O] rows, [n, M, O], as a view."""
    return rows.view(rows.shape[0], num_blocks, -1).transpose(0, 1)


def add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add ``scale * left @ right`` in place; [x, y], [x, z], [z, y], or a of each.

    Rounds to ``total.dtype`` alone: products in 16 bits are summed in float32, and on a GPU added
    to a float32 total in the same launch. The CPU has no such product and rounds it first.
    """
    if left.dtype == total.dtype:
        add_ = total.addmm_ if total.dim() == 2 else total.baddbmm_
        add_(left, right, alpha=scale)
    elif total.is_cuda:
        total, left, right = (
            each if each.dim() == 3 else each[None] for each in (total, left, right)
        )
        torch.baddbmm(total, left, right, total.dtype, alpha=scale, out=total)
    else:
        total.add_(left @ right, alpha=scale)
