"""Prior preservation: the class as the base draws it, trained on beside the subject.

Source: DreamBooth (Ruiz et al., arXiv 2208.12242), equation 2.
Shape legend: B photos of a batch, and as many class images.
"""

from __future__ import annotations

import torch
from torch import Tensor


def join_halves(subject: Tensor, plain: Tensor) -> Tensor:
    """Return [2 B, ...], what belongs to the photos and then what belongs to the class images."""
    return torch.cat([subject, plain])


def mean_of_halves(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of photos and of class images, each the mean of its own half, 0-dim.

    The step's loss is that of the photos plus ``weight`` times that of the class images.

    Args:
        losses: [2 B], a sample each, as `join_halves` orders them.
    """
    subject, plain = losses.chunk(2)
    return subject.mean(), plain.mean()
