"""Whole runs on the mini model: what they leave, that they repeat, and that the anchor holds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.data.prompts import sample_prompts
from fastppt.errors import UserError
from fastppt.families.loading import load_family
from fastppt.mini import build_mini
from fastppt.outputs import files
from fastppt.outputs.generate import install_lora
from fastppt.outputs.lora_files import DIFFUSERS_FILE, read_lora_file
from fastppt.outputs.samples import MARGIN, MIN_CELL
from fastppt.training import build, engine, loop, run
from fastppt.training.loop import train as train_run
from fastppt.training.result import RunResult
from fastppt.training.schedule import learning_rate_factor
from fastppt.training.seeds import split_seed

MakeConfig = Callable[..., RunConfig]


def train(config: RunConfig, **options: bool) -> RunResult:
    return train_run(config, Console(quiet=True), **options)


def metrics(result: RunResult) -> list[dict[str, float]]:
    return [json.loads(line) for line in result.folder.metrics.read_text().splitlines()]


def ups(folder: Path) -> torch.Tensor:
    """All up-projections of a run in one vector: they start at zero, so this is the drift."""
    tensors = load_file(folder / DIFFUSERS_FILE)
    return torch.cat([tensors[key].flatten() for key in sorted(tensors) if "lora_B" in key])


def test_a_run_leaves_everything_that_it_promises(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        **{
            "samples.enabled": True,
            "samples.steps": 1,
            "sample_every": 4,
            "checkpoint_every": 2,
            "name": "my robot",
            "tensorboard": True,
        }
    )
    result = train(config)
    root = tmp_path / "out"
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    event_files = [name for name in found if name.startswith("tensorboard/")]
    assert len(event_files) == 1
    assert sorted(set(found) - set(event_files)) == [
        "README.md",
        "checkpoints/step-000002/manifest.json",
        "checkpoints/step-000002/pytorch_lora_weights.safetensors",
        "checkpoints/step-000002/state.safetensors",
        "checkpoints/step-000004/manifest.json",
        "checkpoints/step-000004/pytorch_lora_weights.safetensors",
        "checkpoints/step-000004/state.safetensors",
        "checkpoints/step-000006/manifest.json",
        "checkpoints/step-000006/pytorch_lora_weights.safetensors",
        "checkpoints/step-000006/state.safetensors",
        "config.toml",
        "metrics.jsonl",
        "my robot.safetensors",
        "pytorch_lora_weights.safetensors",
        "samples/step-000000.png",
        "samples/step-000004.png",
        "samples/step-000006.png",
    ]
    assert all(path.is_file() for path in result.files)
    rows = metrics(result)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["anchor"] > 0 for row in rows[1:]) and rows[0]["anchor"] == 0
    for row in rows:
        assert row["loss"] == pytest.approx(row["denoising"] + row["anchor"], rel=1e-5)
    last = load_file(root / "checkpoints/step-000006" / DIFFUSERS_FILE)
    for key, tensor in load_file(root / DIFFUSERS_FILE).items():
        assert torch.equal(tensor, last[key])
    card = (root / "README.md").read_text()
    assert "sks robot" in card and "load_lora_weights" in card and "my robot.safetensors" in card


def test_every_file_is_written_by_rename(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of a run is opened under its own name (TensorBoard appends by design; it is off)."""
    opened: list[Path] = []
    real_open = Path.open

    def spy(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if "w" in mode or "a" in mode:
            opened.append(self)
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", spy)
    synced: list[int] = []
    real_sync = files.os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda fd: (synced.append(fd), real_sync(fd)))
    settings = {"samples.enabled": True, "samples.steps": 1, "checkpoint_every": 6}
    result = train(make_config(**settings))
    root = result.folder.root
    written = [path for path in opened if root in path.parents]
    assert len(written) >= 10
    assert all(path.name.endswith(".tmp") for path in written)
    # A file and its folder each, and the folder in which the checkpoint got its name; and what
    # holds the three folders that were made: of grids, of checkpoints, and of this checkpoint.
    assert len(synced) == 2 * len(written) + 1 + 3
    left = {path.name for path in root.rglob("*") if path.is_file()}
    assert not any(name.endswith(".tmp") for name in left)


@pytest.mark.parametrize("recipe", ["lora", "ppt-lora"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, recipe: str
) -> None:
    runs = []
    for place, noise in (("a", 1), ("b", 2)):
        torch.manual_seed(noise)
        samples = {"samples.enabled": place == "a", "samples.steps": 1}
        runs.append(train(make_config(recipe, output=str(tmp_path / place), **samples)))
    first, second = (load_file(run.folder.root / DIFFUSERS_FILE) for run in runs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert metrics(runs[0]) == metrics(runs[1])


@pytest.mark.slow
def test_the_written_configuration_reproduces_the_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = build_mini("mini-sdxl")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pipeline.save_pretrained("model")
    shutil.copytree(make_config().photos.folder, "photos")
    settings = {"model.path": "model", "photos.folder": "photos", "output": "first"}
    first = train(make_config(**settings | {"photos.resolution": None}))
    config = build_config(file=first.folder.config)
    assert config.photos.resolution == 64 and config.engine == "eager"
    assert config.model.precision == "fp32" and config.model.device == "cpu"
    monkeypatch.chdir(tmp_path)
    output = [("output", str(tmp_path / "again"))]
    file = tmp_path / "here" / "first" / "config.toml"
    second = train(build_config(file=file, settings=output))
    monkeypatch.chdir(tmp_path / "here")
    assert torch.equal(ups(first.folder.root), ups(second.folder.root))
    assert metrics(first) == metrics(second)


def test_another_seed_gives_another_run(make_config: MakeConfig, tmp_path: Path) -> None:
    first = train(make_config(output=str(tmp_path / "a")))
    second = train(make_config(output=str(tmp_path / "b"), seed=1))
    assert not torch.equal(ups(first.folder.root), ups(second.folder.root))


def test_streams_of_one_seed_differ() -> None:
    seeds = {split_seed(seed, stream) for seed in range(50) for stream in range(2)}
    assert len(seeds) == 100


@pytest.mark.slow
@pytest.mark.parametrize("subject", ["duck_toy", "rc_car"])
def test_the_anchor_holds_on_real_photos(
    make_config: MakeConfig,
    real_photos: Callable[[str], Path],
    tmp_path: Path,
    subject: str,
) -> None:
    """60 steps: finite loss, adapters moved; an anchor of 1e6 leaves less than 1 % of the way."""
    folder = str(real_photos(subject))
    drifts = {}
    for weight in (0.0, 1e6):
        settings = {
            "photos.folder": folder,
            "prompts.class_noun": "toy",
            "output": str(tmp_path / f"{weight:g}"),
            "stage.0.steps": 60,
            "stage.0.objectives.anchor.weight": weight,
        }
        result = train(make_config(**settings))
        assert all(math.isfinite(row["loss"]) for row in metrics(result))
        drifts[weight] = effective_drift(result.folder.root)
    assert drifts[0.0] > 1e-3
    assert drifts[1e6] < 0.01 * drifts[0.0]


def effective_drift(folder: Path) -> float:
    """How far the network's weights moved: the root of sum ||B A||^2 over the adapters."""
    tensors = load_file(folder / DIFFUSERS_FILE)
    squares = [
        (tensors[key.replace("lora_A", "lora_B")] @ down).square().sum()
        for key, down in tensors.items()
        if "lora_A" in key
    ]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("form", ["raw", pytest.param("decoupled", marks=pytest.mark.slow)])
def test_every_form_of_the_anchor_holds(make_config: MakeConfig, tmp_path: Path, form: str) -> None:
    drifts = []
    for weight in (0.0, 1e2):
        settings = {
            "output": str(tmp_path / f"{weight:g}"),
            "stage.0.steps": 30,
            "stage.0.objectives.anchor.weight": weight,
            "stage.0.objectives.anchor.form": form,
        }
        drifts.append(float(ups(train(make_config(**settings)).folder.root).norm()))
    assert drifts[1] < 0.5 * drifts[0]


def test_the_learning_rate_follows_its_schedule(make_config: MakeConfig) -> None:
    settings = {"stage.0.schedule": "cosine", "stage.0.warmup_steps": 2, "log_every": 10**12}
    config = make_config(**settings)
    rates = [row["learning_rate"] for row in metrics(train(config))]
    wanted = [1e-3 * learning_rate_factor(config.stage[0], step) for step in range(6)]
    assert rates == pytest.approx(wanted, rel=1e-6)
    assert len(set(wanted)) == 6


def test_two_streams_of_one_run_differ(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def split(seed: int, stream: int) -> int:
        seeds.append(split_seed(seed, stream))
        return seeds[-1]

    for module in (build, run):
        monkeypatch.setattr(module, "split_seed", split)
    train(make_config(**{"stage.0.steps": 1}))
    assert len(seeds) == len(set(seeds)) == 2


@pytest.mark.slow
def test_grids_show_the_tuned_network_as_configured(make_config: MakeConfig) -> None:
    settings = {
        "samples.enabled": True,
        "samples.steps": 2,
        "samples.guidance_scale": 7.5,
        "samples.seed": 11,
        "photos.resolution": 64,
        "stage.0.trainables.lora.learning_rate": 0.05,
    }
    config = make_config(**settings)
    result = train(config)
    family = load_family(config.model)
    lora = read_lora_file(result.folder.root / DIFFUSERS_FILE, family)
    adapters = install_lora(family, lora).lora
    captions = sample_prompts(config.prompts)

    def cells() -> list[bytes]:
        pictures = family.sample(
            family.encode_prompts(captions),
            family.encode_negative(),
            seeds=[11] * len(captions),
            resolution=64,
            steps=2,
            guidance_scale=7.5,
        )
        return [picture.tobytes() for picture in pictures]

    def cells_of(path: Path) -> list[bytes]:
        grid = Image.open(path)
        size = (MIN_CELL, MIN_CELL)
        corners = [(MARGIN + column * (MIN_CELL + MARGIN), MARGIN) for column in range(5)]
        crops = [grid.crop((x, y, x + MIN_CELL, y + MIN_CELL)) for x, y in corners]
        assert crops[0].size == size
        return [crop.resize((64, 64), Image.Resampling.NEAREST).tobytes() for crop in crops]

    tuned = cells()
    with adapters.switch.base():
        base = cells()
    assert tuned != base
    assert cells_of(result.folder.grid(0)) == base
    assert cells_of(result.folder.grid(6)) == tuned


def test_zero_anchor_pulls_an_initial_adapter_back(make_config: MakeConfig, tmp_path: Path) -> None:
    first = train(make_config(output=str(tmp_path / "a")))
    settings = {
        "output": str(tmp_path / "b"),
        "stage.0.steps": 1,
        "stage.0.trainables.lora.init": str(first.folder.root),
        "stage.0.objectives.anchor.to": "zero",
        "stage.0.objectives.anchor.weight": 2.0,
    }
    (row,) = metrics(train(make_config(**settings)))
    assert row["anchor"] == pytest.approx(2 * effective_drift(first.folder.root) ** 2, rel=1e-4)


def test_a_run_with_stages_of_its_own_has_a_name_for_its_method(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    result = train(make_config().model_copy(update={"recipe": None}))
    assert "| recipe | own stages |" in result.folder.card.read_text()


def test_the_first_line_is_one_line_and_has_the_models_path_as_it_is(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    # To rich this is an end without a beginning.
    folder = tmp_path / "[/a] model"
    build_mini("mini-sdxl").save_pretrained(folder)
    console = Console(file=StringIO(), width=40)
    train_run(make_config(**{"model.path": str(folder), "stage.0.steps": 2}), console)
    first = console.file.getvalue().splitlines()[0]
    assert f"2 steps on {folder} (sdxl, cpu" in first and first.endswith(" parameters")


def test_odd_words_leave_the_model_card_readable(make_config: MakeConfig) -> None:
    config = make_config(**{"prompts.class_noun": 'dog: "x" # y\'', "stage.0.steps": 1})
    card = train(config).folder.card.read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["instance_prompt"] == 'a photo of sks dog: "x" # y\''
    code = card.split("```python")[1].split("```")[0]
    compile(code, "card", "exec")


def test_a_run_continues_from_a_lora_file(make_config: MakeConfig, tmp_path: Path) -> None:
    first = train(make_config(output=str(tmp_path / "a")))
    start = load_file(first.folder.root / DIFFUSERS_FILE)
    for place, source in (("b", first.folder.root), ("c", first.folder.root / "a.safetensors")):
        settings = {
            "output": str(tmp_path / place),
            "stage.0.trainables.lora.init": str(source),
            "stage.0.trainables.lora.learning_rate": 0.0,
        }
        result = train(make_config(**settings))
        after = load_file(result.folder.root / DIFFUSERS_FILE)
        assert all(torch.equal(start[key], after[key]) for key in start)
        assert metrics(result)[0]["anchor"] == 0


def test_lora_of_another_rank_is_refused_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    first = train(make_config(output=str(tmp_path / "a")))
    settings = {
        "output": str(tmp_path / "b"),
        "stage.0.trainables.lora.rank": 8,
        "stage.0.trainables.lora.init": str(first.folder.root),
    }
    with pytest.raises(UserError, match="rank 4 in the file and 8 here"):
        train(make_config(**settings))
    assert not (tmp_path / "b").exists()


def test_stages_go_on_from_each_other(make_config: MakeConfig, tmp_path: Path) -> None:
    stage = """
[[stage]]
steps = {steps}
[stage.trainables.lora]
rank = 4
learning_rate = {rate}
[stage.objectives.denoising]
"""
    file = tmp_path / "run.toml"
    file.write_text(stage.format(steps=3, rate=1e-3) + stage.format(steps=5, rate=0.0))
    base = make_config()
    settings = [
        ("model.path", "mini-sdxl"),
        ("model.device", "cpu"),
        ("photos.folder", str(base.photos.folder)),
        ("prompts.class_noun", "robot"),
        ("samples.enabled", False),
        ("log_every", 2),
        ("checkpoint_every", 3),
        ("output", str(tmp_path / "out")),
    ]
    result = train(build_config(file=file, settings=settings))
    rows = metrics(result)
    assert [(row["stage"], row["step"]) for row in rows] == [(0, 1), (0, 2), (0, 3)] + [
        (1, step) for step in range(4, 9)
    ]
    assert rows[2]["learning_rate"] == pytest.approx(1e-3) and rows[3]["learning_rate"] == 0
    after_first = load_file(result.folder.checkpoint(3) / DIFFUSERS_FILE)
    after_second = load_file(result.folder.root / DIFFUSERS_FILE)
    # A stage with learning rate 0 keeps what the first one learned.
    assert all(torch.equal(after_first[key], after_second[key]) for key in after_first)
    assert ups(result.folder.root).norm() > 0


def test_base_weights_are_bit_identical_after_training(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    real_load = loop.load_family

    def load(model):
        family = real_load(model)
        loaded.append((family, {k: v.clone() for k, v in family.network.state_dict().items()}))
        return family

    monkeypatch.setattr(loop, "load_family", load)
    train(make_config())
    ((family, before),) = loaded
    after = family.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_overwrite_replaces_the_run(make_config: MakeConfig) -> None:
    train(make_config(seed=1))
    with pytest.raises(UserError, match="holds another run"):
        train(make_config())
    result = train(make_config(), overwrite=True)
    assert build_config(file=result.folder.config).seed == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"photos.resolution": 50}, "must be a multiple of 16 .*got 50; the nearest is 48"),
        ({"stage.0.trainables.lora.targets": ["*.to_x"]}, "matches no attention projection"),
        ({"stage.0.trainables.lora.init": "/nowhere"}, "there is no file"),
        ({"model.path": "nothing"}, "no folder, no hub id"),
    ],
)
def test_refused_runs_write_nothing(
    make_config: MakeConfig, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(make_config(**settings))
    assert not (tmp_path / "out").exists()


def test_an_engine_that_cannot_run_leaves_the_old_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = train(make_config(**{"stage.0.steps": 1}))
    monkeypatch.setattr(engine, "why_not_compile", lambda device: "needs a compiler")
    with pytest.raises(UserError, match="engine compile: needs a compiler"):
        train(make_config(engine="compile"), overwrite=True)
    assert all(file.is_file() for file in old.files)


def test_other_resolutions_train(make_config: MakeConfig) -> None:
    result = train(make_config(**{"photos.resolution": 96, "stage.0.steps": 2}))
    assert len(metrics(result)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_a_run_on_a_gpu_repeats_bit_for_bit_and_draws_samples(
    make_config: MakeConfig, tmp_path: Path, engine: str
) -> None:
    runs = []
    for place in ("a", "b"):
        settings = {
            "model.device": "cuda",
            "engine": engine,
            "output": str(tmp_path / place),
            "stage.0.steps": 20,
            "samples.enabled": True,
            "samples.steps": 2,
        }
        runs.append(train(make_config(**settings)))
    assert set(runs[0].peak_memory) == {"encode", "samples", "train"}
    assert all(peak > 2**20 for peak in runs[0].peak_memory.values())
    assert all(math.isfinite(row["loss"]) for row in metrics(runs[0]))
    assert ups(runs[0].folder.root).norm() > 0
    assert torch.equal(ups(runs[0].folder.root), ups(runs[1].folder.root))
    assert metrics(runs[0]) == metrics(runs[1])
