"""The specification of the LoRA anchor penalty: it forms the weights that the op never forms."""

from collections.abc import Sequence

import torch
from torch import Tensor


def lora_anchor_penalty_reference(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    weight: float,
    *,
    anchor_downs: Sequence[Tensor | None] | None = None,
    anchor_ups: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the penalty and its gradients, all in float64.

    dW_i = s_i B_i A_i - s_i B0_i A0_i,   penalty = weight * sum_i ||dW_i||^2
    gradient of A_i = 2 weight s_i B_i^T dW_i,   gradient of B_i = 2 weight s_i dW_i A_i^T

    Source: Preserve and Personalize (arXiv 2505.19519), Algorithm 1, line 9, with the network's
    weights as its parameters. Our choice: the penalty of a LoRA run is on s B A, not on A and B.

    Args:
        downs: The A_i, [rank, in], of any floating-point dtype. Not written.
        ups: The B_i, [out, rank]. Not written.
        scales: The s_i.
        weight: The factor of the sum.
        anchor_downs: The A0_i, of the shapes of ``downs``; None means dW0 = 0. Not written.
        anchor_ups: The B0_i, of the shapes of ``ups``, None where ``anchor_downs`` has it.

    Returns:
        The penalty, a 0-dim float64 tensor, and the float64 gradients of ``downs`` and ``ups``.
    """
    no_anchors = [None] * len(downs)
    penalty = torch.zeros((), dtype=torch.float64)
    down_gradients, up_gradients = [], []
    for down, up, scale, anchor_down, anchor_up in zip(
        downs, ups, scales, anchor_downs or no_anchors, anchor_ups or no_anchors, strict=True
    ):
        down, up = down.detach().double(), up.detach().double()
        change = scale * up @ down
        if anchor_down is not None and anchor_up is not None:
            change = change - scale * anchor_up.double() @ anchor_down.double()
        penalty = penalty.to(change.device) + weight * change.square().sum()
        down_gradients.append(2 * weight * scale * up.T @ change)
        up_gradients.append(2 * weight * scale * change @ down.T)
    return penalty, down_gradients, up_gradients
