"""Runs on the mini world's model, compared with its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.photos import Photo, crop_photo, list_pictures, upright_size
from fastppt.data.prompts import quiet_truncation, subject_words
from fastppt.errors import UserError
from fastppt.evaluation.exam import Answers, EvaluationSettings
from fastppt.evaluation.identity import Reference, make_reference
from fastppt.evaluation.intervals import Score
from fastppt.evaluation.measures import (
    Base,
    base_scores,
    measure_base,
    measure_tuned,
    tuned_scores,
)
from fastppt.evaluation.prompts import with_article
from fastppt.families.loading import detect_family
from fastppt.families.names import WORLD_MODEL
from fastppt.families.sources import load_pipeline
from fastppt.mini.judge import load_judge
from fastppt.mini.world import IMAGE_SIZE, NOUNS
from fastppt.outputs.finished import run_config_of
from fastppt.outputs.folder import RunFolder
from fastppt.outputs.loading import OtherNetworkError, load
from fastppt.outputs.lora_metadata import learned_word
from fastppt.outputs.results import files_of_run


@dataclass(frozen=True)
class RunScores:
    """One run's part of an evaluation.

    Attributes:
        folder: The run's.
        config: Its configuration.
        answers: What its model made of the exam.
        scores: By the names of `MEASURES`, and the noise by tenths.
    """

    folder: Path
    config: RunConfig
    answers: Answers
    scores: dict[str, Score]


@dataclass(frozen=True)
class Evaluation:
    """Runs on one subject, and their base.

    Attributes:
        base: What the base answered.
        base_words: How it was asked for the subject.
        reference: The subject.
        base_scores: The base's numbers.
        runs: The runs, as they were given.
    """

    base: Base
    base_words: str
    reference: Reference
    base_scores: dict[str, Score]
    runs: list[RunScores]


def evaluate_runs(
    folders: Sequence[Path],
    settings: EvaluationSettings,
    photos: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Evaluation:
    """Measure runs of one subject on the mini world's model, and their base once.

    Runs on one CPU thread.

    Args:
        folders: Of finished runs.
        settings: How the models are asked.
        photos: The subject's; None for the folder that the runs recorded.
        say: Is told what is done next.

    Raises:
        UserError: a folder is of no finished run, the run's model or class noun is not the mini
            world's, its photos are not there, or the runs are not of one subject.
    """
    configs = [_check_run(folder) for folder in folders]
    _check_one_noun(folders, configs)
    pictures = [_read_photos(photos or config.photos.folder) for config in configs]
    for folder, each in zip(folders, pictures, strict=True):
        if each.shape != pictures[0].shape or not torch.equal(each, pictures[0]):
            raise UserError(
                f"{folder}: was trained on other photos than {folders[0]}; evaluate them one by one"
            )
    noun, judge = str(configs[0].prompts.class_noun), load_judge()
    with _one_thread():
        # All that may be wrong with a run shows before the first picture is drawn.
        tuned = [_tuned_pipeline(folder) for folder in folders]
        pipeline, words = _pipeline(), base_words(configs)
        reference = make_reference(pictures[0], noun, judge, pipeline)
        say("base: drawing and reading pictures")
        base = measure_base(pipeline, noun, words, settings, judge)
        runs = []
        for folder, config, one in zip(folders, configs, tuned, strict=True):
            say(f"{folder}: drawing and reading pictures")
            answers = measure_tuned(base, one, subject_words(config.prompts))
            runs.append(RunScores(folder, config, answers, tuned_scores(base, answers, reference)))
        return Evaluation(base, words, reference, base_scores(base, reference), runs)


def base_words(configs: Sequence[RunConfig]) -> str:
    """Return how the base is asked for the subject of runs.

    As the first run that uses a word which the base reads. A learned word it cannot read, so where
    all runs have learned one, it is asked for the plain class.
    """
    for config in configs:
        if learned_word(config) is None:
            return subject_words(config.prompts)
    return with_article(str(configs[0].prompts.class_noun))


def _check_run(folder: Path) -> RunConfig:
    """Return the configuration of a finished run that can be evaluated.

    Raises:
        UserError: it cannot.
    """
    config = run_config_of(folder) if RunFolder(folder).config.is_file() else None
    if config is None or config.output is None:
        raise UserError(
            f"{folder}: is no folder of a run (no {RunFolder(folder).config.name} in it)"
        )
    if config.model.path != WORLD_MODEL or config.model.vae is not None:
        what = config.model.path if config.model.vae is None else f"with VAE {config.model.vae}"
        raise UserError(
            f"{folder}: trained the model {what}; pictures of {WORLD_MODEL} alone can be judged, "
            f"for it draws a world that is known exactly. Train with --model {WORLD_MODEL}"
        )
    if config.prompts.class_noun not in NOUNS:
        raise UserError(
            f"{folder}: has the class noun {config.prompts.class_noun!r}, which the mini world "
            f"does not have; it has {', '.join(NOUNS)}"
        )
    for name in files_of_run(config):
        if not (folder / name).exists():
            raise UserError(
                f"{folder}: has no {name}, so the run is not finished; go on with it: "
                f"fastppt train --resume {folder}"
            )
    return config


def _check_one_noun(folders: Sequence[Path], configs: Sequence[RunConfig]) -> None:
    nouns = [str(config.prompts.class_noun) for config in configs]
    for folder, noun in zip(folders, nouns, strict=True):
        if noun != nouns[0]:
            raise UserError(
                f"{folder}: taught a {noun}, and {folders[0]} a {nouns[0]}; evaluate them one by "
                "one"
            )


def _read_photos(folder: Path | None) -> Tensor:
    """Return the photos as the judge sees pictures, [P, 3, 64, 64] in -1 to 1.

    Raises:
        UserError: they are not there, or cannot be read.
    """
    assert folder is not None
    try:
        paths = list_pictures(folder, "photos")
    except UserError as error:
        raise UserError(f"{error} If they have moved, pass --photos FOLDER") from None
    photos = [Photo(path, None, None, upright_size(path)) for path in paths]
    return torch.stack([crop_photo(photo, (IMAGE_SIZE, IMAGE_SIZE)).pixels for photo in photos])


def _pipeline() -> Any:
    """Load the base's stock pipeline."""
    model = ModelConfig(path=WORLD_MODEL)
    return load_pipeline(model, detect_family(model), torch.float32)


def _tuned_pipeline(folder: Path) -> Any:
    """Load the base's pipeline anew, and put into it what a run has trained.

    Raises:
        UserError: it does not fit.
    """
    # diffusers says of a LoRA of the network that it has no part for the text encoders.
    with quiet_truncation():
        try:
            return load(_pipeline(), folder)
        # Of torch, for adapters of the text encoders of other shapes.
        except (OtherNetworkError, RuntimeError) as error:
            raise UserError(
                f"{folder}: does not fit the {WORLD_MODEL} of this version of fastppt, so it was "
                f"trained on that of another; train it again ({str(error).splitlines()[0]})"
            ) from None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: at these sizes two gain little, and on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
