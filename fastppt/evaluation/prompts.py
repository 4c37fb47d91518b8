"""What a model is asked to draw: prompts whose answers are known.

No run has been trained on any of them, unless its captions say so: by themselves photos are trained
with a prompt that names no place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastppt.mini.contexts import CONTEXTS
from fastppt.mini.world import COLORS, NOUNS, PLACES, STYLES

Generator = np.random.Generator


@dataclass(frozen=True)
class Asked:
    """One prompt, and what its picture should show.

    Attributes:
        prompt: Such as "a sketch of a red boat on the beach".
        noun: One of `NOUNS`.
        color: One of `COLORS`, or None where the prompt names none.
        context: One of `PLACES`.
        style: One of `STYLES`.
    """

    prompt: str
    noun: str
    color: str | None
    context: str
    style: str


def subject_prompts(words: str, noun: str, count: int, seed: int) -> list[Asked]:
    """Return prompts of the subject, such as "a painting of sks robot in the jungle".

    All places and styles come up equally often, as far as ``count`` allows, in a random order. The
    same seed gives the same places and styles, whatever the words.

    Args:
        words: How the subject is called, such as "sks robot"; "a robot" asks for the plain class.
        noun: Of the subject, one of `NOUNS`.
        count: Number of prompts.
        seed: Decides the order.
    """
    rng = np.random.default_rng([seed, 1])
    places, styles = _balanced(PLACES, count, rng), _balanced(STYLES, count, rng)
    return [
        Asked(_say(style, words, place), noun, None, place, style)
        for place, style in zip(places, styles, strict=True)
    ]


def class_prompts(noun: str, count: int, seed: int) -> list[Asked]:
    """Return prompts of the plain class, without a word of the subject; every second has a colour.

    Args:
        noun: One of `NOUNS`.
        count: Number of prompts.
        seed: Decides the order.
    """
    rng = np.random.default_rng([seed, 2])
    places, styles = _balanced(PLACES, count, rng), _balanced(STYLES, count, rng)
    colors = _balanced(tuple(COLORS), count, rng)
    return [
        _plain(noun, color if index % 2 else None, place, style)
        for index, (color, place, style) in enumerate(zip(colors, places, styles, strict=True))
    ]


def other_prompts(noun: str, count: int, seed: int) -> list[Asked]:
    """Return prompts of all other nouns, each with a colour and a place.

    Args:
        noun: That of the subject, which is left out.
        count: Number of prompts.
        seed: Decides the order.
    """
    rng = np.random.default_rng([seed, 3])
    nouns = _balanced(tuple(other for other in NOUNS if other != noun), count, rng)
    colors, places = _balanced(tuple(COLORS), count, rng), _balanced(PLACES, count, rng)
    styles = _balanced(STYLES, count, rng)
    return [_plain(*each) for each in zip(nouns, colors, places, styles, strict=True)]


def _plain(noun: str, color: str | None, place: str, style: str) -> Asked:
    thing = noun if color is None else f"{color} {noun}"
    return Asked(_say(style, with_article(thing), place), noun, color, place, style)


def with_article(thing: str) -> str:
    """Return "an umbrella", "a red boat"."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _say(style: str, words: str, place: str) -> str:
    return f"a {style} of {words} {CONTEXTS[place][0]}"


def _balanced(options: Sequence[str], count: int, rng: Generator) -> list[str]:
    """Return ``count`` options, each as often as any other (but for a rest), in a random order."""
    rounds = -(-count // len(options))
    order = np.concatenate([rng.permutation(len(options)) for _ in range(rounds)])
    return [options[index] for index in order[:count]]
