"""The measures on verdicts that are made by hand."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastppt.evaluation.identity import Reference
from fastppt.evaluation.measures import answers_right
from fastppt.evaluation.prompts import Asked, class_prompts
from fastppt.mini.judge import EMBEDDING_WIDTH, FEATURE_WIDTH, Verdict
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


def test_likeness_is_one_for_the_photo_itself_and_its_negative_for_the_opposite() -> None:
    photo = F.normalize(torch.ones(1, EMBEDDING_WIDTH), dim=1)
    reference = Reference(photo, 0.5, 0.0)
    torch.testing.assert_close(
        reference.cosines(torch.cat([photo, -photo])), torch.tensor([1.0, -1.0])
    )
