"""The prompt bank: each prompt encoded once, kept at a fixed device address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppt.config import PromptsConfig
from fastppt.data.photos import Photo, SquarePhoto
from fastppt.families.base import Family, PromptEmbeddings


@dataclass(frozen=True)
class PromptBank:
    """What the text says and the sizes that go with it, by photo.

    Attributes:
        embeddings: One row a different prompt.
        subject_rows: [P] int64, the row of each photo's subject prompt.
        sizes: [P, S], what the network is told of each photo's size.
    """

    embeddings: PromptEmbeddings
    subject_rows: Tensor
    sizes: Tensor

    def subject(self, photos: Tensor) -> PromptEmbeddings:
        """Return the subject prompts of the given photos, [B] int64."""
        return self.embeddings[self.subject_rows[photos]]


def subject_words(prompts: PromptsConfig) -> str:
    """Return what {subject} stands for: the token and the class noun."""
    return f"{prompts.token} {prompts.class_noun}"


def subject_prompt(prompts: PromptsConfig, caption: str | None = None) -> str:
    """Return the prompt c* of a photo: its caption or the template, {subject} filled in."""
    text = caption if caption is not None else prompts.template
    return text.replace("{subject}", subject_words(prompts))


def class_prompt(prompts: PromptsConfig) -> str:
    """Return the prompt c of the plain class."""
    return prompts.class_prompt.replace("{class_noun}", str(prompts.class_noun))


def sample_prompts(prompts: PromptsConfig) -> list[str]:
    """Return the prompts of a sample grid: subject, class, then the contexts."""
    contexts = (subject_prompt(prompts, context) for context in prompts.contexts)
    return [subject_prompt(prompts), class_prompt(prompts), *contexts]


def encode_prompt_bank(
    family: Family,
    prompts: PromptsConfig,
    photos: Sequence[Photo],
    squares: Sequence[SquarePhoto],
    resolution: int,
) -> PromptBank:
    """Encode each different subject prompt once and note which photo has which."""
    texts = [subject_prompt(prompts, photo.caption) for photo in photos]
    unique = list(dict.fromkeys(texts))
    sizes = [
        family.size_conditions(photo.size, square.crop, (resolution, resolution))
        for photo, square in zip(photos, squares, strict=True)
    ]
    return PromptBank(
        embeddings=family.encode_prompts(unique),
        subject_rows=torch.tensor([unique.index(text) for text in texts], device=family.device),
        sizes=torch.stack(sizes),
    )
