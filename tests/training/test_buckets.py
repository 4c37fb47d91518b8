"""Runs with buckets: all photos are drawn evenly, by seed and step number, from few shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from fastppt.config import RunConfig
from fastppt.data.photos import find_photos
from fastppt.families.base import Family
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.training import runners
from fastppt.training.build import build_trainables
from fastppt.training.encoding import MOST_NOTES, encode
from fastppt.training.loop import resolve, train
from fastppt.training.metric_names import METRICS
from fastppt.training.result import RunResult
from fastppt.training.ring import MetricRing
from fastppt.training.run import TrainingRun, new_generator
from fastppt.training.seeds import BUCKET_STREAM, split_seed
from fastppt.training.stage import build_steps
from fastppt.training.step import Step, run_step

MakeConfig = Callable[..., RunConfig]

# Photos of two shapes are of one where pictures are smaller.
FULL_SIZE = {"photos.resolution": 64}


@pytest.fixture
def mixed_photos(photos: Path, tmp_path: Path) -> Path:
    """Three square photos and two that lie."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.glob("*"))):
        size = (96, 64) if number in (1, 4) else (72, 72)
        Image.open(path).convert("RGB").resize(size).save(folder / f"{number}.png")
    return folder


def run(config: RunConfig) -> tuple[RunResult, str]:
    console = Console(file=StringIO(), width=80)
    return train(config, console), console.file.getvalue()


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.folder.root / DIFFUSERS_FILE)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first | second)


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    taken: list[Step] = []

    def record(step: Step, number: int) -> None:
        taken.append(step)
        run_step(step, number)

    monkeypatch.setattr(runners, "run_step", record)
    return taken


def test_a_run_with_buckets_trains_on_each_shape_and_says_which(
    make_config: MakeConfig, mixed_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = record_steps(monkeypatch)
    settings = {
        "photos.folder": str(mixed_photos),
        "photos.buckets": True,
        **FULL_SIZE,
        "stage.0.steps": 12,
    }
    result, text = run(make_config(**settings, **{"stage.0.batch_size": 2}))
    assert "note: 2 buckets: 64x64 (3 photos), 80x48 (2 photos)" in text
    shapes = {tuple(step.latents.latent_shape) for step in taken}
    assert shapes == {(8, 16, 16), (8, 12, 20)}
    for step in taken:
        # The sizes that the network is told end in that of the picture: four times the latent's.
        height, width = step.latents.latent_shape[1:]
        assert step.prompts.sizes[:, 4:].tolist() == [[4 * height, 4 * width]] * (
            step.latents.num_photos
        )
    for name in ("optimizer", "ring", "generator", "learning_rate"):
        assert len({id(getattr(step, name)) for step in taken}) == 1, name
    rows = [json.loads(line) for line in result.folder.metrics.read_text().splitlines()]
    assert len(rows) == 12 and all(math.isfinite(row["loss"]) for row in rows)


def test_a_run_with_buckets_repeats_bit_for_bit(
    make_config: MakeConfig, mixed_photos: Path, tmp_path: Path
) -> None:
    settings = {"photos.folder": str(mixed_photos), "photos.buckets": True, **FULL_SIZE}
    first, second, square = (
        weights(run(make_config(output=str(tmp_path / place), **settings | changes))[0])
        for place, changes in (("a", {}), ("b", {}), ("c", {"photos.buckets": False}))
    )
    assert equal(first, second) and not equal(first, square)


def test_square_photos_train_the_same_with_and_without_buckets(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with_buckets, without = (
        weights(
            run(make_config(output=str(tmp_path / str(on)), **{"photos.buckets": on}, **FULL_SIZE))[
                0
            ]
        )
        for on in (True, False)
    )
    assert equal(with_buckets, without)


@pytest.mark.slow
def test_the_bucket_is_a_function_of_seed_and_step_number(
    make_config: MakeConfig, mixed_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "photos.folder": str(mixed_photos),
        "photos.buckets": True,
        **FULL_SIZE,
        "stage.0.steps": 30,
    }
    shapes = []
    for place, changes in (("a", {}), ("b", {"stage.0.batch_size": 2}), ("c", {"seed": 1})):
        with monkeypatch.context() as patch:
            taken = record_steps(patch)
            run(make_config(output=str(tmp_path / place), **settings | changes))
        shapes.append([step.latents.num_photos for step in taken])
    assert shapes[0] == shapes[1] != shapes[2]
    stream = split_seed(0, BUCKET_STREAM)
    assert shapes[0] == [3 if split_seed(stream, step) % 5 < 3 else 2 for step in range(30)]


def test_photos_are_drawn_evenly_over_all_buckets() -> None:
    picker = TrainingRun.__new__(TrainingRun)

    class Counted:
        def __init__(self, num_photos: int) -> None:
            self.num_photos = num_photos

    class Seeded:
        seed = 7

    picker.config, picker.buckets = Seeded(), [Counted(n) for n in (3, 1, 2)]
    counts = [0, 0, 0]
    num_steps = 6000
    for picker.done in range(num_steps):
        counts[picker.pick_bucket()] += 1
    for count, share in zip(counts, (1 / 2, 1 / 6, 1 / 3), strict=True):
        deviation = (num_steps * share * (1 - share)) ** 0.5
        assert abs(count - num_steps * share) < 4 * deviation


def test_a_step_of_one_bucket_moves_what_the_other_goes_on_with(
    family: Family, make_config: MakeConfig, mixed_photos: Path
) -> None:
    settings = {"photos.folder": str(mixed_photos), "photos.buckets": True, **FULL_SIZE}
    config = resolve(make_config(**settings), family)
    trainables = build_trainables(config, family)
    adapters = trainables.lora
    photos = find_photos(mixed_photos)
    buckets, _ = encode(config, family, photos, Console(quiet=True))
    ring = MetricRing(METRICS, 8, family.device)
    generator = new_generator(config, family)
    steps = build_steps(config, config.stage[0], family, trainables, buckets, ring, generator)
    steps[0].learning_rate.fill_(1e-3)
    for step in (steps[0], steps[1], steps[0]):
        before = adapters.arena.flat.detach().clone()
        run_step(step)
        assert not torch.equal(adapters.arena.flat.detach(), before)
    assert steps[1].optimizer.state[adapters.arena.flat]["step"] == 3
    assert ring.count == 3


def test_notes_name_photos_that_are_scaled_up_and_prompts_that_are_cut(
    make_config: MakeConfig, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "my [old] photos"
    folder.mkdir()
    picture = Image.open(next(iter(sorted(photos.glob("*"))))).convert("RGB")
    picture.resize((80, 40)).save(folder / "small.png")
    picture.resize((64, 64)).save(folder / "fits.png")
    (folder / "fits.txt").write_text(" ".join(["{subject}"] + ["red"] * 20 + ["shiny"] * 2))
    settings = {"photos.folder": str(folder), "stage.0.steps": 1, **FULL_SIZE}
    _, text = run(make_config(**settings))
    notes = [line for line in text.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert f"{folder}/small.png is 80x40 pixels and is scaled up 1.6 times" in notes[0]
    assert notes[0].count("fits.png") == 0
    assert f"{folder}/fits.txt" in notes[1] and notes[1].endswith("shiny shiny")
    _, text = run(make_config(output=str(tmp_path / "b"), **{"stage.0.steps": 1}))
    assert "note:" not in text


def test_of_many_notes_of_one_kind_the_first_are_printed(
    make_config: MakeConfig, photos: Path, tmp_path: Path
) -> None:
    picture = Image.open(next(iter(sorted(photos.glob("*"))))).convert("RGB").resize((32, 32))
    num_photos = MOST_NOTES + 3
    for number in range(num_photos):
        picture.save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a robot, number {number}")
    settings = {"photos.folder": str(tmp_path), "stage.0.steps": 1, **FULL_SIZE}
    _, text = run(make_config(output=str(tmp_path / "out"), **settings))
    notes = [line for line in text.splitlines() if line.startswith("note: ")]
    kinds = ["is scaled up", "does not say {subject}"]
    assert [sum(kind in note for note in notes) for kind in kinds] == [MOST_NOTES] * 2
    assert notes.count("note: 3 more are like these") == 2 == len(notes) - 2 * MOST_NOTES


def test_no_bucket_is_larger_than_the_network_has_places_for(
    make_config: MakeConfig, family: Family, mixed_photos: Path
) -> None:
    config = resolve(
        make_config(**{"photos.folder": str(mixed_photos), "photos.buckets": True, **FULL_SIZE}),
        family,
    )
    family.largest_side = 64
    buckets, _ = encode(config, family, find_photos(mixed_photos), Console(quiet=True))
    assert [bucket.size for bucket in buckets] == [(64, 64)]
