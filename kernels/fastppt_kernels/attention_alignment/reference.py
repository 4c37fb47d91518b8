"""The specification of the attention maps and their alignment, in the plainest code.

Shape suffixes: B batch, H heads, Q image tokens, K text tokens, J base columns, D head dim.
"""

import torch
from torch import Tensor


def attention_map_sum_reference(
    query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None = None
) -> Tensor:
    """Return the sum over the heads of the attention maps, in float64; autograd goes through it.

    P_h = softmax_k(q_h k_h^T * scale), or exp(q_h k_h^T * scale - logsumexp_h);   S = sum_h P_h

    Source: Adaptive Personalized Training (arXiv 2507.02687), equation 6.

    Args:
        query: [B, H, Q, D].
        key: [B, H, K, D].
        scale: The factor of the products.
        logsumexp: [B, H, Q], over keys of which ``key`` is a part, or None.

    Returns:
        float64 [B, Q, K].
    """
    logits_bhqk = query.double() @ key.double().mT * scale
    if logsumexp is None:
        return logits_bhqk.softmax(-1).sum(1)
    return (logits_bhqk - logsumexp.double()[..., None]).exp().sum(1)


def attention_alignment_reference(
    query: Tensor,
    key: Tensor,
    base_map_sum: Tensor,
    scale: float,
    logsumexp: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Return the alignment loss in float64; autograd goes through it.

    loss = mean_B (1/H) * sum_{q,k} (S - S_base)^2

    Source: as above; the columns are our choice.

    Args:
        query: [B, H, Q, D].
        key: [B, H, K, D].
        base_map_sum: [B, Q, J].
        scale: The factor of the products.
        logsumexp: As above.
        columns: int64 [B, K]: the base column that a column is compared with, -1 for none; None:
            the one of its own index.

    Returns:
        0-dim float64.
    """
    base_bqk = base_map_sum.double()
    difference_bqk = attention_map_sum_reference(query, key, scale, logsumexp)
    if columns is None:
        difference_bqk = difference_bqk - base_bqk
    else:
        index_bqk = columns.clamp(min=0)[:, None, :].expand_as(difference_bqk)
        difference_bqk = difference_bqk - base_bqk.gather(2, index_bqk)
        difference_bqk = torch.where(columns[:, None, :] < 0, 0.0, difference_bqk)
    return difference_bqk.square().sum((1, 2)).mean() / query.shape[1]
