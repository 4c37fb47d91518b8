"""The judge's loss of identity is the published one, and its training can be stopped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastppt.mini.judge import Judge
from fastppt.mini.pretrain import judge as module
from fastppt.mini.pretrain.judge import TEMPERATURE, as_tensor, identity_loss, train_judge
from fastppt.mini.pretrain.scenes import VIEWS, Scenes, draw_subjects, draw_world
from fastppt.mini.pretrain.training import Deadline, OutOfTimeError, Schedule


class DeadlineAtOnce(Deadline):
    def passed(self) -> bool:
        return True


@pytest.fixture(scope="module")
def scenes() -> tuple[Scenes, Scenes]:
    return draw_world(8, seed=10_000), draw_subjects(0, count=3, views=VIEWS, seed=10_000)


def identity_loop(embedding: Tensor, subjects: list[int]) -> Tensor:
    """The equation, pair by pair."""
    terms = []
    for i, one in enumerate(subjects):
        cosines = {
            j: (embedding[i] * embedding[j]).sum() / TEMPERATURE
            for j in range(len(subjects))
            if j != i
        }
        total = torch.stack([value.exp() for value in cosines.values()]).sum()
        terms += [-(cosines[j].exp() / total).log() for j in cosines if subjects[j] == one]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("subjects", [[0, 0], [5, 3, 5, 3], [1, 1, 1, 2, 2, 2, 9]])
def test_identity_loss_is_the_mean_over_pairs(subjects: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = F.normalize(
        torch.randn(len(subjects), 8, generator=generator, dtype=torch.float64), dim=1
    )
    fast, slow = (embedding.clone().requires_grad_() for _ in range(2))
    loss, expected = identity_loss(fast, torch.tensor(subjects)), identity_loop(slow, subjects)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-10, atol=1e-12)


def test_identity_loss_is_lowest_where_a_subject_is_one_point() -> None:
    subjects = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    mixed = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])
    # The two others lie at the opposite pole.
    assert identity_loss(apart, subjects).item() == pytest.approx(
        math.log(1 + 2 * math.exp(-2 / TEMPERATURE)), abs=1e-6
    )
    assert identity_loss(mixed, subjects) > 10


def test_pixels_become_minus_one_to_one(scenes: tuple[Scenes, Scenes]) -> None:
    pixels = scenes[0].pixels
    pictures = as_tensor(pixels)
    assert pictures.shape == (8, 3, 64, 64)
    assert as_tensor(pixels * 0).unique().tolist() == [-1]
    assert as_tensor(pixels * 0 + 255).unique().tolist() == [1]
    assert pictures[2, 1, 5, 7].item() == pytest.approx(pixels[2, 5, 7, 1] / 127.5 - 1)


def test_disturbed_pictures_are_still_the_scene(scenes: tuple[Scenes, Scenes]) -> None:
    pictures = as_tensor(scenes[0].pixels)
    disturbed = module._disturbed(pictures, torch.Generator().manual_seed(0))
    for drawn, picture in zip(disturbed, pictures, strict=True):
        away = min((drawn - side).abs().mean() for side in (picture, picture.flip(2)))
        assert 0 < away < 0.2


def test_resumed_judge_equals_uninterrupted_judge(
    scenes: tuple[Scenes, Scenes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("NUM_WORLD", 2),
        ("NUM_SUBJECTS", 2),
        ("SCHEDULE", Schedule(num_steps=3, learning_rate=1e-3, warmup=2)),
    ):
        monkeypatch.setattr(module, name, value)
    for name in ("whole", "pieces"):
        (tmp_path / name).mkdir()
    whole = train_judge(*scenes, tmp_path / "whole", Deadline(None))
    for _ in range(2):
        with pytest.raises(OutOfTimeError):
            train_judge(*scenes, tmp_path / "pieces", DeadlineAtOnce(None))
    pieces = train_judge(*scenes, tmp_path / "pieces", Deadline(None))
    assert isinstance(whole, Judge) and not whole.training
    state = pieces.state_dict()
    assert all(torch.equal(state[key], value) for key, value in whole.state_dict().items())
