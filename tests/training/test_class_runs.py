"""Runs with prior preservation: what they leave and say, resumed, replayed, with trained text."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.errors import UserError
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.training import runners
from fastppt.training.loop import train
from fastppt.training.result import RunResult
from fastppt.training.runners import EagerRunner, GraphRunner
from fastppt.training.sampler import Sampler
from fastppt.training.step import accumulate_gradients
from tests.child import in_child
from tests.training.class_steps import PRIOR, class_stage, write_class_pictures
from tests.training.replay import ReplayRecorder
from tests.training.runs import contents, resume, resume_copy
from tests.training.stages import are_equal, run_stage, state_of

MakeConfig = Callable[..., RunConfig]
DRAWN: dict[str, object] = {
    "model.path": "mini-sd3",
    f"{PRIOR}.num_images": 3,
    f"{PRIOR}.batch_size": 2,
    f"{PRIOR}.steps": 2,
}


@pytest.fixture
def drawn(tmp_path: Path) -> dict[str, object]:
    """Settings of a run that draws three class images into a cache of its own."""
    return DRAWN | {f"{PRIOR}.cache": str(tmp_path / "cache")}


def run(config: RunConfig) -> tuple[RunResult, str]:
    """A run, and what it said."""
    console = Console(file=StringIO(), width=300)
    return train(config, console), console.file.getvalue()


def test_a_run_says_what_class_images_it_was_trained_on(
    make_config: MakeConfig, drawn: dict[str, object]
) -> None:
    result, said = run(make_config("lora", **drawn))
    words = "3, euler, 2 steps, guidance 7"
    assert "drawing 3 class images of 2 steps each" in said
    assert f"class images: {words}; 3 drawn, 0 reused; " in said
    assert result.seconds["class images"] > 0
    root = result.folder.root
    card = (root / "README.md").read_text()
    assert re.search(rf"\| class images \| {words}; 3 drawn, 0 reused; \d+\.\d s \|", card)
    with safe_open(root / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    told = metadata["modelspec.description"] + metadata.get("ss_training_comment", "")
    assert f"class images: {words}" in told
    saved = build_config(file=root / "config.toml").stage[0].objectives.prior_preservation
    assert saved is not None
    assert (saved.sampler, saved.steps, saved.guidance_scale) == ("euler", 2, 7.0)
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["loss"] == pytest.approx(row["denoising"] + row["prior_preservation"], rel=1e-5)
    again, said = run(make_config("lora", **drawn, output=str(root / "again")))
    assert "0 drawn, 3 reused" in said and "drawing" not in said
    assert contents(again.folder.root) != {}
    assert (again.folder.root / DIFFUSERS_FILE).read_bytes() == (root / DIFFUSERS_FILE).read_bytes()


@pytest.mark.slow
def test_a_run_without_class_images_has_no_such_phase(make_config: MakeConfig) -> None:
    result, said = run(make_config("lora", **{"model.path": "mini-sd3", "stage.0.steps": 2}))
    assert "class images" not in result.seconds
    assert "class image" not in said
    assert "class images" not in (result.folder.root / "README.md").read_text()


@pytest.mark.parametrize("cache_is_gone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resumed_run_equals_uninterrupted_run(
    make_config: MakeConfig, drawn: dict[str, object], tmp_path: Path, cache_is_gone: bool
) -> None:
    whole, _ = run(make_config("lora", **drawn, checkpoint_every=2))
    if cache_is_gone:
        shutil.rmtree(tmp_path / "cache")
    resumed = resume_copy(whole.folder.root, 4, tmp_path / "copy" / "out")
    assert contents(resumed) == contents(whole.folder.root)


@pytest.mark.slow
def test_other_pictures_than_those_of_the_folder_are_refused_on_resume(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = write_class_pictures(tmp_path / "own")
    prior = {f"{PRIOR}.folder": str(folder), f"{PRIOR}.num_images": 4}
    result, _ = run(make_config("lora", **{"model.path": "mini-sd3"}, **prior, checkpoint_every=2))
    root = result.folder.root
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    (root / "README.md").unlink()
    keys = {f"{PRIOR}.folder".replace(".", "__"): str(moved)}
    assert resume(root, **keys) is not None
    shutil.copy(moved / "0.png", moved / "1.png")
    (root / "README.md").unlink()
    with pytest.raises(UserError, match=f"{PRIOR}.folder: the pictures in .* are not those"):
        resume(root)


@pytest.mark.slow
def test_a_signal_while_class_images_are_drawn_keeps_those_that_are_finished(
    make_config: MakeConfig, drawn: dict[str, object], photos: Path, tmp_path: Path
) -> None:
    draw = Sampler.draw

    def signalled(sampler: Sampler, seeds: list[int]) -> object:
        if seeds[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(sampler, seeds)

    def before() -> None:
        Sampler.draw = signalled
        # What started the tests may have it ignored, as a shell has of what runs in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    settings = [word for key, value in drawn.items() for word in ("--set", f"{key}={value}")]
    command = ["train", "--recipe", "lora", "--photos", str(photos), "--class-noun", "robot"]
    command += ["--output", str(tmp_path / "run"), "--no-samples", "--steps", "2", *settings]
    code, said = in_child([*command, "--device", "cpu"], before)
    assert code == 130, said
    assert "SIGINT: ended while class images were drawn; those that are finished are kept" in said
    assert not (tmp_path / "run").exists()
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 2
    _, said = run(make_config("lora", **drawn, photos__resolution=None))
    assert "1 drawn, 2 reused" in said


@pytest.mark.slow
def test_a_set_of_two_stages_is_found_and_encoded_once(
    make_config: MakeConfig, drawn: dict[str, object]
) -> None:
    first = make_config("lora", **drawn)
    second = first.stage[0].model_copy(
        update={
            "objectives": first.stage[0].objectives.model_copy(
                update={
                    "prior_preservation": first.stage[0].objectives.prior_preservation.model_copy(
                        update={"weight": 0.5}
                    )
                }
            )
        }
    )
    plain = second.model_copy(
        update={"objectives": second.objectives.model_copy(update={"prior_preservation": None})}
    )
    result, said = run(first.model_copy(update={"stage": [first.stage[0], plain, second]}))
    assert said.count("class images: ") == 1
    assert result.class_images.keys() == {0, 2}
    assert result.class_images[0] is result.class_images[2]
    rows = [json.loads(line) for line in result.folder.metrics.read_text().splitlines()]
    noted = ["prior_preservation" in row and row["prior_preservation"] is not None for row in rows]
    assert noted == [True] * 6 + [False] * 6 + [True] * 6


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_replayed_steps_equal_eager_ones(
    make_config: MakeConfig, tmp_path: Path, accumulation: int
) -> None:
    folder = write_class_pictures(tmp_path / "own")
    settings = {"stage.0.gradient_accumulation": accumulation, "stage.0.batch_size": 2}
    eager, replayed = (class_stage(make_config, folder, "mini-sd3", **settings) for _ in range(2))
    run_stage(EagerRunner([eager.step]), [eager.step], 6)
    recorder = ReplayRecorder([*replayed.step.generators.values()])
    run_stage(GraphRunner([replayed.step], recorder), [replayed.step], 6)
    assert are_equal(state_of(eager.step), state_of(replayed.step))
    states = [stage.step.class_generator.get_state() for stage in (eager, replayed)]
    assert torch.equal(*states)


def test_a_captured_run_registers_both_generators(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[torch.Generator]] = []
    monkeypatch.setattr(
        runners,
        "CudaRecorder",
        lambda device, generators: given.append(generators) or ReplayRecorder(generators),
    )
    stage = class_stage(make_config, write_class_pictures(tmp_path / "own"), "mini-sd3")
    runners.make_runner("graph", [stage.step])
    assert given == [[stage.step.generator, stage.step.class_generator]]


def test_class_prompts_have_gradients_where_text_is_trained(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """With the photos' half at weight 0 all of the text encoders' gradient is the class half's."""
    settings = {
        "stage.0.trainables.text_encoder_lora.rank": 2,
        "stage.0.objectives.denoising.weight": 0.0,
    }
    folder = write_class_pictures(tmp_path / "own")
    stage = class_stage(make_config, folder, "mini-sd3", torch.float64, **settings)
    accumulate_gradients(stage.step)
    text = stage.trainables.text_encoder_lora
    assert text.arena.grad.norm() > 0
    # Where text stands still the prompt is read once.
    still = class_stage(make_config, folder, "mini-sd3", torch.float64)
    assert still.step.class_prompts.live is None


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["mini-sdxl", "mini-sd3"])
def test_captured_steps_draw_as_eager_ones(
    make_config: MakeConfig, tmp_path: Path, model: str
) -> None:
    """The same photos, class images, timesteps and noise; what is computed may round apart."""
    folder = write_class_pictures(tmp_path / "own")
    settings = {"model.device": "cuda", "stage.0.batch_size": 2}
    eager, captured = (class_stage(make_config, folder, model, **settings) for _ in range(2))
    run_stage(EagerRunner([eager.step]), [eager.step], 6)
    run_stage(runners.make_runner("graph", [captured.step]), [captured.step], 6)
    for name, generator in eager.step.generators.items():
        assert torch.equal(generator.get_state(), captured.step.generators[name].get_state())
    assert torch.equal(eager.step.samples, captured.step.samples)
    losses = [stage.step.ring.rows[:6] for stage in (eager, captured)]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02, equal_nan=True)
