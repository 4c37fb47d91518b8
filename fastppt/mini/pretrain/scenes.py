"""The pictures that everything is trained on: rendered once, kept in shards."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from fastppt.errors import UserError
from fastppt.mini.world import (
    COLORS,
    NOUNS,
    PLACES,
    STYLES,
    Scene,
    random_scene,
    random_subject,
    render,
)
from fastppt.outputs.files import write_file

SHARD_SIZE = 1000
"""Scenes a file: some ten seconds of rendering, the most that an interruption loses."""

NUM_WORLD_SHARDS, NUM_SUBJECT_SHARDS = 24, 10
"""Of scenes of the world, and of scenes of random subjects."""

VIEWS = 5
"""Scenes in which each random subject is shown."""

FIRST_SUBJECT = 1_000_000
"""Seed of the first training subject. Tests and benches take lower ones, so nothing is measured on
a subject that the judge or the VAE has seen."""


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes and their truth.

    Attributes:
        pixels: RGB [N, 64, 64, 3], 8 bits.
        nouns: Index into `NOUNS`, [N].
        colors: Index into `COLORS`, [N]; -1 for a subject.
        contexts: Index into `PLACES`, [N].
        styles: Index into `STYLES`, [N].
        subjects: Seed of the subject, [N]; -1 for an object of the world.
    """

    pixels: NDArray[np.uint8]
    nouns: NDArray[np.int64]
    colors: NDArray[np.int64]
    contexts: NDArray[np.int64]
    styles: NDArray[np.int64]
    subjects: NDArray[np.int64]


def draw_world(count: int, seed: int) -> Scenes:
    """Render random scenes of the world; the seed decides which."""
    rng = np.random.default_rng([seed, 1])
    return _rendered([(random_scene(rng), -1) for _ in range(count)])


def draw_subjects(first: int, count: int, views: int, seed: int) -> Scenes:
    """Render each of ``count`` random subjects in ``views`` random scenes, one after the other."""
    rng = np.random.default_rng([seed, 2])
    return _rendered(
        [
            (random_scene(rng, subject=random_subject(number)), number)
            for number in range(first, first + count)
            for _ in range(views)
        ]
    )


def make_shards(folder: Path) -> None:
    """Render what is missing of the training scenes, one process a core."""
    names = _shard_names("world") + _shard_names("subjects")
    missing = [name for name in names if not (folder / f"{name}.safetensors").is_file()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for name in pool.map(_make_shard, [folder] * len(missing), missing):
            print(f"scenes: rendered {name}", flush=True)


def load_shards(folder: Path, kind: str) -> Scenes:
    """Read all shards of a kind: ``world`` or ``subjects``.

    Raises:
        UserError: one is not there.
    """
    paths = [folder / f"{name}.safetensors" for name in _shard_names(kind)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: is not rendered yet; run --only scenes first")
    shards = [load_file(path) for path in paths]
    return Scenes(
        **{
            field.name: np.concatenate([shard[field.name] for shard in shards])
            for field in fields(Scenes)
        }
    )


def _shard_names(kind: str) -> list[str]:
    count = NUM_WORLD_SHARDS if kind == "world" else NUM_SUBJECT_SHARDS
    return [f"{kind}-{number:03d}" for number in range(count)]


def _make_shard(folder: Path, name: str) -> str:
    kind, number = name.split("-")
    if kind == "world":
        scenes = draw_world(SHARD_SIZE, seed=int(number))
    else:
        count = SHARD_SIZE // VIEWS
        scenes = draw_subjects(FIRST_SUBJECT + count * int(number), count, VIEWS, int(number))
    arrays = {field.name: getattr(scenes, field.name) for field in fields(Scenes)}
    write_file(folder / f"{name}.safetensors", save(arrays))
    return name


def _rendered(scenes: list[tuple[Scene, int]]) -> Scenes:
    colors = tuple(COLORS)
    return Scenes(
        np.stack([render(scene) for scene, _ in scenes]),
        np.array([NOUNS.index(scene.noun) for scene, _ in scenes]),
        np.array([colors.index(scene.color) if scene.color else -1 for scene, _ in scenes]),
        np.array([PLACES.index(scene.context) for scene, _ in scenes]),
        np.array([STYLES.index(scene.style) for scene, _ in scenes]),
        np.array([subject for _, subject in scenes]),
    )
