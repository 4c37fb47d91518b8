"""Flags that are about a stage, and the keys that they set in runs of different methods."""

from __future__ import annotations

from typing import Any

import pytest

from fastppt.config_io import build_config, stage_tables
from fastppt.errors import UserError
from fastppt.flags import stage_settings

LORA: dict[str, Any] = {"trainables": {"lora": {}}}
TOKENS: dict[str, Any] = {"trainables": {"tokens": {}}}
FULL: dict[str, Any] = {"trainables": {"full": {}}}
TEXT: dict[str, Any] = {"trainables": {"tokens": {}, "text_encoder_lora": {}}}
BOTH: dict[str, Any] = {"trainables": {"lora": {}, "text_encoder_lora": {}}}


@pytest.mark.parametrize(
    ("flag", "stages", "key"),
    [
        ("steps", [FULL], "stage.0.steps"),
        ("anchor_weight", [LORA], "stage.0.objectives.anchor.weight"),
        ("rank", [LORA], "stage.0.trainables.lora.rank"),
        # What moves in the network goes before the text's.
        ("rank", [BOTH], "stage.0.trainables.lora.rank"),
        ("learning_rate", [BOTH], "stage.0.trainables.lora.learning_rate"),
        ("learning_rate", [FULL], "stage.0.trainables.full.learning_rate"),
        # Or the only thing that has such a key.
        ("learning_rate", [TOKENS], "stage.0.trainables.tokens.learning_rate"),
        ("rank", [TEXT], "stage.0.trainables.text_encoder_lora.rank"),
        ("rank", [TOKENS, LORA], "stage.1.trainables.lora.rank"),
        ("init_lora", [TOKENS, LORA, LORA], "stage.1.trainables.lora.init"),
    ],
)
def test_a_flag_sets_the_key_of_what_the_run_trains(
    flag: str, stages: list[dict[str, Any]], key: str
) -> None:
    value = "file" if flag == "init_lora" else 1
    assert stage_settings({flag: value}, stages) == [(key, value)]


@pytest.mark.parametrize(
    ("flag", "stages", "message"),
    [
        ("steps", [LORA, LORA], "--steps: this run has 2 stages; say which one with --set stage.N"),
        ("rank", [FULL], "--rank: this run trains full, without a rank; leave it out"),
        (
            "learning_rate",
            [TEXT],
            "--learning-rate: this run trains text_encoder_lora and tokens; say which one with "
            "--set stage.0.trainables.text_encoder_lora.learning_rate=... or "
            "--set stage.0.trainables.tokens.learning_rate=...",
        ),
        (
            "learning_rate",
            [TOKENS, LORA],
            "--learning-rate: this run trains tokens and lora; say which one with "
            "--set stage.0.trainables.tokens.learning_rate=... or "
            "--set stage.1.trainables.lora.learning_rate=...",
        ),
        ("init_lora", [TOKENS, FULL], "--init-lora: this run trains no LoRA, but tokens and full"),
    ],
)
def test_a_flag_that_means_no_key_or_several_is_refused_by_their_names(
    flag: str, stages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError) as error:
        stage_settings({flag: 1}, stages)
    assert str(error.value).startswith(message)


def test_flags_that_are_not_given_set_nothing() -> None:
    assert stage_settings({"rank": None}, [LORA, LORA]) == []


def test_stages_are_those_that_the_configuration_gets() -> None:
    settings = [("stage.0.trainables.lora.rank", 2)]
    (stage,) = stage_tables("ppt-lora", settings=settings)
    config = build_config("ppt-lora", settings=settings)
    assert stage["trainables"]["lora"]["rank"] == 2 == config.stage[0].trainables.lora.rank


def test_what_is_wrong_with_stages_is_left_to_be_said_later() -> None:
    assert stage_tables(settings=[("stage", 5)]) == []
    assert stage_tables(settings=[("stage", [5])]) == [{}]
    assert stage_settings({"steps": 1, "rank": 1}, []) == []
    assert stage_settings({"rank": 1}, [{"trainables": 5}]) == []
