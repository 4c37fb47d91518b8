"""The judge reads scenes that it has not seen, and knows subjects again that it has not met."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.preservation_plan import FIRST_SUBJECT as BENCH_SUBJECT
from bench.preservation_plan import NOUNS as BENCH_NOUNS
from fastppt.errors import UserError
from fastppt.evaluation.exam import SCENE_STREAM
from fastppt.evaluation.identity import FIRST_SUBJECT as OTHER_SUBJECT
from fastppt.evaluation.identity import NUM_SUBJECTS as NUM_OTHERS
from fastppt.mini.__main__ import LAST_SUBJECT
from fastppt.mini.judge import (
    EMBEDDING_WIDTH,
    FEATURE_WIDTH,
    WEIGHTS,
    WIDTHS,
    Judge,
    Verdict,
    load_judge,
)
from fastppt.mini.photos import DEMO_SEED
from fastppt.mini.pretrain.judge import as_tensor
from fastppt.mini.pretrain.scenes import (
    FIRST_SUBJECT,
    NUM_SUBJECT_SHARDS,
    NUM_WORLD_SHARDS,
    draw_world,
)
from fastppt.mini.prompt_following import PROMPT_STREAM
from fastppt.mini.world import (
    COLORS,
    NOUNS,
    PLACES,
    STYLES,
    random_scene,
    random_subject,
    render,
)

HELD_OUT = 10_000
"""Scenes of this seed and higher ones are in no training."""


@pytest.fixture
def untrained() -> Judge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Judge().eval()


def read(pixels: np.ndarray) -> Verdict:
    """What the shipped judge reads in pictures [B, 64, 64, 3]."""
    parts = [load_judge()(part) for part in as_tensor(pixels).split(100)]
    names = ("nouns", "colors", "contexts", "styles", "embedding", "features")
    return Verdict(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def share_recognised(num_subjects: int, noun: str | None = None) -> float:
    """How many of two other scenes of each subject lie nearest to its own photos.

    A subject is the mean embedding of five photos of it.
    """
    rng = np.random.default_rng([HELD_OUT, 2])
    subjects = [random_subject(seed, noun) for seed in range(num_subjects)]
    photos = [
        render(random_scene(rng, style="photo", subject=subject))
        for subject in subjects
        for _ in range(5)
    ]
    others = [render(random_scene(rng, subject=subject)) for subject in subjects for _ in range(2)]
    gallery = read(np.stack(photos)).embedding.unflatten(0, (num_subjects, 5)).mean(1)
    nearest = (read(np.stack(others)).embedding @ gallery.T).argmax(1)
    return (nearest == torch.arange(num_subjects).repeat_interleave(2)).double().mean().item()


def test_training_saw_none_of_the_scenes_and_subjects_that_are_tested() -> None:
    assert max(NUM_WORLD_SHARDS, NUM_SUBJECT_SHARDS) < HELD_OUT
    # Those of these tests, and those that runs are evaluated and compared by.
    used = (100, DEMO_SEED, OTHER_SUBJECT + NUM_OTHERS, BENCH_SUBJECT + len(BENCH_NOUNS))
    assert max(used) < FIRST_SUBJECT
    # What the command draws photos of.
    assert LAST_SUBJECT < FIRST_SUBJECT
    # Streams 1 and 2 of the seeds below are the training's.
    assert len({1, 2, PROMPT_STREAM, SCENE_STREAM}) == 4


def test_weights_are_float16_and_at_most_a_megabyte() -> None:
    assert WEIGHTS.stat().st_size <= 1_000_000
    floats = {value.dtype for value in load_file(WEIGHTS).values() if value.is_floating_point()}
    assert floats == {torch.float16}


def test_judge_is_loaded_once_for_reading() -> None:
    judge = load_judge()
    assert judge is load_judge()
    assert not judge.training
    assert not any(weight.requires_grad for weight in judge.parameters())
    assert {weight.dtype for weight in judge.parameters()} == {torch.float32}


@pytest.mark.parametrize("keep", [None, 0, 1000, -1])
def test_a_judge_that_is_missing_or_truncated_is_named(
    keep: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "judge.safetensors"
    if keep is not None:
        file.write_bytes(WEIGHTS.read_bytes()[:keep])
    monkeypatch.setattr("fastppt.mini.judge.WEIGHTS", file)
    with pytest.raises(UserError, match="install the package again") as error:
        load_judge.__wrapped__()
    assert str(error.value).startswith(f"judge: {file} cannot be loaded (")
    assert "\n" not in str(error.value)


def test_a_judge_of_another_shape_is_refused(
    untrained: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = untrained.state_dict()
    del state["noun.bias"]
    save_file(state, tmp_path / "judge.safetensors")
    monkeypatch.setattr("fastppt.mini.judge.WEIGHTS", tmp_path / "judge.safetensors")
    with pytest.raises(UserError, match=r"cannot be loaded \(.*noun\.bias.*\)"):
        load_judge.__wrapped__()


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_judge_reads_scenes_it_has_not_seen(count: int) -> None:
    scenes = draw_world(count, seed=HELD_OUT + count)
    verdict = read(scenes.pixels)

    def share_right(logits: Tensor, truth: np.ndarray) -> float:
        return (logits.argmax(1) == torch.from_numpy(truth)).double().mean().item()

    assert share_right(verdict.nouns, scenes.nouns) >= 0.98
    assert share_right(verdict.colors, scenes.colors) >= 0.98
    assert share_right(verdict.contexts, scenes.contexts) >= 0.98
    assert share_right(verdict.styles, scenes.styles) >= 0.98


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_judge_knows_subjects_again_that_it_has_not_met(count: int) -> None:
    assert share_recognised(count) >= 0.95


@pytest.mark.slow
def test_judge_tells_subjects_of_one_noun_apart() -> None:
    assert share_recognised(100, noun="robot") >= 0.9


def test_verdict_has_an_answer_to_every_question(untrained: Judge) -> None:
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    verdict = untrained(pictures)
    assert verdict.nouns.shape == (3, len(NOUNS))
    assert verdict.colors.shape == (3, len(COLORS))
    assert verdict.contexts.shape == (3, len(PLACES))
    assert verdict.styles.shape == (3, len(STYLES))
    assert verdict.features.shape == (3, FEATURE_WIDTH)
    assert verdict.embedding.shape == (3, EMBEDDING_WIDTH)
    torch.testing.assert_close(verdict.embedding.norm(dim=1), torch.ones(3))


def test_maps_are_those_that_the_features_are_taken_from(untrained: Judge) -> None:
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = untrained.maps(pictures)
    sizes = [(2, width, side, side) for width, side in zip(WIDTHS, (32, 16, 8), strict=True)]
    assert [tuple(part.shape) for part in maps] == sizes
    features = untrained(pictures).features
    assert torch.equal(features[:, : WIDTHS[-1]], maps[-1].mean((2, 3)))
    assert torch.equal(features[:, WIDTHS[-1] :], maps[-1].amax((2, 3)))


def test_verdict_on_a_picture_does_not_depend_on_the_others(untrained: Judge) -> None:
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together, alone = untrained(pictures), untrained(pictures[2:3])
    for name in ("nouns", "colors", "contexts", "styles", "embedding", "features"):
        torch.testing.assert_close(getattr(together, name)[2:3], getattr(alone, name))
