"""The scenes that everything is trained on: rendered once, the same wherever that happens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from fastppt.errors import UserError
from fastppt.mini.pretrain import scenes as module
from fastppt.mini.pretrain.scenes import (
    VIEWS,
    Scenes,
    draw_subjects,
    draw_world,
    load_shards,
    make_shards,
)
from fastppt.mini.world import COLORS, NOUNS, PLACES, STYLES, random_scene, random_subject, render


def is_equal(one: Scenes, other: Scenes) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in fields(Scenes)
    )


def test_truth_of_the_world_is_that_of_its_scenes() -> None:
    drawn, rng = draw_world(8, seed=10_000), np.random.default_rng([10_000, 1])
    for index in range(8):
        scene = random_scene(rng)
        assert np.array_equal(drawn.pixels[index], render(scene))
        assert NOUNS[drawn.nouns[index]] == scene.noun
        assert list(COLORS)[drawn.colors[index]] == scene.color
        assert PLACES[drawn.contexts[index]] == scene.context
        assert STYLES[drawn.styles[index]] == scene.style
    assert (drawn.subjects == -1).all()


def test_subjects_are_shown_one_after_the_other() -> None:
    drawn, rng = draw_subjects(40, count=2, views=3, seed=7), np.random.default_rng([7, 2])
    assert drawn.subjects.tolist() == [40, 40, 40, 41, 41, 41]
    assert (drawn.colors == -1).all()
    for index, number in enumerate(drawn.subjects.tolist()):
        scene = random_scene(rng, subject=random_subject(number))
        assert np.array_equal(drawn.pixels[index], render(scene))


def test_shards_are_rendered_once_and_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SHARD_SIZE", 5), ("NUM_WORLD_SHARDS", 2), ("NUM_SUBJECT_SHARDS", 2)):
        monkeypatch.setattr(module, name, value)
    # Threads see what was set here; new processes would not, wherever they are not forked.
    monkeypatch.setattr(module, "ProcessPoolExecutor", ThreadPoolExecutor)
    make_shards(tmp_path)
    world, subjects = load_shards(tmp_path, "world"), load_shards(tmp_path, "subjects")
    parts = [draw_world(5, seed) for seed in range(2)]
    assert np.array_equal(world.pixels, np.concatenate([part.pixels for part in parts]))
    first = module.FIRST_SUBJECT
    assert subjects.subjects.tolist() == [first] * VIEWS + [first + 1] * VIEWS

    kept = tmp_path / "world-000.safetensors"
    before = kept.stat().st_mtime_ns
    (tmp_path / "world-001.safetensors").unlink()
    make_shards(tmp_path)
    assert kept.stat().st_mtime_ns == before
    assert is_equal(load_shards(tmp_path, "world"), world)


def test_a_part_of_the_shards_is_not_taken_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SHARD_SIZE", 5), ("NUM_WORLD_SHARDS", 1), ("NUM_SUBJECT_SHARDS", 0)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "ProcessPoolExecutor", ThreadPoolExecutor)
    make_shards(tmp_path)
    monkeypatch.setattr(module, "NUM_WORLD_SHARDS", 2)
    with pytest.raises(UserError, match=r"world-001\.safetensors: is not rendered yet"):
        load_shards(tmp_path, "world")
