from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastppt.mini.judge import Judge, load_judge
from fastppt.mini.prompt_following import (
    ALL_THREE,
    BATCH,
    Sampling,
    draw_pictures,
    draw_scenes,
    follow_prompts,
    read_answers,
    render_pictures,
)
from fastppt.mini.world import COLORS, NOUNS, PLACES, caption, random_scene


class Painter:
    """In the place of a pipeline: draws the scenes that captions were made of, as fractions."""

    def __init__(self, pictures: torch.Tensor) -> None:
        self.pictures = pictures
        self.calls: list[dict] = []

    def __call__(self, prompts: list[str], **given: object) -> SimpleNamespace:
        first = sum(len(call["prompts"]) for call in self.calls)
        self.calls.append({"prompts": prompts, **given})
        return SimpleNamespace(images=self.pictures[first : first + len(prompts)] / 2 + 0.5)


def test_a_model_that_draws_what_is_asked_for_follows_every_prompt() -> None:
    scenes = draw_scenes(48)
    painter = Painter(render_pictures(scenes))
    answers, pictures = follow_prompts(painter, load_judge(), scenes)
    shares = {question: right.double().mean().item() for question, right in answers.items()}
    assert set(shares) == {"noun", "color", "context", "style", ALL_THREE}
    assert min(shares.values()) >= 0.9
    assert torch.equal(pictures, painter.pictures)


def test_what_was_not_asked_for_is_not_right() -> None:
    scenes = draw_scenes(48)
    # Each picture is that of the next prompt.
    shown = render_pictures(scenes).roll(-1, 0)
    right = read_answers(load_judge(), shown, scenes)
    same = torch.tensor(
        [a.noun == b.noun for a, b in zip(scenes, scenes[1:] + scenes[:1], strict=True)]
    )
    assert (right["noun"] == same).double().mean() >= 0.9
    assert right[ALL_THREE].double().mean() <= 0.1
    assert torch.equal(right[ALL_THREE], right["noun"] & right["color"] & right["context"])


@pytest.mark.parametrize("part", ["noun", "color", "context"])
def test_one_thing_that_is_wrong_is_enough_for_not_all_three(part: str) -> None:
    rng = np.random.default_rng(0)
    options = {"noun": NOUNS, "color": tuple(COLORS), "context": PLACES}
    asked, shown = [], []
    for number in range(12):
        truth = {name: values[number % len(values)] for name, values in options.items()}
        asked.append(random_scene(rng, **truth))
        truth[part] = options[part][(number + 1) % len(options[part])]
        shown.append(random_scene(rng, **truth))
    right = read_answers(load_judge(), render_pictures(shown), asked)
    others = [name for name in options if name != part]
    assert min(right[name].double().mean() for name in others) >= 0.75
    assert right[ALL_THREE].sum() <= 1


def test_each_picture_has_a_prompt_and_a_seed_of_its_own() -> None:
    count = BATCH + 3
    painter = Painter(torch.zeros(count, 3, 64, 64))
    prompts = [caption(scene) for scene in draw_scenes(count)]
    draw_pictures(painter, prompts, Sampling(steps=7, guidance_scale=2.5), seed=10)
    assert [prompt for call in painter.calls for prompt in call["prompts"]] == prompts
    seeds = [each.initial_seed() for call in painter.calls for each in call["generator"]]
    assert seeds == list(range(10, 10 + count))
    assert {call["num_inference_steps"] for call in painter.calls} == {7}
    assert {call["guidance_scale"] for call in painter.calls} == {2.5}


def test_pictures_are_those_of_eight_bits() -> None:
    painter = Painter(torch.full((1, 3, 64, 64), 0.001))
    (picture,) = draw_pictures(painter, ["a boat"], Sampling())
    assert picture.unique().tolist() == pytest.approx([128 / 127.5 - 1], abs=1e-6)


def test_scenes_follow_from_their_seed() -> None:
    assert draw_scenes(3, seed=4) == draw_scenes(5, seed=4)[:3]
    assert draw_scenes(3, seed=4) != draw_scenes(3, seed=5)


def test_an_untrained_judge_knows_nothing() -> None:
    scenes = draw_scenes(32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge().eval()
    right = read_answers(judge, render_pictures(scenes), scenes)
    assert right[ALL_THREE].double().mean() < 0.2
