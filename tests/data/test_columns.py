"""Which token of the class prompt each token of a subject prompt is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastppt.config import ModelConfig, PromptsConfig
from fastppt.data.columns import Prompt, align_columns, count_places_read
from fastppt.data.photos import crop_photo, find_photos
from fastppt.data.prompts import encode_prompt_bank
from fastppt.families.base import TokenBlock
from fastppt.families.loading import load_family

START, END = -1, -2
# A word that was learned, and nouns, of several tokens; "glued" and "joined" stand for what BPE
# makes of a word and what stands beside it.
TOKENS = {"v3": [31, 32, 33], "v2": [31, 32], "teddy": [41, 42], "glued": [51], "joined": [52, 9]}


class Words:
    """Tokenizers of 8 places, a number a token; the second, if any, has no start and reads ahead of
    a number a token of its own."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def token_blocks(self, prompt: str) -> list[TokenBlock]:
        ids = []
        for word in prompt.split():
            ids += TOKENS.get(word) or ([int(word)] if word.isdigit() else [ord(c) for c in word])
        return [
            TokenBlock([*start, *ids[: size - 1 - len(start)], END], size)
            for start, size in zip(([START], []), self.sizes, strict=False)
        ]


def columns(subject: str, base: str, words: str = "7 4", noun: str = "4", size: int = 8) -> object:
    """The columns of one tokenizer; "S" stands in the prompts where the subject does."""
    found = align_columns(Words(size), Prompt.of(subject, "S", words), Prompt.of(base, "S", noun))
    return (found.columns, found.lined_up)


@pytest.mark.parametrize(
    ("subject", "base", "expected"),
    [
        # "photo of sks dog" beside "photo of a dog": all but the word that differs.
        ("1 2 S", "1 2 9 S", [0, 1, 2, -1, 4, 5, 6, 7]),
        ("1 2 S", "1 2 S", [0, 1, 2, -1, 3, 4, 6, 7]),
        ("S 1 2", "S 1 2", [0, -1, 1, 2, 3, 4, 6, 7]),
        # The noun stands there twice, and is itself the second time.
        ("1 4 S", "1 4 S", [0, 1, 2, -1, 3, 4, 6, 7]),
        # A prompt that does not speak of the subject.
        ("1 2 3 4", "1 2 3 4", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("", "", [0, 1, 2, 3, 4, 5, 6, 7]),
        # Full to the last place, and cut off at places that differ.
        ("1 2 3 5 S", "1 2 3 5 S", [0, 1, 2, 3, 4, -1, 5, 6]),
        ("1 S 2 3 5 6", "1 S 2 3 5 6", [0, 1, -1, 2, 3, 4, 5, 7]),
        # The subject is cut off: "sks" is not what the noun is compared with.
        ("1 2 3 5 6 S", "1 2 3 5 6 S", [0, 1, 2, 3, 4, 5, -1, 7]),
        # Twice the subject.
        ("S 1 S", "S 1 S", [0, -1, 1, 2, -1, 3, 4, 7]),
    ],
)
def test_what_stands_around_the_subject_is_compared_and_so_is_the_noun(
    subject: str, base: str, expected: list[int]
) -> None:
    assert columns(subject, base) == (expected, True)


@pytest.mark.parametrize(
    ("words", "noun", "expected"),
    [
        ("7", "4", [0, 1, 2, 3, 4, 5, 6, 7]),
        # Fewer vectors than the noun has tokens, as many, and more.
        ("7", "teddy", [0, 1, 2, 4, 5, -1, 6, 7]),
        ("v2", "teddy", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("v3", "teddy", [0, 1, 2, 3, -1, 4, 5, 7]),
        # An adjective before the noun has no counterpart.
        ("7 teddy", "teddy", [0, 1, -1, 2, 3, 4, 5, 7]),
    ],
)
def test_a_word_in_the_place_of_the_noun_is_compared_with_it(
    words: str, noun: str, expected: list[int]
) -> None:
    assert columns("1 S 2", "1 S 2", words, noun) == (expected, True)


@pytest.mark.parametrize(
    ("subject", "base", "expected", "lined_up"),
    [
        # "photo of S outside" beside "photo of S": a word has no counterpart.
        ("1 S 2", "1 S", [0, 1, -1, 2, -1, 3, 6, 7], False),
        ("1 2 S", "3 S", [0, -1, -1, -1, 2, 3, 6, 7], False),
        # The base's prompt may say more.
        ("1 S", "1 2 S 3", [0, 1, -1, 3, 5, -1, 6, 7], True),
        # The subject is named twice in one and once in the other: compared as a whole.
        ("S S", "S", [0, -1, -1, -1, 1, 2, 6, 7], True),
    ],
)
def test_prompts_line_up_if_only_the_subject_s_words_are_left(
    subject: str, base: str, expected: list[int], lined_up: bool
) -> None:
    assert columns(subject, base) == (expected, lined_up)


def test_where_the_subject_grows_together_with_a_word_the_prompts_are_compared_as_a_whole() -> None:
    # "sks dogs hat" beside "dogs hat": the rare word alone is not compared.
    class Glue(Words):
        def token_blocks(self, prompt: str) -> list[TokenBlock]:
            return super().token_blocks(prompt.replace("4s", "glued").replace("7s", "joined"))

    def align(words: str, noun: str) -> object:
        subject, base = Prompt.of("1 Ss 2", "S", words), Prompt.of("1 Ss 2", "S", noun)
        return align_columns(Glue(8), subject, base)

    assert vars(align("7 4", "4")) == {"columns": [0, 1, -1, 2, 3, 4, 6, 7], "lined_up": True}
    # Of a learned word nothing is known but its tokens, and 52 and 9 are not among them.
    assert not align("7", "4").lined_up


def test_each_tokenizer_has_its_own_columns() -> None:
    subject, base = Prompt.of("1 S 2", "S", "7 4"), Prompt.of("1 S 2", "S", "4")
    found = align_columns(Words(8, 7), subject, base)
    assert found.columns == [0, 1, -1, 2, 3, 4, 6, 7, *(8, -1, 9, 10, 11, 13, 14)]


@pytest.mark.parametrize(
    ("subject", "count"),
    [("1 S", 1), ("S S S", 3), ("1 2 3 5 S", 1), ("1 2 3 5 6 S", 0), ("1 2 S 3 S", 1), ("1", 0)],
)
def test_places_are_counted_that_are_read_to_their_end(subject: str, count: int) -> None:
    assert count_places_read(Words(8), Prompt.of(subject, "S", "7 4")) == count


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
