"""The mini T5 tokenizer: one token a word, characters for the rest, T5's special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import T5Tokenizer

from fastppt.mini.t5_tokenizer import CHARACTERS, mini_t5_tokenizer
from fastppt.mini.tokenizer import WORDS


@pytest.fixture(scope="module")
def tokenizer() -> T5Tokenizer:
    return mini_t5_tokenizer()


def test_each_word_is_one_token_alone_and_in_a_prompt(tokenizer: T5Tokenizer) -> None:
    assert {word: tokenizer.tokenize(word) for word in WORDS} == {w: ["▁" + w] for w in WORDS}
    assert tokenizer.tokenize(" ".join(WORDS)) == ["▁" + word for word in WORDS]


def test_special_tokens_have_the_ids_of_t5_and_end_and_pad_a_prompt(tokenizer: T5Tokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    encoded = tokenizer("a dog", padding="max_length", max_length=6)
    assert encoded.input_ids[2:] == [1, 0, 0, 0]
    assert encoded.attention_mask == [1, 1, 1, 0, 0, 0]
    assert tokenizer("").input_ids == [1]


def test_ids_are_dense(tokenizer: T5Tokenizer) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


@pytest.mark.parametrize(
    "text", ["zebra", "photograph of dogs", "a photo of sks zebra, 4 2!", "Dog"]
)
def test_other_text_falls_back_to_smaller_pieces(tokenizer: T5Tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert len(ids) - 1 > len(text.split())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_word_is_the_longest_piece_of_a_longer_one(tokenizer: T5Tokenizer) -> None:
    assert tokenizer.tokenize("dogs") == ["▁dog", "s"]


def test_every_printable_ascii_character_has_a_token(tokenizer: T5Tokenizer) -> None:
    assert sorted(CHARACTERS) == [chr(code) for code in range(33, 127)]
    assert tokenizer.unk_token_id not in tokenizer(" ".join(CHARACTERS)).input_ids


def test_characters_outside_ascii_are_unknown_and_break_nothing_else(
    tokenizer: T5Tokenizer,
) -> None:
    assert tokenizer.tokenize("a 犬 dog") == ["▁a", "▁", "犬", "▁dog"]
    assert tokenizer("犬").input_ids[1:] == [tokenizer.unk_token_id, tokenizer.eos_token_id]


def test_long_prompt_is_cut_and_still_ends(tokenizer: T5Tokenizer) -> None:
    ids = tokenizer("dog " * 100, truncation=True, max_length=24).input_ids
    assert len(ids) == 24
    assert ids[-1] == tokenizer.eos_token_id


def test_every_call_builds_the_same(tokenizer: T5Tokenizer) -> None:
    assert mini_t5_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_saved_tokenizer_gives_the_same_ids(tokenizer: T5Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = T5Tokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.model_max_length == tokenizer.model_max_length
    for text in (" ".join(WORDS), "a photo of sks zebra in 日本", "", "dog  dog\nDOG"):
        wanted = tokenizer(text, padding="max_length", max_length=40, truncation=True).input_ids
        assert (
            loaded(text, padding="max_length", max_length=40, truncation=True).input_ids == wanted
        )


def test_added_token_is_one_token() -> None:
    tokenizer = mini_t5_tokenizer()
    new_id = len(tokenizer)
    assert tokenizer.add_tokens("<v>") == 1
    assert tokenizer("a photo of <v> dog").input_ids[3] == new_id
