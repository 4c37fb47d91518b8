"""Whole runs of Adaptive Personalized Training on real photos, by every engine, and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.families.names import MINI_MODELS
from fastppt.training import engine, runners
from fastppt.training.loop import train as train_run
from tests.training.replay import ReplayRecorder
from tests.training.runs import contents, resume_copy

MakeConfig = Callable[..., RunConfig]

NOUNS = {"backpack_dog": "backpack", "robot_toy": "robot"}
SUBJECTS = {"mini-sd": "backpack_dog", "mini-sdxl": "robot_toy", "mini-sd3": "backpack_dog"}


def train(config: RunConfig) -> Path:
    return train_run(config, Console(quiet=True)).folder.root


@pytest.fixture
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "why_not_capture", lambda device: None)
    monkeypatch.setattr(runners, "CudaRecorder", lambda device, given: ReplayRecorder(given))


def settings(model: str, subject: str, folder: Path, steps: int) -> dict[str, object]:
    return {
        "model.path": model,
        "photos.folder": str(folder),
        "photos.views": 2,
        "prompts.class_noun": NOUNS[subject],
        "name": "x",
        "stage.0.steps": steps,
        "checkpoint_every": steps // 2,
        "stage.0.trainables.text_encoder_lora.rank": 4,
    }


def run_and_resume(
    make_config: MakeConfig,
    tmp_path: Path,
    keys: dict[str, object],
    steps: int,
    engines: tuple[str, ...] = ("eager", "graph"),
) -> dict[str, dict[str, object]]:
    """What runs by each engine leave; a run that is taken up again half-way leaves the same."""
    left = {}
    for name in engines:
        output = {"engine": name, "output": str(tmp_path / name)}
        root = train(make_config("apt", **keys, **output))
        left[name] = contents(root)
        resumed = resume_copy(root, steps // 2, tmp_path / f"{name} resumed")
        assert contents(resumed) == left[name], name
        rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == steps
        for term in ("loss", "gamma", "feature_mean", "feature_std", "attention_alignment"):
            assert all(row[term] is not None and row[term] >= 0 for row in rows), term
        assert not any(row["skipped"] for row in rows)
    return left


@pytest.mark.slow
def test_apt_runs_alike_by_every_engine_and_from_a_checkpoint(
    make_config: MakeConfig, photos: Path, tmp_path: Path, graphs_on_the_cpu: None
) -> None:
    keys = settings("mini-sdxl", "robot_toy", photos, 4) | {"plots": False}
    left = run_and_resume(make_config, tmp_path, keys, 4)
    assert left["eager"] == left["graph"]


@pytest.mark.slow
@pytest.mark.parametrize("model", MINI_MODELS)
def test_a_hundred_steps_on_real_photos(
    make_config: MakeConfig,
    real_photos: Callable[[str], Path],
    tmp_path: Path,
    graphs_on_the_cpu: None,
    model: str,
) -> None:
    keys = settings(model, SUBJECTS[model], real_photos(SUBJECTS[model]), 100)
    left = run_and_resume(make_config, tmp_path, keys, 100)
    assert left["eager"] == left["graph"]


@pytest.mark.slow
def test_a_hundred_compiled_steps_on_real_photos(
    make_config: MakeConfig, real_photos: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of one family: a cold compilation takes minutes on a thread of a CPU."""
    keys = settings("mini-sdxl", "robot_toy", real_photos("robot_toy"), 100)
    run_and_resume(make_config, tmp_path, keys, 100, engines=("compile",))


@pytest.mark.gpu
@pytest.mark.parametrize("model", MINI_MODELS)
def test_a_hundred_steps_on_real_photos_on_a_gpu(
    make_config: MakeConfig, real_photos: Callable[[str], Path], tmp_path: Path, model: str
) -> None:
    keys = settings(model, SUBJECTS[model], real_photos(SUBJECTS[model]), 100)
    run_and_resume(
        make_config, tmp_path, keys | {"model.device": "cuda", "deterministic": True}, 100
    )
