"""What a run will write is known before, and a disk without room for it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.outputs import disk
from fastppt.outputs.disk import DiskPlan, check_disk
from fastppt.outputs.folder import RunFolder
from fastppt.training import loop

Make = Callable[..., RunConfig]


def size(*paths: Path) -> int:
    files = [file for path in paths for file in (path, *path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def test_a_run_writes_what_is_planned_and_little_less(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[DiskPlan] = []
    monkeypatch.setattr(loop, "check_disk", lambda plan, *_: plans.append(plan))
    config = make_config(
        checkpoint_every=2,
        sample_every=3,
        tensorboard=True,
        samples__enabled=True,
        samples__steps=1,
        stage__0__objectives__anchor__form="raw",
    )
    result = loop.train(config, Console(quiet=True))
    root = result.folder.root
    parts = dict(plans[0].parts)
    # With the one that would be written aside.
    num, checkpoints = 3, parts.pop("4 checkpoints") * 3 // 4
    folders = list(result.folder.checkpoints.iterdir())
    assert len(folders) == num
    for written, planned in {
        size(*root.glob("*.safetensors")): parts["LoRA files"],
        size(*folders): checkpoints,
    }.items():
        assert 0.85 * planned < written <= planned
    assert len(list(result.folder.samples.iterdir())) == 3
    assert size(result.folder.samples) <= parts["3 sample grids"]
    assert size(result.folder.metrics) <= parts["metrics"]
    assert size(result.folder.tensorboard) <= parts["TensorBoard"]
    assert size(root) < plans[0].total


@pytest.mark.parametrize(("every", "keep", "counted"), [(0, 0, 2), (2, 0, 4), (2, 1, 2), (4, 5, 3)])
def test_as_many_checkpoints_are_counted_as_there_are_at_a_time(
    make_config: Make, every: int, keep: int, counted: int
) -> None:
    config = make_config(checkpoint_every=every, keep_checkpoints=keep)
    assert disk._num_checkpoints(config, 6) == counted


def test_a_disk_without_room_is_refused_before_anything_is_written(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    config = make_config()
    assert config.output is not None
    message = r"writes up to \d.* MiB \(LoRA files .*\), and 1\.0 MiB are free at .*free some space"
    with pytest.raises(UserError, match=message):
        loop.train(config, Console(quiet=True))
    assert not config.output.exists()


def test_what_a_run_that_is_written_over_takes_counts_as_free(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config()
    folder = RunFolder(tmp_path / "out")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=500))
    with pytest.raises(UserError, match="are free"):
        check_disk(DiskPlan({"all": 1000}), folder, config)
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / "x").write_bytes(bytes(500))
    check_disk(DiskPlan({"all": 1000}), folder, config)


def test_what_layers_and_bins_note_is_planned_and_so_are_plots(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns: list[str] = []
    plans: list[DiskPlan] = []

    def plan(*given: object) -> DiskPlan:
        columns.extend(given[-1])
        plans.append(disk.plan_disk(*given))
        return plans[-1]

    monkeypatch.setattr(loop, "plan_disk", plan)
    config = make_config("apt", stage__0__steps=1, photos__views=1)
    result = loop.train(config, Console(quiet=True))
    (line,) = result.folder.metrics.read_text().splitlines()
    row = json.loads(line)
    noted = {f"{term}/{layer}" for term, table in row["layers"].items() for layer in table}
    noted |= {f"gamma/bin_{number}" for number in range(len(row["gamma_bins"]))}
    assert len(noted) > 10 and noted <= set(columns)
    assert 0 < size(result.folder.plots) <= plans[0].parts["plots"]
