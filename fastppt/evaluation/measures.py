"""The measures of an evaluation: pure functions of what base and tuned model have answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastppt.evaluation.distributions import frechet_distance, precision
from fastppt.evaluation.drift import TENTHS, parameter_distance
from fastppt.evaluation.exam import (
    CLASS,
    OTHER,
    SUBJECT,
    Answers,
    EvaluationSettings,
    Exam,
    draw,
    set_exam,
    take_exam,
)
from fastppt.evaluation.identity import Reference
from fastppt.evaluation.intervals import Score, mean, share
from fastppt.mini.judge import Judge, Verdict
from fastppt.mini.prompt_following import answers_right, read

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Measure:
    """What a number says.

    Attributes:
        group: Of what.
        text: In words.
        better: Which way is better.
        percent: Whether it is a share.
    """

    group: str
    text: str
    better: Better
    percent: bool = False


MEASURES: dict[str, Measure] = {
    "subject_fidelity": Measure("subject", "likeness to the photos", "higher"),
    "subject_shown": Measure("subject", "shows the subject", "higher", percent=True),
    "subject_context": Measure("subject", "context right", "higher", percent=True),
    "subject_style": Measure("subject", "style right", "higher", percent=True),
    "class_drift": Measure("class", "shows the subject", "lower", percent=True),
    "class_similarity": Measure("class", "likeness to the photos", "lower"),
    "class_color": Measure("class", "colour right", "higher", percent=True),
    "class_frechet": Measure("class", "Frechet distance", "lower"),
    "class_precision": Measure("class", "precision", "higher", percent=True),
    "class_recall": Measure("class", "recall", "higher", percent=True),
    "class_noise": Measure("class", "noise difference", "lower"),
    "other_noun": Measure("other classes", "noun right", "higher", percent=True),
    "other_color": Measure("other classes", "colour right", "higher", percent=True),
    "other_context": Measure("other classes", "context right", "higher", percent=True),
    "other_all": Measure("other classes", "all three right", "higher", percent=True),
    "other_frechet": Measure("other classes", "Frechet distance", "lower"),
    "other_precision": Measure("other classes", "precision", "higher", percent=True),
    "other_recall": Measure("other classes", "recall", "higher", percent=True),
    "other_noise": Measure("other classes", "noise difference", "lower"),
    "parameter_distance": Measure("weights", "distance", "lower"),
    "relative_parameter_distance": Measure("weights", "relative distance", "lower"),
}
"""The rows of a table. Beside them stand ``class_noise_tenth_1`` (least noise) to ``..._10``, and
the same of ``other_noise``."""


@dataclass(frozen=True)
class Base:
    """The base, asked once for any number of tuned models.

    Attributes:
        exam: What it was asked.
        judge: Who reads.
        answers: What it made of it.
        again: The judge's verdicts on pictures of other seeds, of class and other prompts.
    """

    exam: Exam
    judge: Judge
    answers: Answers
    again: Mapping[str, Verdict]


def measure_base(
    pipeline: Any, noun: str, words: str, settings: EvaluationSettings, judge: Judge
) -> Base:
    """Ask the base.

    Args:
        pipeline: Stock, of the base model.
        noun: The subject's, one of the world's.
        words: How the base is asked for the subject.
        settings: How.
        judge: Who reads the pictures.
    """
    exam = set_exam(pipeline, noun, settings)
    again = {
        name: read(judge, draw(pipeline, exam.prompts[name], exam, name, again=True))
        for name in (CLASS, OTHER)
    }
    return Base(exam, judge, take_exam(pipeline, exam, words, judge), again)


def measure_tuned(base: Base, pipeline: Any, words: str) -> Answers:
    """Ask a tuned model what the base was asked.

    Args:
        base: As of `measure_base`.
        pipeline: Stock, with what was trained in it.
        words: How the subject is called.
    """
    return take_exam(pipeline, base.exam, words, base.judge)


def base_scores(base: Base, reference: Reference) -> dict[str, Score]:
    """Return the base's own numbers.

    In the place of a distance from the base stands that between two sets of its own pictures, of
    the same prompts and other seeds. That is a scale and no floor: a tuned model draws from the
    base's seeds, so one that has not moved has none at all.

    Args:
        base: As of `measure_base`.
        reference: The subject's.
    """
    scores = _own_scores(base.answers, reference)
    for name in (CLASS, OTHER):
        scores |= _distribution_scores(name, base.answers.verdicts[name], base.again[name])
    return scores


def tuned_scores(base: Base, tuned: Answers, reference: Reference) -> dict[str, Score]:
    """Return all numbers of a tuned model: those of `MEASURES`, and the noise by tenths.

    Args:
        base: As of `measure_base`.
        tuned: As of `measure_tuned`.
        reference: The subject's.
    """
    scores = _own_scores(tuned, reference)
    for name in (CLASS, OTHER):
        verdicts = base.answers.verdicts[name], tuned.verdicts[name]
        scores |= _distribution_scores(name, *verdicts)
        scores |= noise_scores(name, base.answers.noises[name], tuned.noises[name])
    distance = parameter_distance(base.answers.weights, tuned.weights)
    norms = [weight.square().sum() for weight in base.answers.weights.values()]
    relative = distance / torch.stack(norms).sum().sqrt().item()
    return scores | {
        "parameter_distance": Score(distance),
        "relative_parameter_distance": Score(relative),
    }


def _own_scores(answers: Answers, reference: Reference) -> dict[str, Score]:
    """What is measured of one model alone."""
    asked, verdicts = answers.asked, answers.verdicts
    likeness = {name: reference.cosines(verdicts[name].embedding) for name in (SUBJECT, CLASS)}
    shown = {name: share(each >= reference.threshold) for name, each in likeness.items()}
    told = torch.tensor([each.color is not None for each in asked[CLASS]])
    right = {name: answers_right(asked[name], verdicts[name]) for name in (SUBJECT, CLASS, OTHER)}
    other = right[OTHER]
    return {
        "subject_fidelity": mean(likeness[SUBJECT]),
        "subject_shown": shown[SUBJECT],
        "subject_context": share(right[SUBJECT]["context"]),
        "subject_style": share(right[SUBJECT]["style"]),
        "class_drift": shown[CLASS],
        "class_similarity": mean(likeness[CLASS]),
        "class_color": share(right[CLASS]["color"][told]),
        "other_noun": share(other["noun"]),
        "other_color": share(other["color"]),
        "other_context": share(other["context"]),
        "other_all": share(other["noun"] & other["color"] & other["context"]),
    }


def _distribution_scores(name: str, base: Verdict, tuned: Verdict) -> dict[str, Score]:
    """The intervals of precision and recall are those for the manifolds as they are."""
    distance = frechet_distance(base.features, tuned.features)
    return {
        f"{name}_frechet": Score(distance, count=len(tuned.features)),
        f"{name}_precision": share(precision(base.features, tuned.features)),
        f"{name}_recall": share(precision(tuned.features, base.features)),
    }


def noise_scores(name: str, base: Tensor, tuned: Tensor) -> dict[str, Score]:
    """Return the mean squared difference of predicted noises, over all and in each tenth.

    Args:
        name: Of the set of scenes.
        base: [`TENTHS`, N, C, h, w].
        tuned: Likewise.
    """
    squares = (tuned - base).square().mean(dim=(2, 3, 4))
    tenths = {f"{name}_noise_tenth_{at + 1}": mean(squares[at]) for at in range(TENTHS)}
    return {f"{name}_noise": mean(squares.mean(dim=0)), **tenths}
