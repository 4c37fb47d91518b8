"""The prompt bank: each prompt encoded once, kept at a fixed device address."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppt.config import PromptsConfig
from fastppt.data.columns import align_columns
from fastppt.data.photos import CroppedPhoto, Photo
from fastppt.families.base import Family, PromptEmbeddings


@dataclass(frozen=True)
class PromptBank:
    """What the text says and the sizes that go with it, by photo.

    Attributes:
        embeddings: One row a different prompt, of K tokens.
        subject_rows: [P] int64, the row of each photo's subject prompt.
        class_rows: [P] int64, the row of its class prompt: what the base is asked.
        columns: [P, K] int64, the token of the class prompt that each token of the subject prompt
            is compared with; -1: none.
        sizes: [P, S], what the network is told of each photo's size.
    """

    embeddings: PromptEmbeddings
    subject_rows: Tensor
    class_rows: Tensor
    columns: Tensor
    sizes: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory that the bank takes, embeddings that other banks share included."""
        pooled = self.embeddings.pooled
        tensors = [self.embeddings.tokens, *([] if pooled is None else [pooled])]
        tensors += [self.subject_rows, self.class_rows, self.columns, self.sizes]
        return sum(tensor.nbytes for tensor in tensors)

    def subject(self, photos: Tensor) -> PromptEmbeddings:
        """Return the subject prompts of the given photos, [B] int64."""
        return self.embeddings[self.subject_rows[photos]]

    def plain_class(self, photos: Tensor) -> PromptEmbeddings:
        """Return the class prompts of the given photos, [B] int64."""
        return self.embeddings[self.class_rows[photos]]

    def select(self, photos: Sequence[int]) -> PromptBank:
        """Return the bank of some of the photos; the embeddings are shared."""
        rows = torch.tensor(photos, device=self.subject_rows.device)
        return PromptBank(
            self.embeddings,
            self.subject_rows[rows],
            self.class_rows[rows],
            self.columns[rows],
            self.sizes[rows],
        )


def subject_words(prompts: PromptsConfig) -> str:
    """Return what {subject} stands for, such as the token and the class noun."""
    words = prompts.subject.replace("{class_noun}", str(prompts.class_noun))
    return words.replace("{token}", prompts.token)


def subject_prompt(prompts: PromptsConfig, caption: str | None = None) -> str:
    """Return the prompt c* of a photo: its caption or the template, {subject} filled in."""
    text = caption if caption is not None else prompts.template
    return text.replace("{subject}", subject_words(prompts))


def class_prompt(prompts: PromptsConfig, caption: str | None = None) -> str:
    """Return the prompt c of the plain class: a photo's caption with the class noun for {subject}.

    Without a caption of its own it is the run's ``class_prompt``.
    """
    if caption is not None:
        return caption.replace("{subject}", str(prompts.class_noun))
    return prompts.class_prompt.replace("{class_noun}", str(prompts.class_noun))


def sample_prompts(prompts: PromptsConfig) -> list[str]:
    """Return the prompts of a sample grid: subject, class, then the contexts."""
    contexts = (subject_prompt(prompts, context) for context in prompts.contexts)
    return [subject_prompt(prompts), class_prompt(prompts), *contexts]


def encode_prompt_bank(
    family: Family,
    prompts: PromptsConfig,
    photos: Sequence[Photo],
    crops: Sequence[CroppedPhoto],
) -> PromptBank:
    """Encode each different subject and class prompt once and note which photo has which."""
    subjects = [subject_prompt(prompts, photo.caption) for photo in photos]
    classes = [class_prompt(prompts, photo.caption) for photo in photos]
    unique = list(dict.fromkeys([*subjects, *classes]))
    tokens = {text: family.token_blocks(text) for text in unique}
    columns = [
        align_columns(tokens[subject], tokens[base])
        for subject, base in zip(subjects, classes, strict=True)
    ]
    sizes = [
        family.size_conditions(photo.size, crop.crop, crop.size)
        for photo, crop in zip(photos, crops, strict=True)
    ]
    return PromptBank(
        embeddings=family.encode_prompts(unique),
        subject_rows=torch.tensor([unique.index(text) for text in subjects], device=family.device),
        class_rows=torch.tensor([unique.index(text) for text in classes], device=family.device),
        columns=torch.tensor(columns, device=family.device),
        sizes=torch.stack(sizes),
    )


def truncation_notes(family: Family, prompts: PromptsConfig, photos: Sequence[Photo]) -> list[str]:
    """Return a line for each prompt that is not read to its end: where it stands, what is lost."""
    places = {
        f"{photo.caption_file} (the caption of {photo.path.name})": photo.caption
        for photo in photos
        if photo.caption is not None
    }
    places["prompts.template"] = prompts.template
    for index, context in enumerate(prompts.contexts):
        places[f"prompts.contexts.{index}"] = context
    texts = {place: subject_prompt(prompts, text) for place, text in places.items()}
    texts["prompts.class_prompt"] = class_prompt(prompts)
    unread = {place: family.truncated_text(text) for place, text in texts.items()}
    return [
        f"{place} is longer than {family.model.path} reads; it does not see: {words}"
        for place, words in unread.items()
        if words is not None
    ]


def caption_notes(prompts: PromptsConfig, photos: Sequence[Photo]) -> list[str]:
    """Return a line for each caption without {subject}."""
    return [
        f"{photo.caption_file} (the caption of {photo.path.name}) does not say {{subject}}; write "
        f"that where the subject is named: it becomes {subject_words(prompts)!r}, and "
        f"{prompts.class_noun!r} where the base model is asked"
        for photo in photos
        if photo.caption is not None and "{subject}" not in photo.caption
    ]


@contextmanager
def quiet_truncation() -> Iterator[None]:
    """Keep diffusers and transformers from warning of long prompts: `truncation_notes` says more.

    Their warnings name neither the file nor the key, and come once for each text encoder.
    """
    loggers = [logging.getLogger(library) for library in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
