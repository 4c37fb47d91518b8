"""What is encoded before the first step: views where a stage draws them, and only there."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from shutil import copytree

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.data.buckets import Bucket
from fastppt.data.latents import encode_picture
from fastppt.data.photos import crop_photo, find_photos
from fastppt.data.views import draw_views
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.families.pipeline import PipelineFamily
from fastppt.training.encoding import encode
from fastppt.training.loop import resolve
from fastppt.training.seeds import VIEW_STREAM, split_seed

MakeConfig = Callable[..., RunConfig]
ADAPTIVE = {"stage.0.objectives.denoising.weighting": "adaptive", "photos.views": 3}


def encoded(config: RunConfig, *, terminal: bool = False) -> tuple[Bucket, str]:
    """The one bucket of a run, and what was said; for each its own family, which is used up."""
    family = load_family(config.model)
    config = resolve(config, family)
    console = Console(file=StringIO(), width=100, force_terminal=terminal)
    (bucket,), _ = encode(config, family, find_photos(config.photos.folder), console)
    return bucket, console.file.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"photos.views": 3},
        ADAPTIVE | {"stage.0.objectives.denoising.max_augmentation": 0.0},
    ],
)
def test_a_run_that_never_augments_encodes_each_photo_once(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
) -> None:
    pictures: list[Tensor] = []
    encode_photos = PipelineFamily.encode_photos

    def spy(family: PipelineFamily, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pictures.append(pixels)
        return encode_photos(family, pixels)

    monkeypatch.setattr(PipelineFamily, "encode_photos", spy)
    bucket, text = encoded(make_config(**changes))
    assert bucket.latents.posteriors.shape[:2] == (5, 1) and len(pictures) == 5
    assert "encoding" not in text


def test_a_run_that_augments_encodes_views_by_its_seed(
    family: Family, make_config: MakeConfig
) -> None:
    config = make_config(**ADAPTIVE, seed=3, photos__resolution=64)
    bucket, text = encoded(config)
    assert bucket.latents.posteriors.shape == (5, 4, 2, 8, 16, 16)
    assert text == "encoding 20 pictures: 5 photos with 3 augmented views each\n"
    seed = split_seed(3, VIEW_STREAM)
    for number, photo in bucket.photos.items():
        pixels = crop_photo(photo, (64, 64)).pixels
        for index, view in enumerate(draw_views(config.photos, seed, number, 0), start=1):
            wanted = encode_picture(family, pixels, view)
            assert torch.equal(bucket.latents.posteriors[number, index], wanted)
    other, _ = encoded(make_config(**ADAPTIVE, seed=4, photos__resolution=64))
    assert torch.equal(other.latents.posteriors[:, 0], bucket.latents.posteriors[:, 0])
    assert not torch.isclose(other.latents.posteriors, bucket.latents.posteriors)[:, 1:].all()


def test_one_view_is_no_views_and_a_caption_without_subject_is_noted(
    make_config: MakeConfig, photos: Path, tmp_path: Path
) -> None:
    folder = copytree(photos, tmp_path / "captioned")
    (folder / "robot-1.txt").write_text("a photo of [sks] robot")
    changes = {"photos.views": 1, "photos.folder": str(folder)}
    _, text = encoded(make_config(**ADAPTIVE | changes))
    assert text.startswith("encoding 10 pictures: 5 photos with 1 augmented view each\n")
    assert "note: " in text and "robot-1.txt" in text and "does not say {subject}" in text


def test_augmented_views_are_told_the_size_of_their_photo(
    make_config: MakeConfig,
) -> None:
    plain, _ = encoded(make_config())
    augmented, _ = encoded(make_config(**ADAPTIVE))
    assert torch.equal(augmented.prompts.sizes, plain.prompts.sizes)


def test_a_terminal_shows_how_far_encoding_has_come(make_config: MakeConfig) -> None:
    _, text = encoded(make_config(**ADAPTIVE), terminal=True)
    assert "encoding" in text and "20/20" in text
