"""Which token of the class prompt each token of a subject prompt is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastppt.config import ModelConfig, PromptsConfig
from fastppt.data.columns import align_columns
from fastppt.data.photos import crop_photo, find_photos
from fastppt.data.prompts import encode_prompt_bank
from fastppt.families.base import TokenBlock
from fastppt.families.loading import load_family

START, END = 90, 91


def block(*words: int, size: int = 8) -> TokenBlock:
    return TokenBlock([START, *words, END], size)


@pytest.mark.parametrize(
    ("subject", "base", "columns"),
    [
        # "photo of sks dog" beside "photo of a dog": all but the word that differs.
        ((1, 2, 3, 4), (1, 2, 9, 4), [0, 1, 2, -1, 4, 5, 6, 7]),
        # One word more, and one less: the noun and the end are found where they are.
        ((1, 2, 3, 4), (1, 2, 4), [0, 1, 2, -1, 3, 4, 6, 7]),
        ((1, 2, 4), (1, 2, 3, 4), [0, 1, 2, 4, 5, -1, 6, 7]),
        ((1, 2, 4), (1, 2, 4), [0, 1, 2, 3, 4, 5, 6, 7]),
        # A word that stands there twice is taken once.
        ((5, 5, 5), (5, 5), [0, 1, 2, -1, 3, 5, 6, 7]),
        ((5,), (5, 5), [0, 1, 3, -1, 4, 5, 6, 7]),
        # Nothing in common but start and end.
        ((1, 2), (3,), [0, -1, -1, 2, 4, 5, 6, 7]),
        ((), (1,), [0, 2, -1, 3, 4, 5, 6, 7]),
        # Full to the last place: no padding.
        ((1, 2, 3, 4, 5, 6), (1, 9, 3, 4, 5, 6), [0, 1, -1, 3, 4, 5, 6, 7]),
    ],
)
def test_what_both_prompts_begin_and_end_with_is_compared(
    subject: tuple[int, ...], base: tuple[int, ...], columns: list[int]
) -> None:
    assert align_columns([block(*subject)], [block(*base)]) == columns


def test_each_tokenizer_has_its_own_columns() -> None:
    subject = [block(1, 2, 3, size=6), TokenBlock([7, 8, 9, END], 5)]
    base = [block(1, 3, size=6), TokenBlock([7, 9, END], 5)]
    assert align_columns(subject, base) == [0, 1, -1, 2, 3, 5, *(6, -1, 7, 8, 10)]


# Of "a photo of sks robot" and "a photo of a robot": start, a, photo, of, -, robot, end, padding.
CLIP_COLUMNS = [0, 1, 2, 3, -1, 5, 6, *range(7, 24)]
# The T5 has no start: a, photo, of, -, robot, end, padding.
T5_COLUMNS = [0, 1, 2, -1, 4, 5, *range(6, 24)]


@pytest.mark.parametrize(
    ("model", "columns"),
    [
        ("mini-sd", CLIP_COLUMNS),
        ("mini-sdxl", CLIP_COLUMNS),
        ("mini-sd3", CLIP_COLUMNS + [column + 24 * (column >= 0) for column in T5_COLUMNS]),
    ],
)
def test_the_bank_has_the_columns_of_every_photo(
    model: str, columns: list[int], photos: Path, tmp_path: Path
) -> None:
    for path in sorted(photos.glob("*"))[:3]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    captions = {1: "{subject} in the snow", 2: "the snow"}
    for number, caption in captions.items():
        find_photos(tmp_path)[number].path.with_suffix(".txt").write_text(caption)
    found = find_photos(tmp_path)
    family = load_family(ModelConfig(path=model, device="cpu"))
    bank = encode_prompt_bank(
        family,
        PromptsConfig(class_noun="robot"),
        found,
        [crop_photo(photo, (64, 64)) for photo in found],
    )
    assert bank.columns.shape == (3, bank.embeddings.tokens.shape[1])
    assert bank.columns.dtype == torch.int64
    assert bank.columns[0].tolist() == columns
    # "sks robot in the snow" beside "robot in the snow".
    assert bank.columns[1, :8].tolist() == [0, -1, 1, 2, 3, 4, 5, 7]
    # A caption that does not speak of the subject is its own class prompt.
    assert bank.columns[2].tolist() == list(range(len(columns)))
    wanted = ["a photo of a robot", "robot in the snow", "the snow"]
    everything = torch.arange(3)
    theirs = family.encode_prompts(wanted).tokens
    torch.testing.assert_close(bank.plain_class(everything).tokens, theirs)
    ours = bank.subject(everything).tokens
    assert torch.equal(ours[2], bank.plain_class(everything).tokens[2])
    some = bank.select([2, 0])
    assert torch.equal(some.columns, bank.columns[[2, 0]])
    assert torch.equal(some.class_rows, bank.class_rows[[2, 0]])


def test_a_prompt_that_is_cut_off_is_read_to_the_last_place(photos: Path) -> None:
    family = load_family(ModelConfig(path="mini-sd", device="cpu"))
    (tokens,) = family.token_blocks("red " * 40)
    assert len(tokens.ids) == tokens.size == 24
    (short,) = family.token_blocks("red robot")
    assert len(short.ids) == 4 and short.ids[0] == tokens.ids[0] and short.ids[-1] == tokens.ids[-1]
