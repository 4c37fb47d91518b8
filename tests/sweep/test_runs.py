"""A sweep as a user types it, and what it leaves on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from fastppt.cli import app
from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.sweep import runs
from fastppt.sweep.grid import Point, run_folder
from fastppt.sweep.measures import Predictions

MakeConfig = Callable[..., RunConfig]


def sweep(photos: Path, output: Path, *more: object, weights: str = "0.1,100") -> Result:
    arguments = [
        *("sweep", "--recipe", "ppt-lora", "--photos", photos, "--class-noun", "robot"),
        *("--steps", 4, "--rank", 2, "--learning-rate", 1e-3, "--device", "cpu", "--no-samples"),
        *("--weights", weights, "--output", output, *more),
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def read(output: Path) -> dict:
    return json.loads((output / "sweep.json").read_text())


def modified(output: Path) -> dict[str, int]:
    files = (output / f"weight-{name}/metrics.jsonl" for name in ("0.1", "100"))
    return {str(file): file.stat().st_mtime_ns for file in files}


@pytest.mark.slow
def test_a_sweep_trains_measures_and_goes_on_with_more_weights(
    photos: Path, tmp_path: Path
) -> None:
    """On a model whose pictures nobody can judge."""
    output = tmp_path / "out"
    done = sweep(photos, output, "--model", "mini-sd")
    assert done.exit_code == 0, done.output
    weak, strong = read(output)["outcomes"]
    assert (weak["weight"], strong["weight"]) == (0.1, 100.0)
    assert weak["folder"] == "weight-0.1" and (output / "weight-0.1" / "README.md").is_file()
    for name in ("parameter_drift", "class_noise", "no_prompt_noise"):
        assert weak[name] > strong[name] > 0
    assert weak["judged"] == strong["judged"] == read(output)["base"] == {}
    assert "distance from the anchor" in done.output and "photos" not in done.output.split("┏")[1]
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")

    before = modified(output)
    more = sweep(photos, output, "--model", "mini-sd", weights="0,0.1,100")
    assert more.exit_code == 0, more.output
    assert modified(output) == before
    none, *kept = read(output)["outcomes"]
    assert kept == [weak, strong]
    assert none["weight"] == 0 and none["parameter_drift"] is None
    assert none["class_noise"] > weak["class_noise"]

    # Fewer weights are shown alone, and nothing is lost.
    fewer = sweep(photos, output, "--model", "mini-sd", weights="0,100")
    assert fewer.exit_code == 0, fewer.output
    assert [row["weight"] for row in read(output)["outcomes"]] == [0.0, 0.1, 100.0]

    other = sweep(photos, output, "--model", "mini-sd", "--seed", 5)
    assert other.exit_code == 2
    assert "holds a sweep with seed = 0, and this one has 5" in " ".join(other.output.split())
    assert modified(output) == before


def begin(config: RunConfig) -> None:
    """Do what a run does first."""
    assert config.output is not None
    config.output.mkdir(parents=True)
    (config.output / "config.toml").write_text("")


def points(make_config: MakeConfig, output: Path, **settings: Any) -> list[Point]:
    return [
        Point(weight, make_config("ppt-lora", output=str(run_folder(output, weight)), **settings))
        for weight in (0.1, 100.0)
    ]


def test_a_first_run_that_was_killed_is_not_gone_on_with_by_other_settings(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(config: RunConfig, console: Console) -> None:
        begin(config)
        raise KeyboardInterrupt

    output = tmp_path / "out"
    monkeypatch.setattr(runs, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.run_sweep(points(make_config, output), output, Console(quiet=True))
    assert read(output)["outcomes"] == []
    monkeypatch.setattr(runs, "resume", lambda *_: pytest.fail("went on"))
    with pytest.raises(UserError, match=r"holds a sweep with seed = .*, and this one has 5"):
        runs.run_sweep(points(make_config, output, seed=5), output, Console(quiet=True))


def test_a_first_run_that_is_refused_leaves_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: RunConfig, console: Console) -> None:
        raise UserError("photos: found none")

    output = tmp_path / "out"
    monkeypatch.setattr(runs, "train", refuse)
    with pytest.raises(UserError, match="found none"):
        runs.run_sweep(points(make_config, output), output, Console(quiet=True))
    assert not output.exists()


def test_a_sweep_that_was_killed_before_its_judgement_is_judged(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[runs.Sweep] = []
    output, nothing = tmp_path / "out", Predictions(torch.zeros(1), torch.zeros(1))

    def judge(grid: Any, sweep: runs.Sweep, *_: Any) -> runs.Sweep:
        judged.append(sweep)
        told = [
            runs.Outcome(**{**vars(each), "judged": {"other_all": 1.0}}) for each in sweep.outcomes
        ]
        return runs.Sweep(told, {"other_all": 1.0})

    monkeypatch.setattr(runs, "train", lambda config, _: begin(config))
    monkeypatch.setattr(runs, "resume", lambda *_: None)
    monkeypatch.setattr(runs, "predict_both", lambda *_: (nothing, nothing))
    monkeypatch.setattr(runs, "read_metrics", lambda _: [{"stage": 0, "anchor": 1.0}])
    monkeypatch.setattr(runs, "_judge", judge)
    grid = points(make_config, output)
    runs.run_sweep(grid, output, Console(quiet=True))
    runs.run_sweep(grid, output, Console(quiet=True))
    assert len(judged) == 1
    # As if killed between the second run and its judgement.
    table = read(output)
    table["outcomes"][1]["judged"] = {}
    (output / "sweep.json").write_text(json.dumps(table))
    runs.run_sweep(grid, output, Console(quiet=True))
    assert len(judged) == 2 and all(row["judged"] for row in read(output)["outcomes"])


def test_the_distance_is_that_of_the_last_stage_that_is_held(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = make_config("ppt-lora", output=str(tmp_path))
    free = make_config("lora", output=str(tmp_path))
    config = held.model_copy(update={"stage": (*held.stage, *free.stage)})
    rows = [{"stage": 0, "anchor": 0.36}, {"stage": 1, "anchor": 0.0}]
    monkeypatch.setattr(runs, "read_metrics", lambda _: rows)
    nothing = Predictions(torch.zeros(1), torch.zeros(1))
    found = runs._outcome(Point(0.04, config), tmp_path, nothing, nothing)
    assert found.parameter_drift == pytest.approx(3.0)


@pytest.mark.slow
def test_on_the_mini_worlds_model_the_judge_says_what_it_sees(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "JUDGED_SAMPLES", 8)
    output = tmp_path / "out"
    done = sweep(photos, output, "--model", "mini-sdxl")
    assert done.exit_code == 0, done.output
    result = read(output)
    assert set(result["base"]) >= {"subject_fidelity", "class_similarity", "other_all"}
    for row in result["outcomes"]:
        assert set(row["judged"]) == set(runs.JUDGED)
    weak, strong = (row["judged"]["class_noise"] for row in result["outcomes"])
    assert weak > strong > 0
    assert "likeness to the photos" in done.output
    # All is known already, and the pictures are not drawn again.
    monkeypatch.setattr(runs, "evaluate_runs", lambda *_: pytest.fail("judged again"))
    again = sweep(photos, output, "--model", "mini-sdxl")
    assert again.exit_code == 0, again.output
    assert read(output) == result


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--weights", "0.1,0.01"), "must increase"),
        (("--recipe", "lora"), "has no anchor"),
        (("--set", "seed=-1"), "seed"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(
    photos: Path, tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    refused = sweep(photos, tmp_path / "out", "--model", "mini-sd", *more)
    assert refused.exit_code == 2 and said in refused.output
    assert not (tmp_path / "out").exists()


def test_a_sweep_needs_a_folder(photos: Path) -> None:
    arguments = ["sweep", "--photos", str(photos), "--class-noun", "robot", "--model", "mini-sd"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and "--output" in refused.output


def test_a_file_that_is_no_sweeps_is_named(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "sweep.json").write_text("[1]")
    refused = sweep(photos, output, "--model", "mini-sd")
    assert refused.exit_code == 2
    assert "sweep.json: is no result of a sweep" in " ".join(refused.output.split())
    (output / "sweep.json").write_text("{}")
    assert sweep(photos, output, "--model", "mini-sd").exit_code == 2
