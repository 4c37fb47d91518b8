"""Whether a pipeline of the mini world draws what prompts ask for: the judge reads its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastppt.mini.judge import Judge, Verdict
from fastppt.mini.world import (
    COLORS,
    IMAGE_SIZE,
    NOUNS,
    PLACES,
    STYLES,
    Scene,
    caption,
    random_scene,
    render,
)

PROMPT_STREAM = 3
"""Keeps the scenes that are asked for apart from those that anything was trained on (1 and 2)."""

BATCH = 32
"""Pictures that are drawn, or read, at a time; with guidance the network sees twice as many."""

ALL_THREE = "all three"
"""Noun, colour and context of one picture right together."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
        steps: Of the pipeline's own sampler.
        guidance_scale: Of classifier-free guidance; up to 1 there is none.
    """

    steps: int = 20
    guidance_scale: float = 4.0


class Wanted(Protocol):
    """What a picture is to show, such as a `Scene`."""

    @property
    def noun(self) -> str:
        """One of `NOUNS`."""

    @property
    def color(self) -> str | None:
        """One of `COLORS`; None where none is asked for."""

    @property
    def context(self) -> str:
        """One of `PLACES`."""

    @property
    def style(self) -> str:
        """One of `STYLES`."""


def draw_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Draw random scenes of the world; `caption` says each as a prompt."""
    rng = np.random.default_rng([seed, PROMPT_STREAM])
    return [random_scene(rng) for _ in range(count)]


@torch.inference_mode()
def draw_pictures(
    pipeline: Any, prompts: Sequence[str], sampling: Sampling, seed: int = 0
) -> Tensor:
    """Draw a picture for each prompt, the i-th from noise of ``seed + i``.

    The noise depends on the seed alone, so two pipelines asked with the same seed start from the
    same noise.

    Args:
        pipeline: Stock, on the CPU.
        prompts: What to draw.
        sampling: How.
        seed: Of the first picture.

    Returns:
        [N, 3, 64, 64], float32 in -1 to 1, as a picture of 8 bits would hold them: what `Judge`
        takes.
    """
    parts = []
    for first in range(0, len(prompts), BATCH):
        batch = list(prompts[first : first + BATCH])
        seeds = range(seed + first, seed + first + len(batch))
        drawn = pipeline(
            batch,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(number) for number in seeds],
            output_type="pt",
        ).images
        parts.append((drawn.float() * 255).round() / 127.5 - 1)
    return torch.cat(parts)


def render_pictures(scenes: Sequence[Scene]) -> Tensor:
    """Render scenes as `draw_pictures` returns pictures: what a model without fault would draw."""
    pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def read(judge: Judge, pictures: Tensor) -> Verdict:
    """Let the judge read pictures [N, 3, 64, 64] in -1 to 1, `BATCH` at a time."""
    parts = [vars(judge(part)).values() for part in pictures.split(BATCH)]
    return Verdict(*(torch.cat(each) for each in zip(*parts, strict=True)))


def answers_right(wanted: Sequence[Wanted], verdict: Verdict) -> dict[str, Tensor]:
    """Say of each picture whether the judge reads in it what it was to show.

    Args:
        wanted: What it was, [N].
        verdict: On the pictures.

    Returns:
        "noun", "color", "context", "style": [N] bool. A colour that was not asked for is not right.
    """
    colors = tuple(COLORS)
    answers = {
        "noun": (verdict.nouns, [NOUNS.index(each.noun) for each in wanted]),
        "color": (
            verdict.colors,
            [-1 if each.color is None else colors.index(each.color) for each in wanted],
        ),
        "context": (verdict.contexts, [PLACES.index(each.context) for each in wanted]),
        "style": (verdict.styles, [STYLES.index(each.style) for each in wanted]),
    }
    return {
        question: logits.argmax(dim=1) == torch.tensor(right)
        for question, (logits, right) in answers.items()
    }


def read_answers(judge: Judge, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Say of each picture what of a scene the judge finds in it.

    Args:
        judge: Who reads the pictures.
        pictures: [N, 3, 64, 64] in -1 to 1.
        scenes: What they were to show; of the world, not of a subject.

    Returns:
        Bool [N] by question: "noun", "color", "context", "style", and `ALL_THREE`.
    """
    right = answers_right(scenes, read(judge, pictures))
    return right | {ALL_THREE: right["noun"] & right["color"] & right["context"]}


def follow_prompts(
    pipeline: Any,
    judge: Judge,
    scenes: Sequence[Scene],
    sampling: Sampling | None = None,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw scenes from their captions, and say of each picture what is right in it.

    Args:
        pipeline: Stock, on the CPU.
        judge: Who reads the pictures.
        scenes: What is asked for, such as of `draw_scenes`.
        sampling: How pictures are drawn; None for 20 steps with guidance 4.
        seed: Of the first picture; the next ones count on.

    Returns:
        As `read_answers`; and the pictures [N, 3, 64, 64] in -1 to 1.
    """
    prompts = [caption(scene) for scene in scenes]
    pictures = draw_pictures(pipeline, prompts, sampling or Sampling(), seed)
    return read_answers(judge, pictures, scenes), pictures
