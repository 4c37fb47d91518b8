"""How sure a measured number is: 95 % intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NORMAL_95 = 1.959964
"""Standard deviations of a normal distribution around its mean that hold 95 % of it."""

RESAMPLES = 2000
"""Of a bootstrap: the ends of its 95 % interval then vary by a few percent of its width."""


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        value: The number.
        low: Lower end of its 95 % interval; None where it has none.
        high: Upper end.
        count: Pictures, or scenes, that it was measured on; None where it was measured on none.
    """

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None


def share(hits: Tensor) -> Score:
    """Return the share of hits, with Wilson's score interval.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Source: E. B. Wilson, JASA 22 (1927). Unlike p +- z sqrt(p (1 - p) / n) it stays between 0 and
    1, and is not empty where all or none are hits.

    Args:
        hits: [N] bool.

    Raises:
        ValueError: there are none.
    """
    count = hits.numel()
    if count == 0:
        raise ValueError("hits: is empty, and a share of nothing is not defined")
    part, square = hits.double().mean().item(), NORMAL_95**2 / count
    middle = (part + square / 2) / (1 + square)
    reach = math.sqrt(square * part * (1 - part) + square**2 / 4) / (1 + square)
    return Score(part, max(0.0, middle - reach), min(1.0, middle + reach), count)


def mean(values: Tensor) -> Score:
    """Return the mean, with the percentile interval of a bootstrap.

    Source: B. Efron, The Annals of Statistics 7 (1979). The resamples are the same every time.

    Args:
        values: [N], independent of one another.

    Raises:
        ValueError: there are none.
    """
    count = values.numel()
    if count == 0:
        raise ValueError("values: is empty, and the mean of nothing is not defined")
    values = values.double().flatten()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = values[drawn].mean(dim=1).quantile(ends).tolist()
    return Score(values.mean().item(), low, high, count)
