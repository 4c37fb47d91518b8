"""The attention maps and their alignment in PyTorch, a chunk of queries at a time.

What the CPU runs, and any device where a tensor is float64. No [B, H, Q, K] is ever there. Shape
suffixes: B batch, H heads, Q image tokens, K text tokens, J base columns, D head dim; q the tokens
of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastppt_kernels.checks import compute_dtype

# Elements of a chunk of maps [H, q, K]: 256 KB, so that a chunk and what is made of it stay in a
# core's cache.
CHUNK_ELEMENTS = 1 << 16


def split_queries(num_heads: int, num_queries: int, num_keys: int) -> Iterator[slice]:
    """Yield the chunks of queries whose maps [H, q, K] have about CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // (num_heads * num_keys))
    for start in range(0, num_queries, size):
        yield slice(start, min(start + size, num_queries))


def sum_maps(query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None) -> Tensor:
    """Do the work of :func:`attention_map_sum` without its checks.

    Returns:
        [B, Q, K], float64 if a tensor is, else float32.
    """
    dtype = compute_dtype([query, key])
    num_batches, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    sum_bqk = query.new_empty((num_batches, num_queries, num_keys), dtype=dtype)
    # Under autocast the products would be taken in bfloat16.
    with torch.autocast(query.device.type, enabled=False):
        for batch in range(num_batches):
            key_hkd = key[batch].to(dtype) * scale
            for rows in split_queries(num_heads, num_queries, num_keys):
                query_hqd = query[batch, :, rows].to(dtype)
                chunk = None if logsumexp is None else logsumexp[batch, :, rows]
                sum_bqk[batch, rows] = compute_maps(query_hqd, key_hkd, chunk).sum(0)
    return sum_bqk


def compute_maps(query_hqd: Tensor, key_hkd: Tensor, logsumexp_hq: Tensor | None) -> Tensor:
    """Return the maps [H, q, K] of a chunk; the keys are scaled already."""
    logits_hqk = torch.bmm(query_hqd, key_hkd.mT)
    if logsumexp_hq is None:
        return logits_hqk.softmax(-1)
    return logits_hqk.sub_(logsumexp_hq[..., None]).exp_()


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
    num_batches, num_queries, num_keys = map_sum.shape
    num_columns = base_map_sum.shape[2]
    squares = []
    for batch in range(num_batches):
        for rows in split_queries(1, num_queries, num_keys):
            difference_qk, base_qj = map_sum[batch, rows], base_map_sum[batch, rows]
            if columns is None:
                difference_qk -= base_qj
            else:
                column_k = columns[batch]
                difference_qk -= base_qj.index_select(1, column_k.clamp(0, num_columns - 1))
                difference_qk.masked_fill_(column_k == -1, 0.0)
                beyond_k = (column_k < -1) | (column_k >= num_columns)
                difference_qk.masked_fill_(beyond_k, torch.nan)
            squares.append(difference_qk.square().sum())
    return torch.stack(squares).sum() / (num_batches * num_heads)


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
    num_batches, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    grad_query = torch.empty_like(query)
    grad_key = torch.zeros_like(key, dtype=dtype)
    grad_logsumexp = query.new_empty(0)
    if logsumexp is not None:
        grad_logsumexp = logsumexp.new_empty(logsumexp.shape)
    with torch.autocast(query.device.type, enabled=False):
        for batch in range(num_batches):
            key_hkd = key[batch].to(dtype) * scale
            for rows in split_queries(num_heads, num_queries, num_keys):
                query_hqd = query[batch, :, rows].to(dtype)
                chunk = None if logsumexp is None else logsumexp[batch, :, rows]
                maps_hqk = compute_maps(query_hqd, key_hkd, chunk)
                grad_hqk = maps_hqk * (factor * grad_map_sum[batch, rows])
                sums_hq = grad_hqk.sum(-1)
                if logsumexp is None:
                    grad_hqk.addcmul_(maps_hqk, sums_hq[..., None], value=-1)
                else:
                    grad_logsumexp[batch, :, rows] = -sums_hq
                grad_query[batch, :, rows] = torch.bmm(grad_hqk, key_hkd)
                grad_key[batch].baddbmm_(grad_hqk.mT, query_hqd, alpha=scale)
    return grad_query, grad_key.to(key.dtype), grad_logsumexp
