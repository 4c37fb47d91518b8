"""The prompt bank: each prompt encoded once, kept at a fixed device address."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastppt.config import PromptsConfig
from fastppt.data.columns import Prompt, align_columns
from fastppt.data.photos import CroppedPhoto, Photo
from fastppt.errors import UserError
from fastppt.families.base import Family, PromptEmbeddings, PromptIds

# What a user writes where the subject, or its everyday noun, is named.
SUBJECT, CLASS_NOUN = "{subject}", "{class_noun}"


@dataclass(frozen=True)
class LivePrompts:
    """Prompts that are encoded when they are asked for, by text encoders that are trained.

    Attributes:
        ids: One row a prompt.
        family: Who encodes them.
    """

    ids: PromptIds
    family: Family

    def encode(self, rows: Tensor | slice = slice(None)) -> PromptEmbeddings:
        """Return prompts as the encoders are now, with gradients; all, or those of some rows."""
        return self.family.encode_ids(self.ids[rows])


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
        live: The same prompts in the rows of `embeddings`, where text is trained: these are then
            what the untouched encoders made of them, and subject prompts are encoded anew each
            time. None where it is not.
        moved: The same rows as encoders that were trained before, and stand still now, made of
            them; None where there are none.
    """

    embeddings: PromptEmbeddings
    subject_rows: Tensor
    class_rows: Tensor
    columns: Tensor
    sizes: Tensor
    live: LivePrompts | None = None
    moved: PromptEmbeddings | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the bank takes, embeddings that other banks share included."""
        encoded = [self.embeddings, *([] if self.moved is None else [self.moved])]
        tensors = [each.tokens for each in encoded]
        tensors += [each.pooled for each in encoded if each.pooled is not None]
        tensors += [self.subject_rows, self.class_rows, self.columns, self.sizes]
        if self.live is not None:
            tensors += self.live.ids.tensors
        return sum(tensor.nbytes for tensor in tensors)

    def subject(self, photos: Tensor) -> PromptEmbeddings:
        """Return the subject prompts of the given photos, [B] int64."""
        return self.tuned(self.subject_rows[photos])

    def tuned(self, rows: Tensor) -> PromptEmbeddings:
        """Return prompts of some rows, [B] int64, as the network is asked them that is trained."""
        if self.live is not None:
            return self.live.encode(rows)
        return (self.embeddings if self.moved is None else self.moved)[rows]

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
            self.live,
            self.moved,
        )


@torch.no_grad()
def still_banks(banks: Sequence[PromptBank]) -> list[PromptBank]:
    """Return banks for steps in which text stands still, as it is now.

    Where it has moved, subject prompts are encoded once; class prompts, which the base is asked,
    stay what they are.

    Args:
        banks: Of one run's photos: they share embeddings and live prompts.
    """
    live = banks[0].live
    if live is None:
        return list(banks)
    moved = live.encode()
    return [replace(bank, live=None, moved=moved) for bank in banks]


def subject_words(prompts: PromptsConfig) -> str:
    """Return what {subject} stands for, such as the token and the class noun."""
    words = prompts.subject.replace("{class_noun}", str(prompts.class_noun))
    return words.replace("{token}", prompts.token)


def subject_prompt(prompts: PromptsConfig, caption: str | None = None) -> str:
    """Return the prompt c* of a photo: its caption or the template, {subject} filled in."""
    return subject_parts(prompts, caption).text


def class_prompt(prompts: PromptsConfig, caption: str | None = None) -> str:
    """Return the prompt c of the plain class: a photo's caption with the class noun for {subject}.

    Without a caption of its own it is the run's ``class_prompt``.
    """
    return class_parts(prompts, caption).text


def subject_parts(prompts: PromptsConfig, caption: str | None = None) -> Prompt:
    """Return the prompt c* of a photo, cut where the subject stands."""
    text = caption if caption is not None else prompts.template
    return Prompt.of(text, SUBJECT, subject_words(prompts))


def class_parts(prompts: PromptsConfig, caption: str | None = None) -> Prompt:
    """Return the prompt c of the plain class, cut where the class noun stands."""
    noun = str(prompts.class_noun)
    if caption is not None:
        return Prompt.of(caption, SUBJECT, noun)
    return Prompt.of(prompts.class_prompt, CLASS_NOUN, noun)


def sample_prompts(prompts: PromptsConfig) -> list[str]:
    """Return the prompts of a sample grid: subject, class, then the contexts."""
    contexts = (subject_prompt(prompts, context) for context in prompts.contexts)
    return [subject_prompt(prompts), class_prompt(prompts), *contexts]


def encode_prompt_bank(
    family: Family,
    prompts: PromptsConfig,
    photos: Sequence[Photo],
    crops: Sequence[CroppedPhoto],
    *,
    move_text: bool = False,
) -> PromptBank:
    """Encode each different subject and class prompt once and note which photo has which.

    Args:
        family: The loaded model. Adapters of its text encoders are off meanwhile.
        prompts: The run's.
        photos: The subject's.
        crops: What is used of each.
        move_text: Whether text is trained, so that subject prompts must be encoded anew.

    Raises:
        UserError: a class prompt that says the new word, which the base does not know.
    """
    subjects = [subject_prompt(prompts, photo.caption) for photo in photos]
    classes = [class_prompt(prompts, photo.caption) for photo in photos]
    unique = list(dict.fromkeys([*subjects, *classes]))
    rows = {text: row for row, text in enumerate(unique)}
    captions = [photo.caption for photo in photos]
    columns = {
        caption: align_columns(
            family, subject_parts(prompts, caption), class_parts(prompts, caption)
        ).columns
        for caption in dict.fromkeys(captions)
    }
    sizes = [
        family.size_conditions(photo.size, crop.crop, crop.size)
        for photo, crop in zip(photos, crops, strict=True)
    ]
    for text in classes:
        check_class_prompt(family, prompts, text)
    with family.text.base():
        embeddings = family.encode_prompts(unique)
    return PromptBank(
        embeddings=embeddings,
        subject_rows=torch.tensor([rows[text] for text in subjects], device=family.device),
        class_rows=torch.tensor([rows[text] for text in classes], device=family.device),
        columns=torch.tensor([columns[caption] for caption in captions], device=family.device),
        sizes=torch.stack(sizes),
        live=LivePrompts(family.prompt_ids(unique), family) if move_text else None,
    )


def check_class_prompt(family: Family, prompts: PromptsConfig, text: str) -> None:
    """Refuse a class prompt that says the new word, which the base does not know.

    Raises:
        UserError: it does.
    """
    if family.text.has_new_word(text):
        raise UserError(
            f"prompts.token: {prompts.token!r} is read in the class prompt {text!r} too, which "
            "asks the base model, and it does not know the word. Change one of the two; "
            f"'<{prompts.token.strip('<>')}>' stands in no other word"
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
