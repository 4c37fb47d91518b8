"""Ops that torch has for GPUs alone, by those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float, **__: Any) -> Any:
    made = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    state = torch.zeros(2, dtype=torch.int64)
    return (*made, None, None, query.shape[2], key.shape[2], state, state, None)


def _backpropagate(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float
) -> Any:
    # Of the memory-efficient kernel the bias comes before, and the logsumexp is padded.
    output, logsumexp = [each for each in rest[:3] if each is not None][:2]
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(grad, query, key, value, output, logsumexp[..., : query.shape[2]], 0.0, False),
        scale=scale,
    )


def _add_wide_product(
    total: Tensor, left: Tensor, right: Tensor, dtype: Any, *, out: Tensor, alpha: float = 1.0
) -> Tensor:
    assert dtype == total.dtype == out.dtype == torch.float32
    return torch.baddbmm(total, left.float(), right.float(), alpha=alpha, out=out)


SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    aten.baddbmm.dtype_out: _add_wide_product,
    aten._scaled_dot_product_flash_attention.default: _attend,
    aten._scaled_dot_product_efficient_attention.default: lambda *args, **kwargs: _attend(
        *args[:3], scale=kwargs["scale"]
    )[:4],
    aten._scaled_dot_product_flash_attention_backward.default: _backpropagate,
    aten._scaled_dot_product_efficient_attention_backward.default: lambda *args, **kwargs: (
        *_backpropagate(*args, **kwargs),
        None,
    ),
}
