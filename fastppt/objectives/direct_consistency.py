"""Direct Consistency Optimization (Lee et al., arXiv 2402.12004).

Shape legend: B batch, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastppt.objectives.denoising import denoising_losses


def direct_consistency_loss(
    prediction: Tensor, base_prediction: Tensor, target: Tensor, beta: float
) -> Tensor:
    """Return how far the tuned network is from predicting better than the base.

    loss = -log sigmoid(-beta (L_tuned - L_base)),   L = mean over B, C, h, w of the squared error

    It is log 2 where both predict equally well, and falls to zero as the tuned network gets better;
    its gradient is that of the denoising loss times beta sigmoid(beta (L_tuned - L_base)).

    Source: Direct Consistency Optimization (arXiv 2402.12004), its loss with the batch's means
    inside, as in the authors' code (github.com/kyungmnlee/dco).

    Args:
        prediction: [B, C, h, w], of the tuned network on the subject prompt, any float dtype.
        base_prediction: Likewise of the base on the class prompt; it has no gradient.
        target: [B, C, h, w], what both were to predict, float32 or float64; all is computed in its
            dtype.
        beta: In units of 1 / loss.

    Returns:
        0-dim, in the target's dtype.
    """
    ahead = (
        denoising_losses(base_prediction, target).mean()
        - denoising_losses(prediction, target).mean()
    )
    loss: Tensor = -logsigmoid(beta * ahead)
    return loss
