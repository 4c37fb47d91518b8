"""What the network is told of a scene is true, whatever is left out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fastppt.mini.contexts import CONTEXTS
from fastppt.mini.pretrain.network import SAID, Captions
from fastppt.mini.pretrain.scenes import Scenes
from fastppt.mini.tokenizer import MODEL_MAX_LENGTH, WORDS, mini_tokenizer
from fastppt.mini.world import COLORS, NOUNS, PLACES, STYLES

PHRASES = {place: words for place, (words, _) in CONTEXTS.items()}


def random_truth(count: int) -> Scenes:
    """The truth of scenes that nobody has rendered."""
    rng = np.random.default_rng(0)
    sizes = [len(NOUNS), len(COLORS), len(PLACES), len(STYLES)]
    sides = [rng.integers(size, size=count) for size in sizes]
    return Scenes(np.zeros((count, 1, 1, 3), dtype=np.uint8), *sides, np.full(count, -1))


SCENES = random_truth(1500)


@pytest.fixture(scope="module")
def said() -> list[str]:
    captions, random = Captions(SCENES), np.random.default_rng(1)
    return [captions.draw(index, random) for index in range(len(SCENES.pixels))]


def test_captions_never_lie(said: list[str]) -> None:
    for index, text in enumerate(said):
        words = text.split()
        assert [word for word in words if word in NOUNS] == [NOUNS[SCENES.nouns[index]]], text
        color = list(COLORS)[SCENES.colors[index]]
        assert [word for word in words if word in COLORS] in ([], [color]), text
        place = PLACES[SCENES.contexts[index]]
        assert [name for name, words in PHRASES.items() if words in text] in ([], [place]), text
        style = STYLES[SCENES.styles[index]]
        (made,) = {"photo", "painting", "sketch", "picture", "image"} & set(words)
        assert made in (style, "picture", "image"), text


def test_captions_are_english(said: list[str]) -> None:
    for text in said:
        words = text.split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert article == ("an" if word[0] in "aeiou" else "a"), text
        assert text.split(" of ")[0] in {
            *(f"a {style}" for style in STYLES),
            "a picture",
            "an image",
        }


def test_captions_leave_out_each_part_as_often_as_they_say(said: list[str]) -> None:
    tells = {
        "style": sum(not {"picture", "image"} & set(text.split()) for text in said),
        "color": sum(bool(set(COLORS) & set(text.split())) for text in said),
        "context": sum(any(phrase in text for phrase in PHRASES.values()) for text in said),
    }
    for part, share in SAID.items():
        reach = 5 * (share * (1 - share) / len(said)) ** 0.5
        assert abs(tells[part] / len(said) - share) < reach, part
    # All leave something out together now and then, and some say a word without a meaning.
    assert any(text.split(" of ")[1].split()[-1] in NOUNS for text in said)
    known = {*NOUNS, *COLORS, *STYLES, "a", "an", "of", "picture", "image"}
    known |= {word for phrase in PHRASES.values() for word in phrase.split()}
    strange = sum(bool(set(text.split()) - known) for text in said) / len(said)
    assert 0.1 < strange < 0.2


def test_same_draws_give_the_same_captions(said: list[str]) -> None:
    captions, random = Captions(SCENES), np.random.default_rng(1)
    assert [captions.draw(index, random) for index in range(50)] == said[:50]


def test_every_word_of_the_world_is_one_token_and_every_caption_fits(said: list[str]) -> None:
    phrases = [word for phrase in PHRASES.values() for word in phrase.split()]
    assert {*NOUNS, *COLORS, *STYLES, *phrases} <= set(WORDS)
    lengths = [len(ids) for ids in mini_tokenizer()(said[:300]).input_ids]
    assert max(lengths) <= MODEL_MAX_LENGTH
