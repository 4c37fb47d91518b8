"""Who counts as the subject."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastppt.evaluation.identity import equal_error_threshold, similarity


def test_similarity_is_the_mean_cosine_to_the_photos() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(7, 64, generator=generator), dim=1)
    photos = F.normalize(torch.randn(5, 64, generator=generator), dim=1)
    expected = F.cosine_similarity(embeddings[:, None], photos[None], dim=2).mean(dim=1)
    torch.testing.assert_close(similarity(embeddings, photos), expected)


def test_sets_that_do_not_overlap_are_parted_without_error() -> None:
    threshold, error = equal_error_threshold(torch.tensor([0.8, 0.9]), torch.tensor([0.1, 0.6]))
    assert threshold == pytest.approx(0.7)
    assert error == 0


def test_overlapping_sets_are_misjudged_alike_whatever_their_sizes() -> None:
    same, strange = torch.linspace(0.4, 1.0, 61), torch.linspace(0.0, 0.6, 241)
    threshold, error = equal_error_threshold(same, strange)
    missed = (same < threshold).double().mean().item()
    taken = (strange >= threshold).double().mean().item()
    assert missed == pytest.approx(taken, abs=0.01)
    assert error == pytest.approx((missed + taken) / 2)
    assert threshold == pytest.approx(0.5, abs=0.01)
