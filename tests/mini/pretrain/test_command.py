"""The command trains everything from nothing, in pieces as in one go, and writes both models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastppt.errors import UserError
from fastppt.mini.pretrain import judge, network, scenes, vae
from fastppt.mini.pretrain.__main__ import PARTS, main
from fastppt.mini.pretrain.training import Deadline, Schedule, train
from fastppt.mini.sdxl import build_mini_sdxl, load_mini_sdxl

DEVICES = ("cpu", "cuda")

TWO_STEPS = Schedule(num_steps=2, learning_rate=1e-3, warmup=2, average=0.5)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten scenes, and two steps of each training in batches of two."""
    small = {"SHARD_SIZE": 10, "NUM_WORLD_SHARDS": 1, "NUM_SUBJECT_SHARDS": 1}
    small["ProcessPoolExecutor"] = ThreadPoolExecutor
    for name, value in small.items():
        monkeypatch.setattr(scenes, name, value)
    for module in (judge, vae):
        monkeypatch.setattr(module, "SCHEDULE", TWO_STEPS)
    monkeypatch.setattr(vae, "DECODER_SCHEDULE", TWO_STEPS)
    monkeypatch.setattr(
        network, "train_network", partial(network.train_network, schedule=TWO_STEPS)
    )
    for module, name in (
        (judge, "NUM_WORLD"),
        (judge, "NUM_SUBJECTS"),
        (vae, "BATCH"),
        (network, "BATCH"),
    ):
        monkeypatch.setattr(module, name, 2)


def run(work: Path, output: Path, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, ["--work", str(work), "--output", str(output), *arguments])


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_pieces_write_what_one_go_writes_and_every_part_was_trained(tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    done = run(tmp_path / "work", whole)
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert [line for line in lines if line.endswith(": done")] == [
        f"{part}: done" for part in PARTS
    ]

    stops = []
    while not pieces.exists():
        stopped = run(tmp_path / "again", pieces, "--minutes", "0")
        assert stopped.exit_code == 0
        stops.append(stopped.output.splitlines()[-1])
    assert stops == [
        *(
            f"{name}: stopped at step 1 of 2. Run the command again to go on."
            for name in ("judge", "vae", "network", "decoder")
        ),
        "weights: done",
    ]
    assert contents(pieces) == contents(whole)

    loaded, random = load_mini_sdxl(whole / "mini-sdxl"), build_mini_sdxl(0)
    # What each training left of its first weight.
    for name, written in (
        ("judge", load_file(whole / "judge.safetensors")["layers.0.0.weight"]),
        ("vae", loaded.vae.encoder.conv_in.weight),
        ("network", loaded.unet.conv_in.weight),
        ("decoder", loaded.vae.decoder.conv_in.weight),
    ):
        average = load_file(tmp_path / "work" / f"{name}.safetensors")["averages.0"]
        assert torch.equal(written.float(), average.half().float()), name
    last, first = (each.text_encoder_2.text_projection.weight for each in (loaded, random))
    assert not torch.equal(last, first.half().float())


def test_scenes_that_are_not_there_are_named(tmp_path: Path) -> None:
    result = run(tmp_path / "work", tmp_path / "out", "--only", "judge")
    assert result.exit_code == 2
    file = tmp_path / "work" / "scenes" / "world-000.safetensors"
    assert result.output == f"pretrain: {file}: is not rendered yet; run --only scenes first\n"
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("mine")
    result = run(tmp_path / "work", tmp_path / "out", "--only", "scenes")
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "work" in result.output and "cannot be written" in result.output
    assert (tmp_path / "work").read_text() == "mine"


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(tmp_path / "work", tmp_path / "out", "--device", "cuda")
    assert result.exit_code == 2
    assert result.output == (
        "pretrain: --device cuda: no GPU is found; leave the option out to train on the CPU\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_state_of_other_networks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    network, other = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    schedule = Schedule(num_steps=1, learning_rate=1e-3)
    losses = partial(lambda module, _: module.weight.sum(), network)
    train("vae", {"vae": network}, losses, schedule, tmp_path, Deadline(None), seed=0)
    written = path.read_bytes()
    with pytest.raises(UserError, match=f"{path}: is of networks of other shapes"):
        train("vae", {"vae": other}, losses, schedule, tmp_path, Deadline(None), seed=0)
    assert path.read_bytes() == written


@pytest.mark.gpu
def test_a_gpu_trains_what_the_cpu_trains(tmp_path: Path) -> None:
    """Both draw the same; bfloat16 sums differ in order."""
    for device in DEVICES:
        done = run(tmp_path / device, tmp_path / f"{device}-weights", "--device", device)
        assert done.exit_code == 0, done.output
    for name in ("judge", "vae", "network", "decoder"):
        one, two = (load_file(tmp_path / device / f"{name}.safetensors") for device in DEVICES)
        assert one.keys() == two.keys()
        for key in one:
            if key.startswith("averages."):
                # Adam moves a weight by a learning rate a step, whatever its gradient.
                assert (one[key] - two[key]).abs().max() < 5e-3, (name, key)
    assert load_mini_sdxl(tmp_path / "cuda-weights" / "mini-sdxl").device.type == "cpu"
