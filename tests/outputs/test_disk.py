"""What a run will write is known before, and a disk without room for it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.outputs import disk
from fastppt.outputs.disk import DiskPlan, check_disk
from fastppt.outputs.folder import RunFolder
from fastppt.training import loop
from tests.training.weight_steps import weights_config

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


def test_checkpoints_of_a_stage_are_counted_too(make_config: Make) -> None:
    config = make_config(checkpoint_every=4, stage__0__checkpoint_every=3)
    # After 3, 4 and 6 steps, and one that is being written; 6 is both's.
    assert disk._num_checkpoints(config, 6) == 5


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


FULL = {"full": {"targets": ["transformer_blocks.*"]}}
RAW = {"denoising": {}, "anchor": {"form": "raw", "weight": 0.1}}
WORD = {"prompts.token": "<v>"}


@pytest.mark.parametrize(
    ("of_stage", "settings", "parts"),
    [
        pytest.param({"trainables": {"svdiff": {}}, "objectives": RAW}, {}, ["network"]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ({"trainables": FULL, "objectives": RAW}, {}, ["network"]),
                ({"trainables": FULL, "ema_decay": 0.9}, {"save_dtype": "bf16"}, ["network"]),
                ({"trainables": {"oft": {"block_size": 16}}, "objectives": RAW}, {}, ["network"]),
                ({"trainables": {"dora": {}}}, {}, ["network"]),
                (
                    {"trainables": {"custom_diffusion": {}, "tokens": {}}},
                    WORD,
                    ["network", "embedding"],
                ),
                ({"trainables": {"tokens": {}}, "objectives": RAW}, WORD, ["embedding"]),
                ({"trainables": {"text_encoder_lora": {}}}, {}, ["LoRA files"]),
            ]
        ),
    ],
)
def test_a_run_of_any_trainable_writes_what_is_planned_and_little_less(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_stage: dict[str, Any],
    settings: dict[str, object],
    parts: list[str],
) -> None:
    plans: list[DiskPlan] = []
    monkeypatch.setattr(loop, "check_disk", lambda plan, *_: plans.append(plan))
    stages = [{"steps": 2, "objectives": {"denoising": {}}, **of_stage}]
    keys = {"output": str(tmp_path / "out"), "checkpoint_every": 2, **settings}
    result = loop.train(weights_config(photos, stages, "mini-sd3", **keys), Console(quiet=True))
    (plan,) = plans
    assert [name for name in plan.parts if name in ("network", "LoRA files", "embedding")] == parts
    (state,) = result.folder.checkpoints.iterdir()
    named = [path for path in result.files if path.suffix == ".safetensors" or path.is_dir()]
    named += [path for path in result.files if path.name == "adapter_config.json"]
    for written, planned in {
        size(*named): sum(plan.parts[name] for name in parts),
        size(state): plan.parts["2 checkpoints"] // 2,
    }.items():
        # A small file is mostly room for what it says of itself.
        room = disk.METADATA * 2 * len(parts)
        room += disk.PIPELINE_FILES * ("full" in of_stage["trainables"])
        assert 0.8 * planned - room < written <= planned
    assert size(result.folder.root) < plan.total
