"""The attention backends: who computes softmax(Q K^T / sqrt(D)) V.

Shape legend: B batch, H heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Takes query [B, H, Q, D], key and value [B, H, K, D], and a mask [B, H, Q, K] that is added to
the logits, or None; returns [B, H, Q, D]."""


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> Attend:
    """Return the attention backend for ``model.attention``.

    Raises:
        UserError: it cannot be used here; says what to install.
    """
    return _sdpa


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
