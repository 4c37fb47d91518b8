"""Whole runs in which numbers go wrong: what the user is told, and what is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.training import loop
from fastppt.training.loop import resume, train

MakeConfig = Callable[..., RunConfig]
Patch = pytest.MonkeyPatch

BAD_PHOTO = 2


def spoil_photos(monkeypatch: Patch, *numbers: int) -> None:
    """Let photos be encoded to NaN."""
    encode = loop.encode

    def encode_badly(*args: Any, **options: Any) -> Any:
        buckets, sheet = encode(*args, **options)
        buckets[0].latents.posteriors[list(numbers)] = torch.nan
        return buckets, sheet

    monkeypatch.setattr(loop, "encode", encode_badly)


def spoil_weight(monkeypatch: Patch) -> None:
    """Let one weight of the base be NaN."""
    load_family = loop.load_family

    def load_badly(*args: Any, **options: Any) -> Any:
        family = load_family(*args, **options)
        with torch.no_grad():
            family.network.conv_in.weight.view(-1)[7] = torch.nan
        return family

    monkeypatch.setattr(loop, "load_family", load_badly)


def run(config: RunConfig) -> tuple[str, str]:
    """What a run says, and why it stopped; empty where it did not."""
    console = Console(file=StringIO(), width=1000)
    try:
        train(config, console)
    except UserError as error:
        return console.file.getvalue(), str(error)
    return console.file.getvalue(), ""


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def test_a_bad_photo_is_named_and_the_run_goes_on(
    make_config: MakeConfig, monkeypatch: Patch, photos: Path
) -> None:
    spoil_photos(monkeypatch, BAD_PHOTO)
    config = make_config(**{"stage.0.steps": 30, "log_every": 5, "stage.0.batch_size": 2})
    name = sorted(path.name for path in photos.glob("*"))[BAD_PHOTO]
    said, stopped = run(config)
    assert not stopped
    rows = metrics(config)
    bad = [row for row in rows if "photos" in row]
    assert 0 < len(bad) < 30 and [row["step"] for row in rows] == list(range(1, 31))
    for row in rows:
        assert row["skipped"] == ("photos" in row)
    for row in bad:
        assert row["loss"] is None and name in row["photos"]
        assert len(row["photos"]) == len(row["timesteps"]) == 2
        assert all(0 <= timestep < 1000 for timestep in row["timesteps"])
    notes = [line for line in said.splitlines() if "is not finite; left out" in line]
    # One where the count has doubled, and never two of one look.
    assert 0 < len(notes) <= len(bad).bit_length()
    sample = f"photo {bad[0]['photos'][0]} at timestep {bad[0]['timesteps'][0]}"
    assert str(bad[0]["step"]) in notes[0] and sample in notes[0]
    trained = load_file(config.output / DIFFUSERS_FILE)
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert any(tensor.any() for key, tensor in trained.items() if "lora_B" in key)


def test_a_run_that_only_goes_wrong_stops_with_a_good_checkpoint(
    make_config: MakeConfig, monkeypatch: Patch
) -> None:
    spoil_weight(monkeypatch)
    config = make_config(**{"stage.0.steps": 40, "log_every": 3, "max_bad_steps": 16})
    said, stopped = run(config)
    assert "not finite in 16 steps in a row, 1 to 16 " in stopped
    assert "It is so with every photo: check the model's weights" in stopped
    assert said.count("is not finite; left out") <= 3
    done = len(metrics(config))
    # Seen when the metrics are read, and no later than two looks on.
    assert 16 <= done <= 16 + 2 * 3
    checkpoint = config.output / "checkpoints" / f"step-{done:06}"
    assert str(checkpoint) in stopped
    for key, tensor in load_file(checkpoint / DIFFUSERS_FILE).items():
        assert tensor.isfinite().all() and tensor.any() == ("lora_B" not in key)


def test_a_stopped_run_leaves_what_was_learned_before(
    make_config: MakeConfig, monkeypatch: Patch
) -> None:
    """The parameters are bit for bit those before the first bad step of the row."""
    step_of = loop.TrainingRun.pick_bucket

    def spoil_later(self: Any) -> int:
        if self.done == 4:
            self.buckets[0].latents.posteriors.fill_(torch.nan)
        return step_of(self)

    settings = {"log_every": 2, "max_bad_steps": 3, "checkpoint_every": 4}
    config = make_config(**settings, **{"stage.0.steps": 20})
    monkeypatch.setattr(loop.TrainingRun, "pick_bucket", spoil_later)
    _, stopped = run(config)
    assert "3 steps in a row, 5 to 7 " in stopped
    checkpoints = sorted((config.output / "checkpoints").iterdir())
    assert checkpoints[0].name == "step-000004" and str(checkpoints[-1]) in stopped
    first, last = (load_file(checkpoints[end] / "state.safetensors") for end in (0, -1))
    names = [name for name in first if name.startswith("lora/")]
    assert names and all(torch.equal(first[name], last[name]) for name in names)


def test_a_resumed_run_stops_where_the_uninterrupted_one_does(
    make_config: MakeConfig, monkeypatch: Patch
) -> None:
    spoil_photos(monkeypatch, *range(5))
    settings = {"log_every": 1, "max_bad_steps": 5, "checkpoint_every": 3}
    config = make_config(**settings, **{"stage.0.steps": 20})
    _, stopped = run(config)
    assert "5 steps in a row, 1 to 5 " in stopped
    place, quiet = config.output / "checkpoints", Console(quiet=True)
    with pytest.raises(UserError, match="5 steps in a row, 1 to 5 "):
        resume(place / "step-000003", [], quiet)
    # What stopped it stops it no second time.
    with pytest.raises(UserError, match="5 steps in a row, 6 to 10 "):
        resume(config.output, [], quiet)


def test_the_command_says_how_many_steps_were_left_out(
    monkeypatch: Patch, photos: Path, tmp_path: Path
) -> None:
    spoil_photos(monkeypatch, 0, 1, 2)
    output = tmp_path / "out"
    arguments = ["train", "--model", "mini-sdxl", "--photos", str(photos), "--class-noun", "robot"]
    arguments += ["--output", str(output), "--device", "cpu", "--steps", "8", "--no-samples"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    num_bad = sum("photos" in row for row in rows)
    assert 0 < num_bad < 8
    assert f"note: {num_bad} steps were left out" in result.output


def test_a_run_that_stops_exits_with_2_and_one_message(
    monkeypatch: Patch, photos: Path, tmp_path: Path
) -> None:
    spoil_photos(monkeypatch, *range(5))
    arguments = ["train", "--model", "mini-sdxl", "--photos", str(photos), "--class-noun", "robot"]
    arguments += ["--output", str(tmp_path / "out"), "--device", "cpu", "--steps", "8"]
    arguments += ["--no-samples", "--set", "max_bad_steps=2", "--log-every", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert "2 steps in a row, 1 to 2 " in result.output and "Traceback" not in result.output


@pytest.mark.slow
def test_a_float16_run_whose_scale_backs_off_is_neither_stopped_nor_alarmed(
    make_config: MakeConfig,
) -> None:
    """At its first scale, 2^16, the gradients of such weights overflow in every step."""
    settings = {
        "model.precision": "fp16",
        "photos.resolution": 64,
        "stage.0.objectives.feature_alignment.weight": 300.0,
        "stage.0.objectives.denoising.weight": 300.0,
        "stage.0.steps": 16,
        "max_bad_steps": 1,
    }
    config = make_config("lora", **settings)
    said, stopped = run(config)
    assert not stopped and "finite" not in said
    rows = metrics(config)
    assert rows[0]["skipped"] == 1 and rows[-1]["skipped"] == 0
    assert not any("photos" in row for row in rows)
