"""The attention maps and their alignment in PyTorch, a chunk of queries at a time.

What the CPU runs, and any device where a tensor is float64. No [B, H, Q, K] is ever there. Shape
suffixes: B batch, H heads, Q image tokens, K text tokens, J base columns, D head dim; q the tokens
of a chunk.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.checks import compute_dtype

# Elements of a chunk of maps [H, q, K]: 256 KB, so that a chunk and what is made of it stay in a
# core's cache.
CHUNK_ELEMENTS = 1 << 16


def split_queries(
    num_heads: int, num_keys: int, *tensors: Tensor | None
) -> Iterator[tuple[Any, ...]]:
    """Yield the tensors, None among them, in chunks of the queries, their last dimension but one.

    The maps [H, q, K] of a chunk have about CHUNK_ELEMENTS. The first is a tensor.
    """
    size = max(1, CHUNK_ELEMENTS // (num_heads * num_keys))
    assert tensors[0] is not None
    if tensors[0].shape[-2] <= size:
        yield tensors
        return
    parts = (repeat(None) if t is None else t.split(size, -2) for t in tensors)
    # What is repeated has no end.
    yield from zip(*parts, strict=False)


def each_sample(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yield the samples of the tensors, None among them."""
    return zip(*(repeat(None) if t is None else t.unbind() for t in tensors), strict=False)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which products are taken in the dtype of what is multiplied."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def sum_maps(query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None) -> Tensor:
    """Do the work of :func:`attention_map_sum` without its checks.

    Returns:
        [B, Q, K], float64 if a tensor is, else float32.
    """
    dtype = compute_dtype([query, key])
    num_batches, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    sum_bqk = query.new_empty((num_batches, num_queries, num_keys), dtype=dtype)
    shift = None if logsumexp is None else logsumexp[..., None]
    with without_autocast(query.device.type):
        for key_hkd, *sample in each_sample(key, sum_bqk, query, shift):
            scaled_hkd = key_hkd.to(dtype) * scale
            for sum_qk, query_hqd, shift_hq1 in split_queries(num_heads, num_keys, *sample):
                maps_hqk = compute_maps(query_hqd.to(dtype), scaled_hkd, shift_hq1)
                torch.sum(maps_hqk, 0, out=sum_qk)
    return sum_bqk


def compute_maps(query_hqd: Tensor, key_hkd: Tensor, logsumexp_hq1: Tensor | None) -> Tensor:
    """Return the maps [H, q, K] of a chunk; the keys are scaled already."""
    logits_hqk = torch.bmm(query_hqd, key_hkd.mT)
    if logsumexp_hq1 is None:
        return logits_hqk.softmax(-1)
    return logits_hqk.sub_(logsumexp_hq1).exp_()


def compare_with_base_(
    map_sum: Tensor, base_map_sum: Tensor, columns: Tensor | None, num_heads: int
) -> Tensor:
    """Subtract the base in place, which leaves the difference D; return the loss.

    Args:
        map_sum: [B, Q, K]; becomes D.
        base_map_sum: [B, Q, J].
        columns: Integers [B, K], or None.
        num_heads: H.

    Returns:
        0-dim, mean_B (1/H) sum D^2, of the dtype of ``map_sum``.
    """
    num_columns = base_map_sum.shape[2]
    squares = []
    for column_k, *sample in each_sample(columns, map_sum, base_map_sum):
        if column_k is not None:
            nearest_k = column_k.clamp(0, num_columns - 1)
            absent_k = column_k == -1
            beyond_k = (column_k != nearest_k) ^ absent_k
        for difference_qk, base_qj in split_queries(1, map_sum.shape[2], *sample):
            if column_k is None:
                difference_qk -= base_qj
            else:
                difference_qk -= base_qj.index_select(1, nearest_k)
                difference_qk.masked_fill_(absent_k, 0.0)
                difference_qk.masked_fill_(beyond_k, torch.nan)
            squares.append(difference_qk.square().sum())
    total = squares[0] if len(squares) == 1 else torch.stack(squares).sum()
    return total / (len(map_sum) * num_heads)


def backpropagate_maps(
    query: Tensor,
    key: Tensor,
    grad_map_sum: Tensor,
    factor: Tensor,
    scale: float,
    logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and logsumexp (no elements where there is none).

    dP = factor * grad_map_sum, of every head;   dlogits_h = P_h * (dP - rowsum(P_h * dP));
    dQ_h = scale dlogits_h K_h,   dK_h = scale dlogits_h^T Q_h.
    With a logsumexp: dlogits_h = P_h * dP,   dlogsumexp_h = -rowsum(P_h * dP).

    Source: our derivation from equation 6 of Adaptive Personalized Training (arXiv 2507.02687).

    Args:
        query: [B, H, Q, D].
        key: [B, H, K, D].
        grad_map_sum: [B, Q, K], float32 or float64.
        factor: 0-dim, of its dtype.
        scale: The factor of the products.
        logsumexp: [B, H, Q], or None.
    """
    dtype = compute_dtype([query, key])
    num_heads, num_keys = query.shape[1], key.shape[2]
    grad_query = torch.empty_like(query)
    grad_key = torch.empty_like(key)
    shift = grad_shift = None
    grad_logsumexp = query.new_empty(0)
    if logsumexp is not None:
        grad_logsumexp = logsumexp.new_empty(logsumexp.shape)
        shift, grad_shift = logsumexp[..., None], grad_logsumexp[..., None]
    tensors = grad_map_sum, query, grad_query, shift, grad_shift
    with without_autocast(query.device.type):
        for key_hkd, grad_key_hkd, *sample in each_sample(key, grad_key, *tensors):
            scaled_hkd = key_hkd.to(dtype) * scale
            sum_hkd = None
            for chunk in split_queries(num_heads, num_keys, *sample):
                grad_sum_qk, query_hqd, grad_query_hqd, shift_hq1, grad_shift_hq1 = chunk
                query_hqd = query_hqd.to(dtype)
                maps_hqk = compute_maps(query_hqd, scaled_hkd, shift_hq1)
                grad_hqk = maps_hqk * (factor * grad_sum_qk)
                sums_hq1 = grad_hqk.sum(-1, keepdim=True)
                if shift_hq1 is None:
                    grad_hqk.addcmul_(maps_hqk, sums_hq1, value=-1)
                else:
                    torch.neg(sums_hq1, out=grad_shift_hq1)
                grad_query_hqd.copy_(torch.bmm(grad_hqk, scaled_hkd))
                # Not baddbmm_, which on the CPU takes the heads one by one.
                part_hkd = torch.bmm(grad_hqk.mT, query_hqd)
                sum_hkd = part_hkd if sum_hkd is None else sum_hkd.add_(part_hkd)
            assert sum_hkd is not None
            torch.mul(sum_hkd, scale, out=grad_key_hkd)
    return grad_query, grad_key, grad_logsumexp
