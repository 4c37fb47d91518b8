"""How far apart two sets of pictures are, as distributions of features."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBORS = 3
"""k of the manifolds of `precision` (the paper's own choice)."""


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Frechet distance of two sets, each taken for a Gaussian.

    d^2 = ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

    Source: Dowson and Landau (1982); of features of pictures, Heusel et al. (arXiv 1706.08500,
    equation 6). Of N samples it is too large by what shrinks with 1/N, so two values compare only
    at the same N. The trace of the root is the nuclear norm of X_1 X_2^T / (N - 1), where X are the
    centred samples: no root of a matrix that has no full rank is taken.

    Args:
        first: [N, D].
        second: [M, D].

    Raises:
        ValueError: fewer than two samples in a set.
    """
    for name, features in (("first", first), ("second", second)):
        if len(features) < 2:
            raise ValueError(
                f"{name}: has {len(features)} samples; a covariance takes two at least"
            )
    first, second = first.double(), second.double()
    shift = first.mean(dim=0) - second.mean(dim=0)
    centered = [(each - each.mean(dim=0)) / (len(each) - 1) ** 0.5 for each in (first, second)]
    traces = torch.stack([each.square().sum() for each in centered]).sum()
    root = torch.linalg.svdvals(centered[0] @ centered[1].T).sum()
    return max(0.0, float(shift.square().sum() + traces - 2 * root))


def precision(real: Tensor, drawn: Tensor, neighbors: int = NEIGHBORS) -> Tensor:
    """Say of each drawn sample whether it lies on the manifold of the real ones.

    The manifold is the union of the balls around real samples that reach to their ``neighbors``-th
    nearest other one. The mean is the precision; with the two sets exchanged it is the recall.

    Source: Kynkaanniemi et al. (arXiv 1904.06991), equations 1 and 2.

    Args:
        real: [N, D].
        drawn: [M, D].
        neighbors: k of the paper.

    Returns:
        [M] bool.

    Raises:
        ValueError: there are not more than ``neighbors`` real samples.
    """
    if len(real) <= neighbors:
        raise ValueError(f"real: has {len(real)} samples; take more than neighbors ({neighbors})")
    real, drawn = real.double(), drawn.double()
    # The nearest one is the sample itself. Distances that are exact: those of expanded squares are
    # not 0 for the same point.
    exact = "donot_use_mm_for_euclid_dist"
    reach = torch.cdist(real, real, compute_mode=exact).kthvalue(neighbors + 1, dim=1).values
    return (torch.cdist(drawn, real, compute_mode=exact) <= reach).any(dim=1)
