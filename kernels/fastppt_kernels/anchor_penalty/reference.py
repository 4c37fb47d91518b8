"""The specification of the anchor penalty, in the plainest code."""

from collections.abc import Sequence

import torch
from torch import Tensor


def anchor_penalty_reference(
    params: Sequence[Tensor], anchors: Sequence[Tensor | None], weight: float
) -> tuple[Tensor, list[Tensor]]:
    """Return the penalty and its gradients, all in float64.

    penalty = weight * sum_i ||param_i - anchor_i||^2
    gradient_i = 2 * weight * (param_i - anchor_i)

    Source: Preserve and Personalize (arXiv 2505.19519), Algorithm 1, line 9.

    Args:
        params: Tensors of any shapes and floating-point dtypes. Not written.
        anchors: One tensor for each parameter, of its shape; None means zeros. Not written.
        weight: The factor of the sum.

    Returns:
        The penalty, a 0-dim float64 tensor, and one float64 gradient for each parameter.
    """
    penalty = torch.zeros((), dtype=torch.float64)
    gradients = []
    for param, anchor in zip(params, anchors, strict=True):
        difference = param.detach().double()
        if anchor is not None:
            difference = difference - anchor.double()
        penalty = penalty.to(difference.device) + weight * difference.square().sum()
        gradients.append(2 * weight * difference)
    return penalty, gradients
