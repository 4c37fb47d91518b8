"""The measures on verdicts that are made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastppt.evaluation.drift import TENTHS
from fastppt.evaluation.exam import CLASS, OTHER, SUBJECT, Answers
from fastppt.evaluation.identity import Reference
from fastppt.evaluation.measures import base_scores, tuned_scores
from fastppt.evaluation.prompts import Asked, class_prompts, other_prompts, subject_prompts
from fastppt.mini.judge import EMBEDDING_WIDTH, FEATURE_WIDTH, Verdict
from fastppt.mini.prompt_following import answers_right
from fastppt.mini.world import COLORS, NOUNS, PLACES, STYLES


def verdict_on(shown: list[Asked]) -> Verdict:
    """A judge that reads exactly what is shown; an object without a colour is white."""

    def logits(options: tuple[str, ...], values: list[str]) -> torch.Tensor:
        return F.one_hot(torch.tensor([options.index(value) for value in values]), len(options))

    return Verdict(
        logits(NOUNS, [each.noun for each in shown]),
        logits(tuple(COLORS), [each.color or "white" for each in shown]),
        logits(PLACES, [each.context for each in shown]),
        logits(STYLES, [each.style for each in shown]),
        torch.zeros(len(shown), EMBEDDING_WIDTH),
        torch.zeros(len(shown), FEATURE_WIDTH),
    )


def test_what_is_shown_as_asked_is_right_and_a_colour_not_asked_for_is_not() -> None:
    asked = class_prompts("mug", 20, seed=0)
    right = answers_right(asked, verdict_on(asked))
    assert right["noun"].all() and right["context"].all() and right["style"].all()
    assert right["color"].tolist() == [each.color is not None for each in asked]


def test_each_question_has_its_own_answer() -> None:
    asked = Asked("", "mug", "red", PLACES[0], STYLES[0])
    shown = {
        "noun": Asked("", "boat", "red", PLACES[0], STYLES[0]),
        "color": Asked("", "mug", "blue", PLACES[0], STYLES[0]),
        "context": Asked("", "mug", "red", PLACES[1], STYLES[0]),
        "style": Asked("", "mug", "red", PLACES[0], STYLES[1]),
    }
    for wrong, each in shown.items():
        right = answers_right([asked], verdict_on([each]))
        assert [name for name in right if not right[name].item()] == [wrong]


PHOTO = F.one_hot(torch.tensor([0]), EMBEDDING_WIDTH).float()


def embeddings(cosines: list[float]) -> Tensor:
    """Unit vectors of these cosines to `PHOTO`."""
    along = torch.tensor(cosines)
    unit = torch.zeros(len(cosines), EMBEDDING_WIDTH)
    unit[:, 0], unit[:, 1] = along, (1 - along.square()).sqrt()
    return unit


def clusters(first: int, second: int) -> Tensor:
    """Features in two places far from each other, with four points in each."""
    number = torch.arange(first + second)
    places = 0.01 * (number % 4) + 10 * (number >= first)
    return places[:, None].repeat(1, FEATURE_WIDTH)


def answers(noise: float, weight: float) -> Answers:
    """A model that draws all as it is asked to; nothing it draws is like the photo."""
    asked = {
        SUBJECT: subject_prompts("sks mug", "mug", 8, 0),
        CLASS: class_prompts("mug", 8, 0),
        OTHER: other_prompts("mug", 8, 0),
    }
    verdicts = {
        name: replace(verdict_on(each), embedding=embeddings([0.0] * 8), features=clusters(4, 4))
        for name, each in asked.items()
    }
    noises = {name: torch.full((TENTHS, 8, 2, 2, 2), noise) for name in (CLASS, OTHER)}
    return Answers(asked, {}, verdicts, noises, {"w": torch.full((4,), weight).double()})


def test_every_measure_is_of_its_own_set_and_of_the_tuned_model() -> None:
    original, tuned = answers(0.0, 3.0), answers(0.0, 4.5)
    shown = dict(tuned.verdicts)
    shown[SUBJECT] = replace(
        shown[SUBJECT],
        embedding=embeddings([0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.4, 0.4]),
        styles=shown[SUBJECT].styles.roll(1, 1),
    )
    # One picture that is like the photo; of its two kinds of picture the class has lost one, and
    # the other classes have one more.
    shown[CLASS] = replace(
        shown[CLASS], embedding=embeddings([0.8] + 7 * [0.0]), features=clusters(8, 0)
    )
    shown[OTHER] = replace(shown[OTHER], nouns=shown[OTHER].nouns.roll(1, 1))
    noises = {CLASS: tuned.noises[CLASS] + 2, OTHER: tuned.noises[OTHER] + 3}
    tuned = replace(tuned, verdicts=shown, noises=noises)
    again = {name: original.verdicts[name] for name in (CLASS, OTHER)}
    again[OTHER] = replace(again[OTHER], features=clusters(8, 0))
    base: Any = SimpleNamespace(answers=original, again=again)
    reference = Reference(PHOTO, 0.6, 0.0)

    scores = {name: score.value for name, score in tuned_scores(base, tuned, reference).items()}
    expected = {
        "subject_fidelity": (3 * 0.8 + 5 * 0.4) / 8,
        "subject_shown": 3 / 8,
        "subject_context": 1,
        "subject_style": 0,
        "class_drift": 1 / 8,
        "class_similarity": 0.1,
        "class_color": 1,
        "class_precision": 1,
        "class_recall": 0.5,
        "class_noise": 4,
        "other_noun": 0,
        "other_color": 1,
        "other_context": 1,
        "other_all": 0,
        "other_frechet": 0,
        "other_precision": 1,
        "other_noise": 9,
        "parameter_distance": 3,
        "relative_parameter_distance": 0.5,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert scores["class_frechet"] > 1

    own = {name: score.value for name, score in base_scores(base, reference).items()}
    assert own["subject_shown"] == own["class_drift"] == 0
    assert own["class_frechet"] == pytest.approx(0, abs=1e-6)
    assert own["other_frechet"] > 1 and own["other_recall"] == 0.5
    assert "class_noise" not in own and "parameter_distance" not in own


def test_likeness_is_one_for_the_photo_itself_and_its_negative_for_the_opposite() -> None:
    photo = F.normalize(torch.ones(1, EMBEDDING_WIDTH), dim=1)
    reference = Reference(photo, 0.5, 0.0)
    torch.testing.assert_close(
        reference.cosines(torch.cat([photo, -photo])), torch.tensor([1.0, -1.0])
    )
