"""Buckets have few sizes, near the photos' own, and each holds its own photos."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastppt.config import PromptsConfig
from fastppt.data.buckets import (
    ASPECT_RATIOS,
    bucket_of_draw,
    bucket_sizes,
    encode_buckets,
    nearest_size,
)
from fastppt.data.photos import Photo, crop_photo, find_photos
from fastppt.families.base import Family


def photo_of(height: int, width: int) -> Photo:
    return Photo(Path("a.png"), None, None, (height, width))


def test_buckets_at_1024_are_those_that_sdxl_was_trained_on() -> None:
    # (height, width); arXiv 2307.01952, appendix I.
    lying = [(896, 1152), (832, 1216), (768, 1344)]
    upright = [(width, height) for height, width in lying]
    assert set(bucket_sizes(1024, 32)) == {(1024, 1024), *lying, *upright}


def test_buckets_of_a_small_model_follow_its_step() -> None:
    assert bucket_sizes(64, 16) == [(64, 64), (48, 80), (80, 48)]
    assert bucket_sizes(16, 16) == [(16, 16)]


@pytest.mark.parametrize("step", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("factor", [1, 2, 3, 5, 8, 12, 16])
def test_buckets_fit_the_network_and_the_area(step: int, factor: int) -> None:
    resolution = step * factor
    sizes = bucket_sizes(resolution, step)
    assert sizes[0] == (resolution, resolution)
    assert len(set(sizes)) == len(sizes) <= len(ASPECT_RATIOS)
    for height, width in sizes:
        assert height % step == width % step == 0 < height
        assert resolution**2 / 2 <= height * width <= resolution**2
        assert (width, height) in sizes


def test_full_size_buckets_are_multiples_of_64_where_they_can_be() -> None:
    assert all(side % 64 == 0 for size in bucket_sizes(512, 16) for side in size)
    assert any(side % 64 for size in bucket_sizes(1008, 16) for side in size)
    assert any(side % 64 for size in bucket_sizes(960, 24) for side in size)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((1000, 1000), (1024, 1024)),
        ((3000, 4000), (896, 1152)),
        ((4000, 3000), (1152, 896)),
        ((2000, 3000), (832, 1216)),
        ((1080, 1920), (768, 1344)),
        ((100, 900), (768, 1344)),
        ((1920, 1080), (1344, 768)),
        ((1000, 1100), (1024, 1024)),
    ],
)
def test_a_photo_goes_where_least_of_it_is_cut_off(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    sizes = bucket_sizes(1024, 32)
    assert nearest_size(photo_of(*size), sizes) == wanted
    # The share that is left is the ratio of the ratios.
    distances = {s: abs(math.log(s[1] / s[0] * size[0] / size[1])) for s in sizes}
    assert distances[wanted] == min(distances.values())


def test_each_bucket_holds_the_latents_prompts_and_sizes_of_its_photos(
    family: Family, photos: Path, tmp_path: Path
) -> None:
    (source,) = list(photos.glob("*"))[:1]
    picture = Image.open(source).convert("RGB")
    for name, size in {"a": (90, 60), "b": (70, 70), "c": (96, 60), "d": (60, 90)}.items():
        picture.resize(size).save(tmp_path / f"{name}.png")
    (tmp_path / "c.txt").write_text("{subject} in the snow")
    found = find_photos(tmp_path)
    sizes = [nearest_size(photo, bucket_sizes(64, 16)) for photo in found]
    prompts = PromptsConfig(class_noun="robot")
    buckets = encode_buckets(family, prompts, found, sizes)
    assert [bucket.size for bucket in buckets] == [(48, 80), (64, 64), (80, 48)]
    shapes = [tuple(bucket.latents.posteriors.shape) for bucket in buckets]
    assert shapes == [(2, 1, 2, 8, 12, 20), (1, 1, 2, 8, 16, 16), (1, 1, 2, 8, 20, 12)]
    assert [str(bucket) for bucket in buckets] == [
        "80x48 (2 photos)",
        "64x64 (1 photo)",
        "48x80 (1 photo)",
    ]
    assert [list(bucket.photos) for bucket in buckets] == [[0, 2], [1], [3]]
    assert all(bucket.photos[row] is found[row] for bucket in buckets for row in bucket.photos)
    lying = buckets[0]
    assert all(b.prompts.embeddings.tokens is lying.prompts.embeddings.tokens for b in buckets)
    second = crop_photo(found[2], (48, 80))
    mean, _ = family.encode_photos(second.pixels[None])
    assert torch.equal(lying.latents.posteriors[1, 0, 0], mean[0])
    wanted = family.encode_prompts(["sks robot in the snow"])
    subject = lying.prompts.subject(torch.tensor([1]))
    torch.testing.assert_close(subject.tokens, wanted.tokens)
    assert lying.prompts.sizes.tolist() == [
        [60, 90, *crop_photo(found[0], (48, 80)).crop, 48, 80],
        [60, 96, *second.crop, 48, 80],
    ]


def test_a_draw_falls_into_a_bucket_by_its_share() -> None:
    buckets = [bucket_of_draw(draw, [3, 1, 2]) for draw in range(12)]
    assert buckets == [0, 0, 0, 1, 2, 2] * 2
