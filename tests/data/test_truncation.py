"""Prompts that are not what a user may think are named: too long, or without the subject."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastppt.config import ModelConfig, PromptsConfig
from fastppt.data.photos import Photo
from fastppt.data.prompts import caption_notes, quiet_truncation, truncation_notes
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.families.names import MINI_MODELS
from fastppt.mini.tokenizer import MODEL_MAX_LENGTH

# Start and end take two places.
READ = ["red"] * (MODEL_MAX_LENGTH - 2)
PROMPTS = PromptsConfig(class_noun="robot")


@pytest.mark.parametrize("words", [[], ["red"], READ])
def test_a_prompt_that_fits_loses_nothing(family: Family, words: list[str]) -> None:
    assert family.truncated_text(" ".join(words)) is None


def test_words_past_the_last_place_are_lost_and_those_before_are_not(family: Family) -> None:
    lost = family.truncated_text(" ".join([*READ, "blue", "sea"]))
    assert lost == "blue sea"
    with quiet_truncation():
        long = family.encode_prompts([" ".join([*READ, "blue", "sea"])])
    assert torch.equal(long.tokens, family.encode_prompts([" ".join(READ)]).tokens)
    other = family.encode_prompts([" ".join([*READ[:-1], "blue"])])
    assert not torch.equal(long.tokens, other.tokens)


@pytest.mark.parametrize("model", MINI_MODELS)
def test_every_family_says_what_it_does_not_read(model: str) -> None:
    family = load_family(ModelConfig(path=model, device="cpu"))
    assert family.truncated_text("a photo of a robot") is None
    words = ["red"] * 200 + ["blue", "sea"]
    lost = family.truncated_text(" ".join(words))
    assert lost is not None and lost.endswith("blue sea")
    with quiet_truncation():
        long = family.encode_prompts([" ".join(words)])
        swapped = family.encode_prompts([" ".join([*words[:-2], "dark", "night"])])
    assert torch.equal(long.tokens, swapped.tokens)


def test_what_a_larger_text_encoder_reads_is_not_lost() -> None:
    model = ModelConfig(path="mini-sd3", device="cpu", max_tokens=MODEL_MAX_LENGTH + 20)
    family = load_family(model)
    assert family.truncated_text(" ".join([*READ, "red"])) is None
    assert family.truncated_text(" ".join(["red"] * 300)) is not None


def test_long_prompts_are_named_by_file_or_key(family: Family) -> None:
    long = " ".join(READ)
    photos = [
        Photo(Path("x/a.jpg"), f"{long} shiny", Path("x/a.txt"), (9, 9)),
        Photo(Path("x/b.jpg"), "short", Path("x/b.txt"), (9, 9)),
        Photo(Path("x/c.jpg"), f"{long} dark", Path("x/captions.toml"), (9, 9)),
    ]
    prompts = PromptsConfig(
        class_noun="robot",
        template=f"{long} {{subject}}",
        class_prompt=f"{long} {{class_noun}}",
        contexts=["short", f"{long} under the table"],
    )
    notes = truncation_notes(family, prompts, photos)
    ending = "is longer than mini-sdxl reads; it does not see:"
    assert notes == [
        f"x/a.txt (the caption of a.jpg) {ending} shiny",
        f"x/captions.toml (the caption of c.jpg) {ending} dark",
        f"prompts.template {ending} sks robot",
        f"prompts.contexts.1 {ending} under the table",
        f"prompts.class_prompt {ending} robot",
    ]
    assert truncation_notes(family, PROMPTS, photos[1:2]) == []


def test_a_caption_without_the_subject_is_named_by_its_file() -> None:
    photos = [
        Photo(Path("x/a.jpg"), "{subject} at sea", Path("x/a.txt"), (9, 9)),
        Photo(Path("x/b.jpg"), None, None, (9, 9)),
        Photo(Path("x/c.jpg"), "a robot at sea", Path("x/captions.toml"), (9, 9)),
    ]
    (note,) = caption_notes(PROMPTS, photos)
    assert note.startswith("x/captions.toml (the caption of c.jpg) does not say {subject}; write")
    assert "it becomes 'sks robot', and 'robot' where the base model is asked" in note


def test_the_libraries_own_warnings_are_silent_inside_and_back_after(
    family: Family, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    long = [" ".join([*READ, "blue"])]
    with quiet_truncation():
        family.encode_prompts(long)
    truncation_notes(family, PROMPTS, [Photo(Path("a.jpg"), long[0], Path("a.txt"), (9, 9))])
    assert "longer than" not in caplog.text and "truncated" not in caplog.text
    assert capfd.readouterr().err == ""
    family.encode_prompts(long)
    assert "truncated" in caplog.text
