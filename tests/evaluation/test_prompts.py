"""The prompts of an evaluation."""

from __future__ import annotations

from collections import Counter

import numpy as np

from fastppt.evaluation.prompts import class_prompts, other_prompts, subject_prompts
from fastppt.mini.world import COLORS, NOUNS, PLACES, STYLES, caption, random_scene


def test_places_and_styles_come_up_equally_often() -> None:
    asked = subject_prompts("sks robot", "robot", 60, seed=0)
    assert set(Counter(each.context for each in asked).values()) == {6}
    assert set(Counter(each.style for each in asked).values()) == {20}
    assert len({(each.context, each.style) for each in asked}) > 20
    assert set(PLACES) == {each.context for each in asked}
    assert set(STYLES) == {each.style for each in asked}


def test_subject_prompts_of_other_words_ask_for_the_same() -> None:
    rare, plain = (subject_prompts(words, "robot", 9, 4) for words in ("sks robot", "a robot"))
    assert [each.prompt.replace("sks robot", "a robot") for each in rare] == [
        each.prompt for each in plain
    ]
    assert all("sks robot" in each.prompt for each in rare)
    assert all(each.color is None for each in rare)


def test_class_prompts_name_the_class_alone_and_every_second_a_colour() -> None:
    asked = class_prompts("umbrella", 32, seed=0)
    assert {each.noun for each in asked} == {"umbrella"}
    assert [each.color is None for each in asked] == [True, False] * 16
    assert {each.color for each in asked[1::2]} == set(COLORS)


def test_other_prompts_name_every_noun_but_the_subjects() -> None:
    asked = other_prompts("robot", 45, seed=0)
    assert {each.noun for each in asked} == set(NOUNS) - {"robot"}
    assert all(each.color in COLORS for each in asked)


def test_prompts_of_the_world_are_said_as_the_world_says_them() -> None:
    rng = np.random.default_rng(0)
    for each in [*class_prompts("umbrella", 20, 1), *other_prompts("boat", 20, 1)]:
        scene = random_scene(
            rng, noun=each.noun, color=each.color, context=each.context, style=each.style
        )
        assert each.prompt == caption(scene, color=each.color is not None)


def test_the_seed_decides_the_prompts() -> None:
    first = [each.prompt for each in other_prompts("robot", 20, 0)]
    assert first == [each.prompt for each in other_prompts("robot", 20, 0)]
    assert first != [each.prompt for each in other_prompts("robot", 20, 1)]
