"""Attention maps and their alignment: checks, registration with torch.library, autograd.

Shape suffixes: B batch, H heads, Q image tokens, K text tokens, J base columns, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.attention_alignment.launch import (
    launch_alignment,
    launch_backward,
    launch_map_sum,
    runs_kernels,
)
from fastppt_kernels.attention_alignment.plain import (
    backpropagate_maps,
    compare_with_base_,
    sum_maps,
)
from fastppt_kernels.checks import compute_dtype, refuse_second_derivative
from fastppt_kernels.operation import operation

__all__ = [
    "attention_alignment_loss",
    "attention_map_sum",
    "check_columns",
]

COLUMN_DTYPES = (torch.int32, torch.int64)


def attention_map_sum(
    query: Tensor, key: Tensor, *, scale: float | None = None, logsumexp: Tensor | None = None
) -> Tensor:
    """Return the attention maps of image tokens over text tokens, summed over the heads.

    S = sum_h softmax_k(q_h k_h^T * scale),   or   S = sum_h exp(q_h k_h^T * scale - logsumexp_h)

    Source: Adaptive Personalized Training (arXiv 2507.02687), equation 6; the second form, for a
    joint attention of which ``key`` holds the text tokens alone, is our choice.

    Args:
        query: [B, H, Q, D]; float32, bfloat16 or float16 (float64 too, in PyTorch). Any strides;
            [B, Q, H * D] seen as heads is read in place. Not written.
        key: [B, H, K, D], of the query's dtype. Not written.
        scale: The factor of the products; None: D^-1/2.
        logsumexp: [B, H, Q], float32 (float64 with a float64 query): log sum exp of the scaled
            products with all keys, these among them. Not written.

    Returns:
        [B, Q, K], float32 (float64 with a float64 query). Differentiable once, with respect to
        query, key and logsumexp.

    Raises:
        ValueError: A tensor of a wrong shape, dtype or device (named).

    Rounding: products of bfloat16 and float16 are exact in float32, as are sums and maps. Two
        runs are equal bit by bit, and equal to what :func:`attention_alignment_loss` compares.

    Memory traffic: see ``launch_map_sum``; q, k and the sum once, 2 H Q D + 4 Q K bytes and a
        few per cent. FLOPs: 2 H Q K D, and H Q K exponentials. No [B, H, Q, K] is made.
    """
    _check_query_and_key(query, key, logsumexp)
    return _map_sum_op(query, key, _scale_of(query, scale), logsumexp)


def attention_alignment_loss(
    query: Tensor,
    key: Tensor,
    base_map_sum: Tensor,
    *,
    scale: float | None = None,
    logsumexp: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Return how far the head-summed attention maps are from the base's.

    loss = mean_B (1/H) * sum_{q,k} (S - S_base)^2,   S as of :func:`attention_map_sum`

    Source: Adaptive Personalized Training (arXiv 2507.02687), equation 6, without its weight.

    Args:
        query: [B, H, Q, D]; as of :func:`attention_map_sum`.
        key: [B, H, K, D].
        base_map_sum: [B, Q, J], what :func:`attention_map_sum` returned for the base; J = K unless
            there are ``columns``. Not written, and a constant: it must not require a gradient.
        scale: The factor of the products; None: D^-1/2.
        logsumexp: [B, H, Q], as of :func:`attention_map_sum`.
        columns: int32 or int64, [K] or [B, K]: the base column that each column is compared with,
            -1: none. None: the one of its own index. Any other value makes the loss NaN: to look
            at the values would wait for the device. Not written.

    Returns:
        0-dim, float32 (float64 with a float64 query). Reading it on the host synchronises.
        Differentiable once, with respect to query, key and logsumexp.

    Raises:
        ValueError: A tensor of a wrong shape, dtype or device (named); a base that requires a
            gradient.

    Rounding: as :func:`attention_map_sum`. The gradients' products are taken in the inputs' dtype
        (in bfloat16 for float16, whose range is too small), summed in float32, rounded once. With
        S_base = S the loss and all gradients are exactly 0.

    Memory: between forward and backward q, k, a given logsumexp and the difference S - S_base
        [B, Q, K]; for SDXL's 64x64 layer the difference is 10 % of the float32 maps [H, Q, K].
    Memory traffic and FLOPs: see ``launch_alignment`` and ``launch_backward``.
    """
    _check_query_and_key(query, key, logsumexp)
    _check_base(query, key, base_map_sum, columns)
    if columns is not None:
        columns = columns.expand(query.shape[0], -1)
    loss, _ = _alignment_op(query, key, base_map_sum, _scale_of(query, scale), logsumexp, columns)
    return loss


def _scale_of(query: Tensor, scale: float | None) -> float:
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


def _check_query_and_key(query: Tensor, key: Tensor, logsumexp: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, want [batch, heads, tokens, head dim], "
                "none of them 0; split the heads first"
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, want a floating-point dtype")
    wanted = (*query.shape[:2], key.shape[2], query.shape[3])
    if key.shape != wanted:
        raise ValueError(
            f"key: got shape {tuple(key.shape)}, want {wanted}: "
            "the batch, heads and head dim of query"
        )
    _check_kind("key", key, query.dtype, query.device)
    if logsumexp is not None:
        _check_shape("logsumexp", logsumexp, tuple(query.shape[:3]), "batch, heads, queries")
        _check_kind("logsumexp", logsumexp, compute_dtype([query]), query.device)


def _check_base(query: Tensor, key: Tensor, base_map_sum: Tensor, columns: Tensor | None) -> None:
    num_batches, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    check_columns(columns, num_batches, num_keys, query.device)
    wanted = (num_batches, num_queries, num_keys)
    if columns is not None and base_map_sum.dim() == 3 and base_map_sum.shape[2] > 0:
        wanted = (num_batches, num_queries, base_map_sum.shape[2])
    _check_shape("base_map_sum", base_map_sum, wanted, "batch, queries, keys")
    _check_kind("base_map_sum", base_map_sum, compute_dtype([query]), query.device)
    if base_map_sum.requires_grad:
        raise ValueError(
            "base_map_sum: requires a gradient, and the base gets none; "
            "compute it under torch.no_grad()"
        )


def check_columns(
    columns: Tensor | None, num_batches: int, num_keys: int, device: torch.device
) -> None:
    """Raise ValueError unless ``columns`` are None or integers [K] or [B, K] on ``device``."""
    if columns is None:
        return
    if columns.dtype not in COLUMN_DTYPES:
        raise ValueError(f"columns: got dtype {columns.dtype}, want torch.int64 or torch.int32")
    if columns.shape not in ((num_keys,), (num_batches, num_keys)):
        raise ValueError(
            f"columns: got shape {tuple(columns.shape)}, want ({num_keys},) or "
            f"({num_batches}, {num_keys}): a base column for each text token"
        )
    if columns.device != device:
        raise ValueError(f"columns: is on {columns.device}, want {device} like query")


def _check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...], words: str) -> None:
    if tensor.shape != wanted:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, want {wanted}: {words}")


def _check_kind(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, want {dtype} beside this query")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, want {device} like query")


@operation("fastppt_kernels::attention_map_sum")
def _map_sum_op(query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None) -> Tensor:
    sum_of = launch_map_sum if runs_kernels(query) else sum_maps
    return sum_of(query, key, scale, logsumexp)


@operation("fastppt_kernels::attention_alignment")
def _alignment_op(
    query: Tensor,
    key: Tensor,
    base_map_sum: Tensor,
    scale: float,
    logsumexp: Tensor | None,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if runs_kernels(query):
        return launch_alignment(query, key, base_map_sum, scale, logsumexp, columns)
    difference = sum_maps(query, key, scale, logsumexp)
    return compare_with_base_(difference, base_map_sum, columns, query.shape[1]), difference


@operation("fastppt_kernels::attention_map_backward")
def _backward_op(
    query: Tensor,
    key: Tensor,
    grad_map_sum: Tensor,
    grad: Tensor,
    factor: float,
    scale: float,
    logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_kernels(query):
        return launch_backward(query, key, grad_map_sum, grad, factor, scale, logsumexp)
    return backpropagate_maps(query, key, grad_map_sum, grad * factor, scale, logsumexp)


def _fake_map_sum(query: Tensor, key: Tensor) -> Tensor:
    shape = (query.shape[0], query.shape[2], key.shape[2])
    return query.new_empty(shape, dtype=compute_dtype([query]))


@_map_sum_op.register_fake
def _(query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None) -> Tensor:
    return _fake_map_sum(query, key)


@_alignment_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    base_map_sum: Tensor,
    scale: float,
    logsumexp: Tensor | None,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    map_sum = _fake_map_sum(query, key)
    return map_sum.new_empty(()), map_sum


@_backward_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    grad_map_sum: Tensor,
    grad: Tensor,
    factor: float,
    scale: float,
    logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_logsumexp = query.new_empty(0)
    if logsumexp is not None:
        grad_logsumexp = logsumexp.new_empty(logsumexp.shape)
    return torch.empty_like(query), torch.empty_like(key), grad_logsumexp


def _keep_for_map_sum(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, ctx.scale, logsumexp = inputs
    ctx.save_for_backward(query, key, logsumexp)


def _backpropagate_map_sum(ctx: Any, grad_map_sum: Tensor) -> tuple[Any, ...]:
    query, key, logsumexp = ctx.saved_tensors
    one = torch.ones((), dtype=grad_map_sum.dtype, device=grad_map_sum.device)
    grads = _backward_op(query, key, grad_map_sum, one, 1.0, ctx.scale, logsumexp)
    return grads[0], grads[1], None, None if logsumexp is None else grads[2]


def _keep_for_alignment(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, _, ctx.scale, logsumexp, _ = inputs
    difference = output[1]
    ctx.mark_non_differentiable(difference)
    # No zeros [B, Q, K] as the gradient of the difference.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, logsumexp, difference)


def _backpropagate_alignment(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    query, key, logsumexp, difference = ctx.saved_tensors
    factor = 2.0 / (query.shape[0] * query.shape[1])
    grads = _backward_op(query, key, difference, grad, factor, ctx.scale, logsumexp)
    return grads[0], grads[1], None, None, None if logsumexp is None else grads[2], None


_map_sum_op.register_autograd(_backpropagate_map_sum, setup_context=_keep_for_map_sum)
_alignment_op.register_autograd(_backpropagate_alignment, setup_context=_keep_for_alignment)
_backward_op.register_autograd(
    refuse_second_derivative("attention_map_sum, attention_alignment_loss")
)
