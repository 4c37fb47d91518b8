"""Runs compared with their base, through the functions that `fastppt evaluate` calls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.config_io import build_config
from fastppt.errors import UserError
from fastppt.evaluation import identity, report, runs
from fastppt.evaluation.drift import effective_weights, predict_noise
from fastppt.evaluation.exam import EvaluationSettings, set_exam
from fastppt.evaluation.intervals import Score, share
from fastppt.evaluation.measures import MEASURES
from fastppt.evaluation.report import flat, make_table, write_reports
from fastppt.evaluation.runs import Evaluation, base_words, evaluate_runs
from fastppt.mini import build_mini
from fastppt.mini.judge import load_judge
from fastppt.mini.photos import DEMO_NOUN, DEMO_SEED
from fastppt.mini.prompt_following import read, render_pictures
from fastppt.mini.world import random_scene, random_subject
from fastppt.outputs.loading import load
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from tests.outputs.network_cases import KINDS, Trained

SMALL = EvaluationSettings(samples=5, sampler_steps=1)
DISTANCES = ("class_frechet", "other_frechet", "class_noise", "other_noise", "parameter_distance")


@pytest.fixture(scope="module")
def evaluation(trained: Path, untrained: Path) -> Evaluation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "NUM_SUBJECTS", 4)
        patch.setattr(identity, "NUM_PLAIN", 8)
        return evaluate_runs([untrained, trained], SMALL)


def test_adapters_that_add_nothing_have_no_drift_at_all(evaluation: Evaluation) -> None:
    base, untrained = evaluation.base_scores, evaluation.runs[0].scores
    for name in (*DISTANCES, "relative_parameter_distance", "class_noise_tenth_1"):
        assert untrained[name].value == pytest.approx(0, abs=1e-9), name
    assert untrained["parameter_distance"].value == untrained["class_noise"].value == 0
    assert untrained["class_recall"].value == untrained["other_precision"].value == 1
    of_base_alone = [name for name in base if name not in DISTANCES and "precision" not in name]
    for name in of_base_alone:
        if "recall" not in name:
            assert untrained[name] == base[name], name


def test_a_trained_run_drifts(evaluation: Evaluation) -> None:
    trained = evaluation.runs[1].scores
    for name in DISTANCES:
        assert trained[name].value > 1e-6, name
    assert set(MEASURES) <= set(trained)
    assert all(isinstance(value, float) for value in flat(trained).values())


def test_pictures_pair_up_and_the_bases_own_distance_is_of_other_seeds(
    evaluation: Evaluation,
) -> None:
    answers = evaluation.base.answers
    for name, pictures in answers.pictures.items():
        assert torch.equal(pictures, evaluation.runs[0].answers.pictures[name])
        assert pictures.shape == (5, 3, 64, 64)
        assert pictures.abs().max() <= 1
    assert not torch.equal(
        answers.verdicts["class"].features, evaluation.base.again["class"].features
    )
    assert evaluation.base_scores["class_frechet"].value > 0


def test_the_threshold_parts_the_subject_from_plain_objects(evaluation: Evaluation) -> None:
    """Of scenes that it was not set by: the subject's own were not known to it."""
    reference, rng = evaluation.reference, np.random.default_rng(7)
    subject = random_subject(DEMO_SEED, DEMO_NOUN)
    scenes = [random_scene(rng, subject=subject) for _ in range(8)]
    scenes += [random_scene(rng, noun=DEMO_NOUN) for _ in range(8)]
    likeness = reference.cosines(read(load_judge(), render_pictures(scenes)).embedding)
    assert (likeness[:8] >= reference.threshold).sum() >= 7
    assert (likeness[8:] < reference.threshold).sum() >= 7
    assert reference.error_rate < 0.1


def test_distance_of_weights_is_that_of_s_b_a(evaluation: Evaluation, trained: Path) -> None:
    """As alpha is the rank, s is 1."""
    tensors = {name: each.double() for name, each in load_file(trained / DIFFUSERS_FILE).items()}
    downs = {name: each for name, each in tensors.items() if ".lora_A." in name}
    squares = sum(
        (tensors[name.replace("lora_A", "lora_B")] @ down).square().sum().item()
        for name, down in downs.items()
    )
    expected = squares**0.5
    assert evaluation.runs[1].scores["parameter_distance"].value == pytest.approx(expected, 1e-9)


def test_reading_the_weights_leaves_the_network_as_it_was(trained: Path) -> None:
    pipeline = load(build_mini("mini-sdxl"), trained)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    effective_weights(pipeline.unet)
    after = pipeline.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_report_is_written_for_each_run_or_for_all(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    paths = write_reports(evaluation, tmp_path)
    assert [path.name for path in paths] == ["evaluation.json", "evaluation.png"]
    told = json.loads(paths[0].read_text())
    assert told["format"] == "fastppt-evaluation-1"
    assert [run["name"] for run in told["runs"]] == ["untrained", "trained"]
    assert set(MEASURES) <= set(told["runs"][1]["scores"])
    fidelity = told["runs"][1]["scores"]["subject_fidelity"]
    assert fidelity["low"] <= fidelity["value"] <= fidelity["high"] and fidelity["count"] == 5
    assert told["settings"]["samples"] == 5 and told["base"]["words"] == "sks robot"
    with Image.open(paths[1]) as image:
        grid = np.asarray(image)
    # The last column is the last run's, the last row the other classes' fourth picture.
    side = report.CELL
    last = grid[-report.MARGIN - side : -report.MARGIN, -report.MARGIN - side : -report.MARGIN]
    drawn = evaluation.runs[1].answers.pictures["other"][3].permute(1, 2, 0)
    assert np.array_equal(last[::2, ::2], ((drawn + 1) * 127.5).round().numpy())
    assert grid.shape[1] == report.LABEL_WIDTH + 3 * (side + report.MARGIN)
    each = write_reports(evaluation, None)
    assert [path.parent for path in each[::2]] == [run.folder for run in evaluation.runs]
    assert [run["name"] for run in json.loads(each[2].read_text())["runs"]] == ["trained"]


def test_the_table_has_a_row_a_measure_and_a_column_a_model(evaluation: Evaluation) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(make_table(evaluation))
    text = console.export_text()
    for measure in MEASURES.values():
        assert measure.text in text and measure.group in text
    assert "untrained" in text and "base" in text


def test_the_error_of_a_share_is_the_farther_end_of_its_interval() -> None:
    """Of none of eight, Wilson's interval ends at 32 %; half of its width would say 16."""
    none = share(torch.zeros(8, dtype=torch.bool))
    assert report._cell(MEASURES["class_drift"], none) == "0 ± 32 %"
    assert report._cell(MEASURES["class_noise"], Score(2.0, 1.9, 2.4, 8)) == "2 ± 0.4"
    assert report._cell(MEASURES["class_frechet"], Score(2.0)) == "2"
    assert report._cell(MEASURES["class_noise"], None) == ""


def refused(folder: Path, **changes: object) -> str:
    with pytest.raises(UserError) as error:
        evaluate_runs([folder], SMALL, **changes)  # type: ignore[arg-type]
    return str(error.value)


def copy_with(trained: Path, folder: Path, old: str, new: str) -> Path:
    shutil.copytree(trained, folder)
    file = folder / "config.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    return folder


def test_a_run_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = copy_with(trained, tmp_path / "out", 'path = "mini-sdxl"', 'path = "mini-sd"')
    assert "trained the model mini-sd; pictures of mini-sdxl alone can be judged" in refused(folder)


def test_a_noun_that_the_world_lacks_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = copy_with(trained, tmp_path / "out", 'class_noun = "robot"', 'class_noun = "toy"')
    assert "class noun 'toy', which the mini world does not have; it has " in refused(folder)


def test_an_unfinished_run_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "out")
    (folder / DIFFUSERS_FILE).unlink()
    said = refused(folder)
    assert DIFFUSERS_FILE in said and f"fastppt train --resume {folder}" in said


def test_a_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    assert "is no folder of a run (no config.toml in it)" in refused(tmp_path)


def test_a_run_of_another_version_of_the_model_is_refused(trained: Path, tmp_path: Path) -> None:
    """Whose attention had another width."""
    folder = shutil.copytree(trained, tmp_path / "out")
    file = folder / DIFFUSERS_FILE
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    wider = {
        name: torch.cat([each, each], dim=1) if ".lora_A." in name else each
        for name, each in load_file(file).items()
    }
    save_file(wider, file, metadata)
    assert "does not fit the mini-sdxl of this version of fastppt" in refused(folder)


def test_what_is_measured_is_printed_where_it_cannot_be_written(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "evaluate_runs", lambda *_: evaluation)
    output = tmp_path / "out"
    # In the place of the file that is to be written.
    (output / "evaluation.json").mkdir(parents=True)
    result = CliRunner().invoke(app, ["evaluate", "a", "--output", str(output)])
    assert result.exit_code == 2
    assert "evaluation.json: cannot be written" in result.output
    assert "likeness to the photos" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "{file}/out"], "is a file; choose another folder"),
        (["--guidance-scale", "nan"], "'--guidance-scale'"),
        (["--guidance-scale", "inf"], "'--guidance-scale'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "evaluate_runs", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    given = [each.format(file=tmp_path / "file") for each in arguments]
    result = CliRunner().invoke(app, ["evaluate", "a", *given])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_network_computes_with(
    kind: str, photos: Path, tmp_path: Path
) -> None:
    """A plain network with these weights predicts what the one with what was trained does."""
    Trained(tmp_path / "out", photos, "sdxl", kind).write()
    tuned: Any = load(build_mini("mini-sdxl"), tmp_path / "out")
    base: Any = build_mini("mini-sdxl")
    scenes = set_exam(base, "robot", EvaluationSettings(samples=2))
    latents, prompts = scenes.scenes["class"], scenes.captions["class"]
    before, wanted = (predict_noise(each, latents, prompts, 0) for each in (base, tuned))
    weights = effective_weights(tuned.unet)
    kept = {name: weights[name].float() for name, _ in base.unet.named_parameters()}
    base.unet.load_state_dict(kept)
    merged = predict_noise(base, latents, prompts, 0)
    assert (merged - wanted).norm() <= 1e-4 * (wanted - before).norm()


def test_photos_that_are_gone_are_asked_for(trained: Path, tmp_path: Path) -> None:
    said = refused(trained, photos=tmp_path / "gone")
    assert "gone is not a folder" in said and "pass --photos FOLDER" in said


def test_runs_of_different_subjects_are_refused(trained: Path, tmp_path: Path) -> None:
    other = copy_with(trained, tmp_path / "boat", 'class_noun = "robot"', 'class_noun = "boat"')
    with pytest.raises(UserError, match=r"taught a boat, and .* a robot"):
        evaluate_runs([trained, other], SMALL)


def test_the_base_is_asked_with_a_word_that_it_reads() -> None:
    rare, learned = (
        build_config(
            recipe, settings=[("prompts.class_noun", "robot"), ("model.path", "mini-sdxl")]
        )
        for recipe in ("lora", "textual-inversion")
    )
    assert base_words([learned, rare]) == "sks robot"
    assert base_words([learned]) == "a robot"


@pytest.mark.slow
def test_evaluate_prints_the_table_and_leaves_its_report(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(trained, tmp_path / "out")
    arguments = ["evaluate", str(folder), "--samples", "8", "--sampler-steps", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "likeness to the photos" in result.output
    for name in ("evaluation.json", "evaluation.png"):
        assert (folder / name).is_file()
        assert str(folder / name) in result.output
    # A new run in the same folder deletes them: they are of the old one.
    assert {folder / "evaluation.json", folder / "evaluation.png"} <= set(
        runs.RunFolder(folder).written_by(build_config(file=folder / "config.toml"))
    )
