"""The banks hold what the family encodes, once, by photo."""

from __future__ import annotations

from pathlib import Path

import torch

from fastppt.config import PromptsConfig
from fastppt.data.latents import encode_latents
from fastppt.data.photos import crop_photo, find_photos
from fastppt.data.prompts import (
    class_prompt,
    encode_prompt_bank,
    sample_prompts,
    subject_prompt,
)
from fastppt.families.base import Family

PROMPTS = PromptsConfig(class_noun="robot")


def test_latents_of_a_photo_follow_its_posterior(family: Family, photos: Path) -> None:
    squares = [crop_photo(photo, (64, 64)) for photo in find_photos(photos)]
    bank = encode_latents(family, squares)
    assert bank.posteriors.shape == (5, 1, 2, 4, 16, 16)
    assert bank.num_photos == 5 and bank.latent_shape == (4, 16, 16)
    mean, std = family.encode_photos(squares[3].pixels[None])
    normals = torch.randn(2, 4, 16, 16)
    sampled = bank.sample(torch.tensor([3, 0]), torch.tensor([0, 0]), normals)
    assert torch.equal(sampled[0], mean[0] + std[0] * normals[0])
    assert not torch.equal(sampled[1], mean[0] + std[0] * normals[1])


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
    assert len(bank.embeddings.tokens) == 2
    wanted = family.encode_prompts(["a photo of sks robot", "sks robot in the snow"])
    subject = bank.subject(torch.tensor([4, 1]))
    assert torch.equal(subject.tokens, wanted.tokens)
    assert torch.equal(subject.pooled, wanted.pooled)
    height, width = found[0].size
    assert bank.sizes[0].tolist() == [height, width, *squares[0].crop, 64, 64]
