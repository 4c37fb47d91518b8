"""Intervals against published values and closed forms."""

from __future__ import annotations

import pytest
import torch

from fastppt.evaluation.intervals import mean, share


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # By the formula in exact arithmetic; 81 of 263 is Wilson's score in Newcombe (1998), table I.
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_share_has_wilsons_interval(hits: int, count: int, low: float, high: float) -> None:
    score = share(torch.arange(count) < hits)
    assert score.value == pytest.approx(hits / count)
    assert (score.low, score.high) == pytest.approx((low, high), abs=1e-4)
    assert score.count == count


def test_mean_has_an_interval_of_the_width_that_the_normal_law_says() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = mean(values)
    assert score.value == pytest.approx(values.mean().item(), rel=1e-12)
    assert score.low is not None and score.high is not None
    width = 2 * 1.96 * values.std().item() / 200**0.5
    assert score.high - score.low == pytest.approx(width, rel=0.1)
    assert score.low < score.value < score.high


def test_mean_of_equal_values_is_certain_and_the_same_twice() -> None:
    assert mean(torch.full((5,), 2.0)) == mean(torch.full((5,), 2.0))
    assert mean(torch.full((5,), 2.0)).low == 2.0


def test_nothing_has_no_share_and_no_mean() -> None:
    with pytest.raises(ValueError, match="hits: is empty"):
        share(torch.empty(0, dtype=torch.bool))
    with pytest.raises(ValueError, match="values: is empty"):
        mean(torch.empty(0))
