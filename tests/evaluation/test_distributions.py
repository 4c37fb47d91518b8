"""Distances of distributions against plain references, and on sets whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastppt.evaluation.distributions import frechet_distance, precision


def draw(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


def frechet_reference(first: Tensor, second: Tensor) -> float:
    """The formula as it stands, with the root of C_1^(1/2) C_2 C_1^(1/2), which has its trace."""
    one, two = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(one)
    half = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    root = torch.linalg.eigvalsh(half @ two @ half).clamp(min=0).sqrt().sum()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    return float(shift + one.trace() + two.trace() - 2 * root)


@pytest.mark.parametrize(("count", "width"), [(200, 7), (40, 63)])
def test_frechet_distance_equals_the_formula_also_with_fewer_samples_than_features(
    count: int, width: int
) -> None:
    first = draw(count, width, 0)
    second = draw(count + 9, width, 1) @ draw(width, width, 2) + 0.3
    expected = frechet_reference(first, second)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_gaussians_on_a_line_is_the_closed_form() -> None:
    """(m_1 - m_2)^2 + (s_1 - s_2)^2."""
    first = draw(50, 1, 0)
    first = (first - first.mean()) / first.std()
    assert frechet_distance(first, 3 * first + 2) == pytest.approx(4 + 4)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    first = draw(30, 224, 0)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_a_single_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="second: has 1 samples"):
        frechet_distance(draw(5, 3, 0), draw(1, 3, 1))


def precision_reference(real: Tensor, drawn: Tensor, neighbors: int) -> list[bool]:
    reaches = [sorted((real - each).norm(dim=1).tolist())[neighbors] for each in real]
    return [
        any((each - one).norm() <= reach for one, reach in zip(real, reaches, strict=True))
        for each in drawn
    ]


@pytest.mark.parametrize("neighbors", [1, 3])
def test_precision_equals_a_plain_loop(neighbors: int) -> None:
    real, drawn = draw(40, 5, 0), 1.4 * draw(31, 5, 1)
    inside = precision(real, drawn, neighbors)
    assert inside.tolist() == precision_reference(real, drawn, neighbors)
    assert 0 < inside.double().mean() < 1


def test_precision_and_recall_tell_what_is_missing_from_what_is_wrong() -> None:
    """Two clusters, of which one set has but one: all that it has is right, and half is missing."""
    both = torch.cat([0.1 * draw(20, 4, 0), 0.1 * draw(20, 4, 1) + 10])
    one = both[:20]
    assert precision(both, one).double().mean() == 1.0
    assert precision(one, both).double().mean() == 0.5
    assert not precision(both, one + 100).any()


def test_a_set_is_inside_itself_though_points_repeat() -> None:
    twice = draw(8, 224, 0).repeat(2, 1)
    assert precision(twice, twice, 1).all()


def test_precision_takes_more_samples_than_neighbours() -> None:
    with pytest.raises(ValueError, match="real: has 3 samples"):
        precision(draw(3, 2, 0), draw(9, 2, 1))
