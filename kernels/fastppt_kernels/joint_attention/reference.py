"""The specification of joint attention with alignment, in the plainest code."""

import torch
from torch import Tensor


def joint_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_text_tokens: int,
    base_map_sum: Tensor,
    scale: float,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output and alignment loss in float64; autograd goes through both.

    P = softmax(query key^T * scale);   output = P value;
    loss = mean_B (1/H) * sum over image queries and text keys of (sum_h P_h - base)^2

    Source: Adaptive Personalized Training (arXiv 2507.02687), equation 6; the block of the joint
    softmax as its map is our choice.

    Args:
        query: [B, H, N, D]; the last ``num_text_tokens`` of the N are text, the others image.
        key: [B, H, N, D].
        value: [B, H, N, D].
        num_text_tokens: Of the N.
        base_map_sum: [B, image tokens, base columns].
        scale: The factor of the products.
        columns: int64 [B, text tokens]: the base column that each is compared with, -1: none;
            None: the one of its own index.
    """
    probabilities = (query.double() @ key.double().mT * scale).softmax(-1)
    num_image_tokens = query.shape[2] - num_text_tokens
    map_sum = probabilities[:, :, :num_image_tokens, num_image_tokens:].sum(1)
    if columns is None:
        difference = map_sum - base_map_sum.double()
    else:
        index = columns.clamp(min=0)[:, None, :].expand_as(map_sum)
        difference = map_sum - base_map_sum.double().gather(2, index)
        difference = torch.where(columns[:, None, :] < 0, 0.0, difference)
    loss = difference.square().sum((1, 2)).mean() / query.shape[1]
    return probabilities @ value.double(), loss
