"""A sweep as a user types it, and what it leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastppt.cli import app
from fastppt.sweep import runs


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
