"""A disk that fills up in the middle of a run: what was saved stays, and the run can go on.

A full disk is a limit of the size of files (RLIMIT_FSIZE), set when one kind of file is about to be
written.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastppt.outputs import metrics
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.training import loop, run
from tests.child import in_child

STEPS = 6


def command(photos: Path, output: Path, *more: object) -> list[str]:
    arguments = [
        *("train", "--recipe", "ppt-lora", "--model", "mini-sdxl", "--photos", photos),
        *("--class-noun", "robot", "--output", output, "--steps", STEPS, "--rank", 2),
        *("--device", "cpu", "--log-every", 2, "--checkpoint-every", 2, "--tensorboard"),
        *("--no-plots", "--sample-every", 4, "--set", "samples.steps=1", *more),
    ]
    return [str(argument) for argument in arguments]


def fill_the_disk(place: object, name: str, call: int) -> Callable[[], None]:
    """Return what lets a function's calls from a certain one on find no room on the disk."""

    def prepare() -> None:
        real, calls = getattr(place, name), 0

        def function(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            return real(*arguments, **options)

        setattr(place, name, function)

    return prepare


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    code, said = in_child(command(photos, output, "--no-samples"))
    assert code == 0, said
    return output


@pytest.mark.parametrize(
    ("what", "place", "name", "call", "checkpoints"),
    [
        ("config.toml", loop, "open_folder", 1, []),
        pytest.param("step-000000.png", run, "write_grid", 1, [], marks=pytest.mark.slow),
        pytest.param("step-000004.png", run, "write_grid", 2, [2], marks=pytest.mark.slow),
        ("metrics.jsonl", metrics.MetricsFile, "write", 3, [2]),
        pytest.param("tensorboard", metrics.Curves, "append", 2, [2], marks=pytest.mark.slow),
        ("state.safetensors", run, "write_checkpoint", 2, [2]),
        (DIFFUSERS_FILE, loop, "write_results", 1, [2, 4, 6]),
        pytest.param("README.md", loop, "model_card", 1, [2, 4, 6], marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_keeps_what_was_saved_and_the_run_can_go_on(
    photos: Path,
    tmp_path: Path,
    uninterrupted: Path,
    what: str,
    place: object,
    name: str,
    call: int,
    checkpoints: list[int],
) -> None:
    output = tmp_path / "out"
    samples = "--samples" if name == "write_grid" else "--no-samples"
    code, said = in_child(command(photos, output, samples), fill_the_disk(place, name, call))
    assert code == 2, said
    assert "cannot be written (File too large)" in said and "Traceback" not in said
    if what == "state.safetensors":
        assert str(output / "checkpoints") in said
    else:
        assert what in said.split("error: ")[-1]
    assert not list(output.rglob("*.tmp")) and not list(output.rglob("error.log"))
    kept = sorted(int(path.name[-6:]) for path in output.glob("checkpoints/*"))
    assert kept == checkpoints
    if not (output / "config.toml").exists():
        assert not output.exists()
        return
    how = f"goes on from step-{checkpoints[-1]:06d}" if checkpoints else "starts over"
    assert f"the run {how} with --resume {output}\n" in said
    code, said = in_child(["train", "--resume", str(output)])
    assert code == 0, said
    mine, whole = (load_file(path / DIFFUSERS_FILE) for path in (output, uninterrupted))
    assert mine.keys() == whole.keys()
    assert all((mine[key] == whole[key]).all() for key in mine)
    assert (output / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()
