"""Photos of one subject in places of the mini world: what a run is trained on.

The subject is none that a mini model or the judge has seen in its training.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from fastppt.mini.world import PLACES, Subject, random_scene, random_subject, render

PHOTO_SIZE = 256
"""Pixels a side: enough to look at, and four times the mini models' 64."""

DEMO_NOUN = "robot"
"""What the demo photos show."""

DEMO_SEED = 29
"""Seed of the demo subject: turquoise with a red band, olive arms and legs, a red balloon in its
hand. It was chosen by eye, for its colour is none of the world's."""


def draw_demo_photos(directory: Path, seed: int = 0) -> list[Path]:
    """Draw five photos of the demo subject, ``robot-1.png`` to ``robot-5.png``.

    Args:
        directory: Made if missing; files of these names in it are overwritten.
        seed: Decides places and poses; the subject stays the same.

    Returns:
        The paths, as `draw_subject_photos` returns them.
    """
    return draw_subject_photos(directory, random_subject(DEMO_SEED, DEMO_NOUN), seed=seed)


def draw_subject_photos(
    directory: Path, subject: Subject, count: int = 5, seed: int = 0
) -> list[Path]:
    """Draw photos of a subject into a directory as ``<noun>-1.png``, ``<noun>-2.png`` and so on.

    Args:
        directory: Made if missing; files of these names in it are overwritten.
        subject: What they show.
        count: How many. No two are in the same place, until each place has been shown.
        seed: Decides places and poses. The same seed gives the same pixels, and more photos begin
            with those of a lower count.

    Returns:
        The paths: RGB images of `PHOTO_SIZE` pixels a side.

    Raises:
        ValueError: ``count`` is less than 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 5])
    places = rng.permutation(PLACES).tolist()
    paths = []
    for number in range(count):
        place = places[number % len(places)]
        scene = random_scene(rng, context=place, style="photo", subject=subject)
        path = directory / f"{subject.noun}-{number + 1}.png"
        Image.fromarray(render(scene, PHOTO_SIZE)).save(path)
        paths.append(path)
    return paths
