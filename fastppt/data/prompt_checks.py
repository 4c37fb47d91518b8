"""Prompts and captions that what is trained cannot work with are refused before anything is."""

from __future__ import annotations

from collections.abc import Sequence

from fastppt.config import PromptsConfig, RunConfig
from fastppt.data.columns import Prompt, align_columns, count_places_read, pair_ends
from fastppt.data.photos import Photo
from fastppt.data.prompts import SUBJECT, class_parts, subject_parts, subject_words
from fastppt.errors import UserError
from fastppt.families.base import Family

TEMPLATE = "prompts.template"


def check_prompts(config: RunConfig, family: Family, photos: Sequence[Photo]) -> None:
    """Refuse prompts that say nothing of the subject, or cannot be lined up with the class's.

    Args:
        config: Of the run.
        family: The loaded model, whose tokenizers know the learned word already.
        photos: The subject's, with their captions.

    Raises:
        UserError: where an embedding is learned, a caption without {subject}, or a prompt that is
            cut off before the end of the subject's words; where attention is held to the base's, a
            subject prompt with words that the class prompt has no counterpart of.
    """
    prompts = config.prompts
    places = {
        photo.caption: f"{photo.caption_file} (the caption of {photo.path.name})"
        if photo.caption is not None
        else TEMPLATE
        for photo in reversed(photos)
    }
    learns_tokens = any(stage.trainables.tokens is not None for stage in config.stage)
    aligns = any(stage.objectives.attention_alignment is not None for stage in config.stage)
    for caption, place in places.items():
        if learns_tokens:
            _check_subject_is_read(prompts, family, caption, place)
        if aligns:
            _check_alignment(prompts, family, caption, place)


def _check_subject_is_read(
    prompts: PromptsConfig, family: Family, caption: str | None, place: str
) -> None:
    """Refuse a prompt in which the learned word is not read."""
    if caption is not None and SUBJECT not in caption:
        raise UserError(
            f"{place} does not say {SUBJECT}, so it teaches {prompts.token!r} nothing; write "
            f"{SUBJECT} where the subject is named, in place of {prompts.class_noun!r}"
        )
    if count_places_read(family, subject_parts(prompts, caption)) == 0:
        raise UserError(
            f"{place} is longer than {family.model.path} reads, and {subject_words(prompts)!r} "
            f"lies past that; write {SUBJECT} nearer to its start"
        )


def _check_alignment(
    prompts: PromptsConfig, family: Family, caption: str | None, place: str
) -> None:
    """Refuse a subject prompt that cannot be lined up with its class prompt."""
    subject, base = subject_parts(prompts, caption), class_parts(prompts, caption)
    if align_columns(family, subject, base).lined_up:
        return
    if caption is None:
        wanted = prompts.template.replace(SUBJECT, "{class_noun}")
        other = "prompts.class_prompt"
        mend = f'set prompts.class_prompt to "{wanted}"'
    else:
        other = "the same with the class noun"
        mend = f"put spaces around {SUBJECT}"
    raise UserError(
        f"{place}, {subject.text!r}, and {other}, {base.text!r}, cannot be lined up token by "
        f"token, as attention alignment compares them: {_where_they_part(subject, base)}. {mend}, "
        "or leave objectives.attention_alignment out"
    )


def _where_they_part(subject: Prompt, base: Prompt) -> str:
    """Say in words what of a subject prompt the class prompt has no counterpart of."""
    counts = [len(prompt.pieces) - 1 for prompt in (subject, base)]
    if counts[0] != counts[1]:
        return f"one names the subject {counts[0]}x, the other the class noun {counts[1]}x"
    for ours, theirs in zip(subject.pieces, base.pieces, strict=True):
        if len(pair_ends(ours.split(), theirs.split())) < len(ours.split()):
            return f"{ours.strip()!r} stands in one where {theirs.strip()!r} stands in the other"
    return f"{subject.words!r} and {base.words!r} are read as one with what stands beside them"
