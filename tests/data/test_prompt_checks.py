"""Prompts that what is trained cannot work with are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastppt.config import RunConfig
from fastppt.data.photos import find_photos
from fastppt.data.prompt_checks import check_prompts
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.trainables.tokens import LearnedTokens

MakeConfig = Callable[..., RunConfig]

ALIGNED = {"stage.0.objectives.attention_alignment.weight": 3e-4}


@pytest.fixture
def check(make_config: MakeConfig, photos: Path, tmp_path: Path) -> Callable[..., None]:
    """Check the prompts of two photos on mini-sd3; a caption is the second's own."""

    def run(recipe: str, caption: str | None = None, **settings: object) -> None:
        folder = tmp_path / "two"
        folder.mkdir(exist_ok=True)
        for path in sorted(photos.glob("*"))[:2]:
            (folder / path.name).write_bytes(path.read_bytes())
        if caption is not None:
            (folder / path.name).with_suffix(".txt").write_text(caption)
        keys = {"model.path": "mini-sd3", "photos.folder": str(folder), **settings}
        config = make_config(recipe, **keys)
        family = load_family(config.model)
        learn(config, family)
        check_prompts(config, family, find_photos(folder))

    return run


def learn(config: RunConfig, family: Family) -> None:
    """Let the tokenizers know the learned word, as a run does before it checks."""
    tokens = config.stage[0].trainables.tokens
    if tokens is not None:
        word, noun = config.prompts.token, config.prompts.class_noun
        LearnedTokens(family.text, word, vectors=tokens.vectors, init=noun, device=family.device)


@pytest.mark.parametrize("recipe", ["lora", "ppt-lora", "apt-base", "apt-ata", "apt-ata-rs", "apt"])
def test_what_a_recipe_says_lines_up(check: Callable[..., None], recipe: str) -> None:
    check(recipe)
    check(recipe, "in the snow a red {subject} at night")
    check(recipe, "{subject} and {subject}", **{"prompts.class_noun": "toy robot"})


def test_rare_word_and_default_class_prompt_line_up(check: Callable[..., None]) -> None:
    check("lora", **ALIGNED)


def test_template_and_class_prompt_that_cannot_be_lined_up_are_named(
    check: Callable[..., None],
) -> None:
    settings = {"prompts.class_prompt": "the {class_noun}, photographed"}
    with pytest.raises(UserError) as error:
        check("apt", **settings)
    assert str(error.value) == (
        "prompts.template, 'a photo of <v>', and prompts.class_prompt, 'the robot, photographed', "
        "cannot be lined up token by token, as attention alignment compares them: 'a photo of' "
        "stands in one where 'the' stands in the other. "
        'set prompts.class_prompt to "a photo of {class_noun}", '
        "or leave objectives.attention_alignment out"
    )
    # Nothing is compared by token here.
    check("apt-ata-rs", **settings)
    check("lora", **settings)


def test_words_after_the_subject_need_a_counterpart_too(check: Callable[..., None]) -> None:
    settings = {"prompts.template": "a photo of {subject} outside"}
    with pytest.raises(UserError, match="'outside' stands in one where '' stands in the other"):
        check("lora", **ALIGNED, **settings)
    # The class prompt may say more.
    longer = {"prompts.class_prompt": "a photo of a {class_noun} sitting outside"}
    check("lora", **ALIGNED, **settings, **longer)


def test_a_caption_that_grows_together_with_the_subject_is_named(
    check: Callable[..., None],
) -> None:
    caption = "a photo of my{subject} on grass"
    with pytest.raises(UserError) as error:
        check("apt", caption)
    message = str(error.value)
    assert "(the caption of " in message and ".txt" in message
    assert "'a photo of my<v> on grass'" in message and "'a photo of myrobot on grass'" in message
    assert "'<v>' and 'robot' are read as one with what stands beside them" in message
    assert "put spaces around {subject}" in message
    check("apt-ata-rs", caption)


def test_a_caption_without_the_subject_teaches_no_learned_word(check: Callable[..., None]) -> None:
    caption = "a photo of my robot"
    with pytest.raises(UserError) as error:
        check("apt-base", caption)
    message = str(error.value)
    assert "does not say {subject}, so it teaches '<v>' nothing" in message
    assert "in place of 'robot'" in message and "(the caption of " in message
    check("lora", caption, **ALIGNED)


def test_a_learned_word_that_is_cut_off_is_named(check: Callable[..., None]) -> None:
    # 22 places for words.
    check("apt", "red " * 21 + "{subject} and more")
    with pytest.raises(UserError, match=r"and '<v>' lies past that; write \{subject\} nearer"):
        check("apt", "red " * 22 + "{subject}")
    two = {"stage.0.trainables.tokens.vectors": 2}
    with pytest.raises(UserError, match="longer than mini-sd3 reads"):
        check("apt", "red " * 21 + "{subject}", **two)
    check("apt", "{subject} " + "red " * 21 + "{subject}", **two)
    check("lora", "red " * 22 + "{subject}", **ALIGNED)


def test_every_caption_is_checked_and_the_template_only_if_a_photo_needs_it(
    check: Callable[..., None], tmp_path: Path
) -> None:
    wrong = {"prompts.class_prompt": "the {class_noun}, photographed"}
    with pytest.raises(UserError, match=r"^prompts\.template, "):
        check("apt", "a {subject}", **wrong)
    for photo in find_photos(tmp_path / "two"):
        photo.path.with_suffix(".txt").write_text("a {subject}")
    check("apt", "a {subject}", **wrong)
