"""Attention with a logsumexp that has a gradient, in PyTorch, a chunk of queries at a time.

No [B, H, N, M] is ever there. Shape suffixes: B batch, H heads, N queries, M keys, D head dim; n
the queries of a chunk.
"""

import torch
from torch import Tensor

from fastppt_kernels.attention_alignment.plain import split_queries
from fastppt_kernels.checks import compute_dtype


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(query key^T * scale) value, and the logsumexp of the scaled products.

    Args:
        query: [B, H, N, D].
        key: [B, H, M, D].
        value: [B, H, M, D].
        scale: The factor of the products.

    Returns:
        [B, H, N, D] in the query's dtype, and [B, H, N], float64 if a tensor is, else float32.
    """
    dtype = compute_dtype([query, key, value])
    num_batches, num_heads, num_queries, _ = query.shape
    output = torch.empty_like(query)
    logsumexp = query.new_empty(query.shape[:3], dtype=dtype)
    # Under autocast the products would be taken in bfloat16.
    with torch.autocast(query.device.type, enabled=False):
        for batch in range(num_batches):
            key_hmd, value_hmd = key[batch].to(dtype) * scale, value[batch].to(dtype)
            for rows in split_queries(num_heads, num_queries, key.shape[2]):
                logits_hnm = torch.bmm(query[batch, :, rows].to(dtype), key_hmd.mT)
                logsumexp_hn = logits_hnm.logsumexp(-1)
                logsumexp[batch, :, rows] = logsumexp_hn
                maps_hnm = logits_hnm.sub_(logsumexp_hn[..., None]).exp_()
                output[batch, :, rows] = torch.bmm(maps_hnm, value_hmd)
    return output, logsumexp


def backpropagate_attention(
    grad_output: Tensor,
    grad_logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    P = exp(logits - logsumexp);   delta = rowsum(dO * O) - dlogsumexp;
    dlogits = P * (dO V^T - delta);   dQ = scale dlogits K,   dK = scale dlogits^T Q,   dV = P^T dO.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2, with our shift of delta.

    Args:
        grad_output: [B, H, N, D].
        grad_logsumexp: [B, H, N].
        query: [B, H, N, D].
        key: [B, H, M, D].
        value: [B, H, M, D].
        output: [B, H, N, D].
        logsumexp: [B, H, N].
        scale: The factor of the products.
    """
    dtype = compute_dtype([query, key, value])
    num_batches, num_heads, num_queries, _ = query.shape
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros_like(t, dtype=dtype) for t in (key, value))
    with torch.autocast(query.device.type, enabled=False):
        for batch in range(num_batches):
            key_hmd, value_hmd = key[batch].to(dtype) * scale, value[batch].to(dtype)
            for rows in split_queries(num_heads, num_queries, key.shape[2]):
                query_hnd = query[batch, :, rows].to(dtype)
                grad_hnd = grad_output[batch, :, rows].to(dtype)
                delta_hn = (grad_hnd * output[batch, :, rows].to(dtype)).sum(-1)
                delta_hn -= grad_logsumexp[batch, :, rows]
                maps_hnm = torch.bmm(query_hnd, key_hmd.mT)
                maps_hnm.sub_(logsumexp[batch, :, rows, None]).exp_()
                grad_value[batch].baddbmm_(maps_hnm.mT, grad_hnd)
                grad_hnm = torch.bmm(grad_hnd, value_hmd.mT)
                grad_hnm.sub_(delta_hn[..., None]).mul_(maps_hnm)
                grad_query[batch, :, rows] = torch.bmm(grad_hnm, key_hmd)
                grad_key[batch].baddbmm_(grad_hnm.mT, query_hnd, alpha=scale)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
