"""The exam that base and tuned model take alike: what is asked, and what a model answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fastppt.evaluation.autoencoder import encode
from fastppt.evaluation.drift import effective_weights, predict_noise
from fastppt.evaluation.prompts import Asked, class_prompts, other_prompts, subject_prompts
from fastppt.mini.judge import Judge, Verdict
from fastppt.mini.prompt_following import Sampling, draw_pictures, read, render_pictures
from fastppt.mini.world import NOUNS, Scene, caption, random_scene

SUBJECT, CLASS, OTHER = "subject", "class", "other"
"""The sets of prompts."""

SEEDS_A_SET = 1_000_000
"""Seeds of pictures that belong to one set of prompts."""

SCENE_STREAM = 4
"""Keeps the rendered scenes apart from those that anything was trained on (1 and 2)."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is asked.

    Attributes:
        samples: Pictures a set of prompts, and scenes whose noise is predicted.
        sampler_steps: Of the stock pipeline's own sampler.
        guidance_scale: Of classifier-free guidance; up to 1 there is none.
        seed: Of prompts, pictures and scenes.
    """

    samples: int = 64
    sampler_steps: int = 20
    guidance_scale: float = 4.0
    seed: int = 0


@dataclass(frozen=True)
class Exam:
    """What every model is asked, but for the prompts of the subject, whose words are a run's own.

    Attributes:
        noun: The subject's.
        settings: How.
        prompts: Of the plain class and of the other classes, by set.
        scenes: Rendered scenes of both, as latents [N, C, h, w], by set.
        captions: What they show, by set.
    """

    noun: str
    settings: EvaluationSettings
    prompts: Mapping[str, list[Asked]]
    scenes: Mapping[str, Tensor]
    captions: Mapping[str, list[str]]


@dataclass(frozen=True)
class Answers:
    """What a model has made of an exam.

    Attributes:
        asked: All prompts, by set.
        pictures: [N, 3, 64, 64] in -1 to 1, by set.
        verdicts: What the judge reads in them.
        noises: Predicted in the scenes, as `predict_noise` returns them, by set.
        weights: What the network computes with, by name.
    """

    asked: Mapping[str, list[Asked]]
    pictures: Mapping[str, Tensor]
    verdicts: Mapping[str, Verdict]
    noises: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


def set_exam(base: Any, noun: str, settings: EvaluationSettings) -> Exam:
    """Make an exam of a noun.

    Args:
        base: Stock pipeline, whose VAE encodes the scenes.
        noun: One of `NOUNS`.
        settings: How.
    """
    count, seed = settings.samples, settings.seed
    rng = np.random.default_rng([seed, SCENE_STREAM])
    others = [other for other in NOUNS if other != noun]
    scenes = {
        CLASS: [random_scene(rng, noun=noun) for _ in range(count)],
        OTHER: [random_scene(rng, noun=str(rng.choice(others))) for _ in range(count)],
    }
    return Exam(
        noun,
        settings,
        {CLASS: class_prompts(noun, count, seed), OTHER: other_prompts(noun, count, seed)},
        {name: encode(base, render_pictures(each)) for name, each in scenes.items()},
        {name: _captions(each) for name, each in scenes.items()},
    )


def take_exam(pipeline: Any, exam: Exam, words: str, judge: Judge) -> Answers:
    """Ask a model everything.

    Args:
        pipeline: Stock; adapters and learned words are loaded into it.
        exam: What to ask.
        words: How the subject is called.
        judge: Who reads the pictures.
    """
    settings = exam.settings
    asked = {
        SUBJECT: subject_prompts(words, exam.noun, settings.samples, settings.seed),
        **exam.prompts,
    }
    pictures = {name: draw(pipeline, each, exam, name) for name, each in asked.items()}
    return Answers(
        asked,
        pictures,
        {name: read(judge, each) for name, each in pictures.items()},
        {
            name: predict_noise(pipeline, exam.scenes[name], exam.captions[name], settings.seed)
            for name in exam.scenes
        },
        effective_weights(pipeline.unet),
    )


def draw(
    pipeline: Any, asked: Sequence[Asked], exam: Exam, name: str, *, again: bool = False
) -> Tensor:
    """Draw one picture a prompt.

    Args:
        pipeline: Stock.
        asked: The prompts.
        exam: Whose settings count.
        name: The set's, which has seeds of its own.
        again: Take other seeds than the first time.

    Returns:
        [N, 3, 64, 64] in -1 to 1.
    """
    settings = exam.settings
    place = (SUBJECT, CLASS, OTHER).index(name) + (3 if again else 0)
    return draw_pictures(
        pipeline,
        [each.prompt for each in asked],
        Sampling(settings.sampler_steps, settings.guidance_scale),
        seed=(6 * settings.seed + place) * SEEDS_A_SET,
    )


def _captions(scenes: Sequence[Scene]) -> list[str]:
    return [caption(scene) for scene in scenes]
