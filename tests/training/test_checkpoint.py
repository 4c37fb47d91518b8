"""A checkpoint is whole or not there; a damaged one is named, and the one before it offered."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.outputs import files
from fastppt.outputs.files import STATE_FILE
from fastppt.outputs.folder import RunFolder
from fastppt.training import checkpoint
from fastppt.training.checkpoint import (
    MANIFEST_FILE,
    Identity,
    Manifest,
    delete_checkpoint,
    find_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from fastppt.training.loop import train
from fastppt.training.resume import find_run, plan_resume

MakeConfig = Callable[..., RunConfig]
STATE = {"lora/values": torch.arange(5.0), "count": torch.tensor(3)}


def write(folder: Path, step: int = 3) -> Path:
    """Write a checkpoint of a made-up run."""
    identity = Identity(photos={"a.png": "0"}, captions={"a.png": None}, weights="1", encodings="2")
    write_checkpoint(
        folder,
        STATE,
        lambda aside: files.write_file(aside / "adapters.safetensors", b"adapters"),
        lambda entries: Manifest(
            step=step,
            stage=0,
            number=step,
            seconds=1.5,
            config={"seed": 0},
            identity=identity,
            machine={"torch": "2"},
            files=entries,
        ),
    )
    return folder


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoints" / "step-000003")
    read = read_checkpoint(folder)
    assert read.manifest.step == 3 and read.manifest.identity.photos == {"a.png": "0"}
    assert set(read.manifest.files) == {"adapters.safetensors", STATE_FILE}
    tensors = read.tensors()
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)
    assert [path.name for path in folder.parent.iterdir()] == ["step-000003"]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (STATE_FILE, Path.unlink, "state.safetensors: is missing"),
        (STATE_FILE, cut_off, "bytes, and .* were written"),
        (STATE_FILE, flip_a_bit, "is not what was written"),
        ("adapters.safetensors", flip_a_bit, "adapters.safetensors: is not what was written"),
        (MANIFEST_FILE, Path.unlink, "manifest.json: is missing"),
        (MANIFEST_FILE, cut_off, "manifest.json: cannot be read"),
        (MANIFEST_FILE, lambda path: path.write_bytes(b"\xff"), "manifest.json: cannot be read"),
        (MANIFEST_FILE, lambda path: path.write_text("[]"), "has format None"),
        (MANIFEST_FILE, lambda path: change(path, format=2), "has format 2, and this fastppt"),
        (MANIFEST_FILE, lambda path: change(path, step="3"), r"is not a manifest \(step\)"),
        (MANIFEST_FILE, lambda path: change(path, step=4), "is that of step-000004"),
        (MANIFEST_FILE, lambda path: change(path, files={}), "names no state.safetensors"),
        (MANIFEST_FILE, lambda path: lead_out(path), "of another folder"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = write(tmp_path / "step-000003")
    damage(folder / name)
    with pytest.raises(UserError, match=message):
        read_checkpoint(folder)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def lead_out(path: Path) -> None:
    entry = json.loads(path.read_text())["files"][STATE_FILE]
    change(path, files={"../" + STATE_FILE: entry})


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, name in ((files.os, "fsync"), (checkpoint, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(UserError, match=r"cannot be written \(No space left"):
                write(tmp_path / "step-000003")
        assert list(tmp_path.iterdir()) == []


def test_the_name_comes_last_and_all_before_it_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_replace, real_sync = files.os.replace, files.os.fsync

    def replace(source: Path, target: Path) -> None:
        done.append(f"name {Path(target).name}")
        real_replace(source, target)

    def sync(descriptor: int) -> None:
        done.append("sync")
        real_sync(descriptor)

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.os, "fsync", sync)
    write(tmp_path / "checkpoints" / "step-000003")
    # Each file before it gets its name, and its folder after; before all of them the folders that
    # hold the names of the new ones.
    named = ["adapters.safetensors", STATE_FILE, MANIFEST_FILE]
    expected = [part for name in named for part in ("sync", f"name {name}", "sync")]
    assert done == ["sync", "sync", *expected, "name step-000003", "sync"]


def test_old_checkpoints_go_once_the_new_one_is_there(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real_delete = checkpoint.delete_checkpoint

    def delete(path: Path) -> None:
        seen.append((path.name, sorted(p.name for p in path.parent.glob("step-*"))))
        real_delete(path)

    monkeypatch.setattr(checkpoint, "delete_checkpoint", delete)
    result = train(make_config(checkpoint_every=2, keep_checkpoints=1), Console(quiet=True))
    assert seen == [
        ("step-000002", ["step-000002", "step-000004"]),
        ("step-000004", ["step-000004", "step-000006"]),
    ]
    assert [path.name for path in result.folder.checkpoints.iterdir()] == ["step-000006"]


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "step-000003")
    real_remove = shutil.rmtree

    def fail(path: Path, **options: object) -> None:
        if not options:
            raise OSError(errno.EIO, "Input/output error")
        real_remove(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", fail)
    with pytest.raises(UserError, match="cannot be deleted"):
        delete_checkpoint(folder)
    assert find_checkpoints(RunFolder(tmp_path.parent)) == {}
    assert [path.name for path in tmp_path.iterdir()] == [".step-000003.tmp"]


def test_checkpoints_are_found_newest_first_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("step-000009", "step-1000000", "step-000100", ".step-000200.tmp", "step-x"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert list(find_checkpoints(folder)) == [1000000, 100, 9]
    prune_checkpoints(folder, 0)
    assert len(find_checkpoints(folder)) == 3
    prune_checkpoints(folder, 2)
    assert list(find_checkpoints(folder)) == [1000000, 100]


def test_without_checkpoint_every_a_run_that_ends_writes_none(make_config: MakeConfig) -> None:
    result = train(make_config(), Console(quiet=True))
    assert not result.folder.checkpoints.exists()


# Damage in a run.


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastppt.config_io import build_config

    settings = {
        "model.path": "mini-sd",
        "model.device": "cpu",
        "photos.folder": str(photos),
        "prompts.class_noun": "robot",
        "output": str(tmp_path_factory.mktemp("run") / "out"),
        "samples.enabled": False,
        "stage.0.steps": 3,
        "stage.0.trainables.lora.rank": 2,
        "checkpoint_every": 1,
    }
    config = build_config("lora", settings=list(settings.items()))
    root = train(config, Console(quiet=True)).folder.root
    (root / "README.md").unlink()
    return root


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        plan_resume(*find_run(path), [])
    return str(error.value)


def test_a_damaged_checkpoint_is_named_and_the_whole_one_before_it_offered(
    run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    newest, middle, oldest = find_checkpoints(RunFolder(copy)).values()
    flip_a_bit(newest / STATE_FILE)
    text = refusal(copy)
    assert f"checkpoint step-000003 is damaged: {newest / STATE_FILE}" in text
    assert text.endswith(f"--resume {middle}")
    flip_a_bit(middle / STATE_FILE)
    assert refusal(copy).endswith(f"--resume {oldest}")
    # What is offered is taken.
    plan = plan_resume(*find_run(oldest), [])
    assert plan is not None and plan.step == 1
    cut_off(oldest / MANIFEST_FILE)
    text = refusal(copy)
    assert "None before it is whole" in text and f"--resume {copy}" in text


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(run: Path) -> None:
    text = refusal(run / "checkpoints" / "step-000007")
    assert "no such checkpoint (there are: step-000001, step-000002, step-000003)" in text


def test_a_checkpoints_adapters_are_those_of_its_state(run: Path) -> None:
    """At rank 2 of alpha 2 nothing is folded."""
    folder = run / "checkpoints" / "step-000002"
    adapters = load_file(folder / "pytorch_lora_weights.safetensors")
    values = load_file(folder / STATE_FILE)["lora/values"]
    total = sum(tensor.double().square().sum() for tensor in adapters.values())
    assert torch.isclose(values.double().square().sum(), total, rtol=1e-12)
