"""The banks hold what the family encodes, once, by photo."""

from __future__ import annotations

from pathlib import Path

import torch

from fastppt.config import PhotosConfig, PromptsConfig
from fastppt.data.latents import PLAIN_VIEW, encode_latents
from fastppt.data.photos import crop_photo, find_photos
from fastppt.data.prompts import (
    class_prompt,
    encode_prompt_bank,
    sample_prompts,
    subject_prompt,
)
from fastppt.data.views import draw_views, take_view
from fastppt.families.base import Family

PROMPTS = PromptsConfig(class_noun="robot")


def test_latents_of_a_photo_follow_its_posterior(family: Family, photos: Path) -> None:
    squares = [crop_photo(photo, (64, 64)) for photo in find_photos(photos)]
    bank = encode_latents(family, squares, [()] * 5, lambda: None)
    assert bank.posteriors.shape == (5, 1, 2, 8, 16, 16)
    assert (bank.num_photos, bank.num_views) == (5, 0) and bank.latent_shape == (8, 16, 16)
    assert bank.num_bytes == 5 * 2 * 8 * 16 * 16 * 4
    mean, std = family.encode_photos(squares[3].pixels[None])
    normals = torch.randn(2, 8, 16, 16)
    sampled = bank.sample(torch.tensor([3, 0]), torch.tensor([0, 0]), normals)
    assert torch.equal(sampled[0], mean[0] + std[0] * normals[0])
    assert not torch.equal(sampled[1], mean[0] + std[0] * normals[1])


def test_augmented_views_come_after_the_plain_one(family: Family, photos: Path) -> None:
    squares = [crop_photo(photo, (64, 64)) for photo in find_photos(photos)[:2]]
    views = [draw_views(PhotosConfig(views=3), 0, number, 0) for number in (0, 1)]
    encoded: list[None] = []
    bank = encode_latents(family, squares, views, lambda: encoded.append(None))
    assert bank.posteriors.shape == (2, 4, 2, 8, 16, 16) and bank.posteriors.is_contiguous()
    assert bank.num_views == 3 and len(encoded) == 8
    plain = encode_latents(family, squares, [(), ()], lambda: None)
    assert torch.equal(bank.posteriors[:, PLAIN_VIEW], plain.posteriors[:, 0])
    for photo, own_views in enumerate(views):
        for index, view in enumerate(own_views, start=1):
            pixels = take_view(squares[photo].pixels, view)
            wanted = torch.cat(family.encode_photos(pixels[None]))
            assert torch.equal(bank.posteriors[photo, index], wanted)


def test_prompts_are_filled_in() -> None:
    assert subject_prompt(PROMPTS) == "a photo of sks robot"
    assert subject_prompt(PROMPTS, "{subject} in the snow") == "sks robot in the snow"
    assert subject_prompt(PROMPTS, "no slot") == "no slot"
    assert class_prompt(PROMPTS) == "a photo of a robot"
    assert sample_prompts(PROMPTS) == [
        "a photo of sks robot",
        "a photo of a robot",
        "a photo of sks robot on the beach",
        "a photo of sks robot in the snow",
        "a photo of sks robot in the jungle",
    ]


def test_prompts_are_encoded_once_and_found_by_photo(
    family: Family, photos: Path, tmp_path: Path
) -> None:
    for path in photos.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    files = [photo.path for photo in find_photos(tmp_path)]
    files[1].with_suffix(".txt").write_text("{subject} in the snow")
    found = find_photos(tmp_path)
    squares = [crop_photo(photo, (64, 64)) for photo in found]
    bank = encode_prompt_bank(family, PROMPTS, found, squares)
    assert len(bank.embeddings.tokens) == 4
    subjects = ["a photo of sks robot", "sks robot in the snow"]
    wanted = family.encode_prompts([*subjects, "a photo of a robot", "robot in the snow"])
    photos_of_rows = torch.tensor([4, 1])
    for given, rows in (
        (bank.subject(photos_of_rows), slice(0, 2)),
        (bank.plain_class(photos_of_rows), slice(2, 4)),
    ):
        assert torch.equal(given.tokens, wanted.tokens[rows])
        assert torch.equal(given.pooled, wanted.pooled[rows])
    height, width = found[0].size
    assert bank.sizes[0].tolist() == [height, width, *squares[0].crop, 64, 64]
    # Rows and columns of int64; tokens, pooled vectors and sizes of float32.
    num_tokens, token_width = wanted.tokens.shape[1:]
    floats = 4 * (num_tokens * token_width + wanted.pooled.shape[1]) + 5 * 6
    assert bank.num_bytes == 8 * 5 * (1 + 1 + num_tokens) + 4 * floats
