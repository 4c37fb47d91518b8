"""Stages: what moves in one and stands still in another, and what one hands on to the next."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.data.prompts import still_banks
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.training import engine, loop, runners
from fastppt.training.compiling import check_gradients
from fastppt.training.run import TrainingRun
from fastppt.training.step import Step, accumulate_gradients, run_step
from tests.training.replay import ReplayRecorder
from tests.training.runs import contents, resume_copy
from tests.training.stages import build_stages

MakeConfig = Callable[..., RunConfig]

TOKENS = """
[[stage]]
steps = 3
[stage.trainables.tokens]
init = "rare"
learning_rate = 5e-3
[stage.objectives.denoising]
"""
TEXT = """
[[stage]]
steps = 2
[stage.trainables.text_encoder_lora]
rank = 2
learning_rate = 1e-3
[stage.trainables.tokens]
init = "rare"
learning_rate = 5e-3
[stage.objectives.denoising]
"""
LORA = """
[[stage]]
steps = 4
checkpoint_every = 2
[stage.trainables.lora]
rank = 4
learning_rate = 1e-3
[stage.objectives.denoising]
[stage.objectives.anchor]
form = "raw"
"""


def run_of(photos: Path, folder: Path, *stages: str, **settings: object) -> RunConfig:
    """The configuration of a run of the given stages."""
    file = folder / "run.toml"
    file.write_text("".join(stages))
    given: dict[str, Any] = {
        "model.path": "mini-sd",
        "model.device": "cpu",
        "photos.folder": str(photos),
        "prompts.class_noun": "robot",
        "prompts.token": "<rare>",
        "samples.enabled": False,
        "log_every": 2,
        "name": "x",
        "output": str(folder / "out"),
    }
    return build_config(file=file, settings=list((given | settings).items()))


FULL = """
[[stage]]
steps = 3
ema_decay = 0.5
[stage.trainables.full]
learning_rate = 1e-4
[stage.objectives.denoising]
[stage.objectives.anchor]
form = "raw"
"""


@pytest.fixture
def make_stages(photos: Path, tmp_path: Path) -> MakeConfig:
    return partial(run_of, photos, tmp_path)


def train(config: RunConfig) -> Path:
    return loop.train(config, Console(quiet=True)).folder.root


def weights_of(family: Family) -> dict[str, Tensor]:
    """Every parameter and buffer of the network and of the text encoders."""
    modules = {"network": family.network, **family.text.clips}
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in modules.items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def states(root: Path) -> dict[int, dict[str, Tensor]]:
    """The states of a run's checkpoints, by step."""
    return {
        int(path.name.removeprefix("step-")): load_file(path / "state.safetensors")
        for path in (root / "checkpoints").iterdir()
    }


def test_a_stage_changes_what_it_trains_and_nothing_else(
    make_stages: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word alone, then adapters alone: the course of the rare-token method."""
    families: list[Family] = []
    before: dict[str, Tensor] = {}

    def load(*args: Any) -> Family:
        families.append(load_family(*args))
        before.update(weights_of(families[-1]))
        return families[-1]

    monkeypatch.setattr(loop, "load_family", load)
    root = train(make_stages(TOKENS, LORA, checkpoint_every=1))
    found = states(root)
    words = {step: state["tokens/values"] for step, state in found.items()}
    adapters = {step: state["lora/values"] for step, state in found.items()}
    for step in (2, 3):
        assert not torch.equal(words[step], words[step - 1])
        assert torch.equal(adapters[step], adapters[1])
    for step in (4, 5, 6, 7):
        assert torch.equal(words[step], words[3])
        assert not torch.equal(adapters[step], adapters[step - 1])
    after = weights_of(families[0])
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [0, 0, 0, 1, 1, 1, 1]
    # The rate is that of what the stage trains.
    rates = [row["learning_rate"] for row in rows]
    assert rates == pytest.approx([5e-3] * 3 + [1e-3] * 4)
    # Held to where the stage began: new adapters are not at zero.
    assert rows[3]["anchor"] == 0 < rows[4]["anchor"]


@pytest.fixture(scope="module")
def encoded_run(
    photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[int, bool]]]:
    """A finished run of a word, then adapters; and when text was encoded: stage, with gradients."""
    calls: list[tuple[int, bool]] = []
    begin = TrainingRun.begin

    def counted_begin(run: TrainingRun) -> None:
        encode = run.family.encode_ids

        def encode_ids(*args: Any) -> Any:
            calls.append((run.stage, torch.is_grad_enabled()))
            return encode(*args)

        run.family.encode_ids = encode_ids
        begin(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "begin", counted_begin)
        root = train(run_of(photos, tmp_path_factory.mktemp("encoded"), TOKENS, LORA))
    return root, calls


def test_text_that_stands_still_is_encoded_once_and_not_in_steps(
    encoded_run: tuple[Path, list[tuple[int, bool]]],
) -> None:
    _, calls = encoded_run
    assert calls == [(0, True)] * 3 + [(1, False)]


def test_checkpoints_of_a_stage_are_counted_from_its_start(
    encoded_run: tuple[Path, list[tuple[int, bool]]],
) -> None:
    root, _ = encoded_run
    names = sorted(path.name for path in (root / "checkpoints").iterdir())
    assert names == ["step-000005", "step-000007"]
    manifests = [
        json.loads((root / "checkpoints" / name / "manifest.json").read_text()) for name in names
    ]
    assert [(one["stage"], one["number"]) for one in manifests] == [(1, 2), (1, 4)]


@pytest.mark.parametrize(
    ("stages", "steps"),
    [
        ((TOKENS, LORA), (3, 4)),
        pytest.param((TEXT, LORA, TEXT), (1, 2, 4, 6, 7), marks=pytest.mark.slow),
        pytest.param((TOKENS, FULL, TEXT), (2, 3, 4, 6, 7), marks=pytest.mark.slow),
    ],
    ids=["tokens_lora", "text_lora_text", "tokens_full_text"],
)
def test_a_run_whose_stages_train_different_things_is_resumed_within_and_between_them(
    make_stages: MakeConfig, tmp_path: Path, stages: tuple[str, ...], steps: tuple[int, ...]
) -> None:
    whole = train(make_stages(*stages, checkpoint_every=1))
    for step in steps:
        assert contents(resume_copy(whole, step, tmp_path / str(step))) == contents(whole)


@pytest.mark.slow
def test_a_replayed_run_of_stages_equals_the_eager_one(
    make_stages: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "why_not_capture", lambda device: None)
    monkeypatch.setattr(runners, "CudaRecorder", lambda device, given: ReplayRecorder(given))
    stages = (TEXT, LORA, TEXT)
    eager = train(make_stages(*stages, output=str(tmp_path / "eager"), checkpoint_every=1))
    replayed = train(
        make_stages(*stages, output=str(tmp_path / "graph"), checkpoint_every=1, engine="graph")
    )
    assert contents(replayed) == contents(eager)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["eager", "graph"])
def test_a_deterministic_run_of_stages_on_a_gpu_is_resumed_bit_for_bit(
    make_stages: MakeConfig, tmp_path: Path, name: str
) -> None:
    settings = {"model.device": "cuda", "model.precision": "bf16", "engine": name}
    settings |= {"deterministic": True, "checkpoint_every": 1}
    for stages in ((TOKENS, FULL, TEXT), (TEXT, LORA)):
        folder = tmp_path / str(len(stages))
        whole = train(make_stages(*stages, **settings, output=str(folder / "whole")))
        for step in (1, 2, 3, 4):
            assert contents(resume_copy(whole, step, folder / str(step))) == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "moving"), [("mini-sd", "full"), ("mini-sdxl", "lora")])
def test_rare_token_changes_one_row_and_then_the_network_alone(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, moving: str
) -> None:
    """The recipe, shorter: in the second stage the whole network, or adapters of it."""
    seen: list[dict[str, Tensor]] = []
    build, run_stage = TrainingRun.build_steps, TrainingRun.run_stage

    def note(run: TrainingRun) -> None:
        trained = {name: arena.flat.clone() for name, arena in run.trainables.arenas.items()}
        assert run.trainables.tokens is not None
        rows = {f"rows/{name}": rows for name, rows in run.trainables.tokens.rows.items()}
        assert all(len(one) == 1 for one in rows.values())
        seen.append(weights_of(run.family) | trained)

    def noting_build(run: TrainingRun, index: int) -> None:
        build(run, index)
        note(run)

    def noting_run_stage(run: TrainingRun, *args: Any) -> None:
        run_stage(run, *args)
        note(run)

    monkeypatch.setattr(TrainingRun, "build_steps", noting_build)
    monkeypatch.setattr(TrainingRun, "run_stage", noting_run_stage)
    settings = {
        "model.path": model,
        "model.device": "cpu",
        "photos.folder": str(photos),
        "prompts.class_noun": "robot",
        "samples.enabled": False,
        "stage.0.steps": 2,
        "stage.1.steps": 4,
        "stage.1.checkpoint_every": 2,
        "output": str(tmp_path / "out"),
    }
    root = train(build_config("rare-token", settings=list(settings.items())))
    start, first_end, second_start, second_end = seen
    assert {name for name in start if not torch.equal(start[name], first_end[name])} == {"tokens"}
    assert all(torch.equal(second_start[name], value) for name, value in first_end.items())
    changed = {name for name, was in second_start.items() if not torch.equal(was, second_end[name])}
    assert moving in changed
    assert all(name == moving or name.startswith("network.") for name in changed)
    assert (len(changed) > 1) == (moving == "full")
    names = sorted(path.name for path in (root / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006"]


def test_still_prompts_are_what_the_trained_encoders_say_and_class_prompts_the_base(
    make_stages: MakeConfig,
) -> None:
    stages = build_stages(make_stages(TEXT, LORA), torch.float64)
    (first,), _ = next(stages)
    photos = torch.arange(first.latents.num_photos)
    untouched = first.prompts.plain_class(photos).tokens.clone()
    for _ in range(2):
        move(first)
    live = first.prompts.subject(photos).tokens.detach()
    (second,), _ = next(stages)
    still = second.prompts.subject(photos).tokens
    assert second.prompts.live is None and not still.requires_grad
    torch.testing.assert_close(still, live, rtol=1e-12, atol=1e-12)
    assert torch.equal(second.prompts.plain_class(photos).tokens, untouched)
    # And both have moved.
    assert not torch.allclose(still, second.prompts.embeddings[second.prompts.subject_rows].tokens)


def test_text_that_never_moves_keeps_its_bank(make_stages: MakeConfig) -> None:
    (step,), _ = next(build_stages(make_stages(LORA)))
    assert still_banks([step.prompts]) == [step.prompts] and step.prompts.moved is None


@pytest.mark.parametrize("later", [LORA, FULL], ids=["lora", "full"])
def test_no_gradient_of_the_model_is_computed_where_tokens_move_alone(
    make_stages: MakeConfig, later: str
) -> None:
    (step,), trainables = next(build_stages(make_stages(TOKENS, later)))
    accumulate_gradients(step)
    modules = (step.family.network, *step.family.text.clips.values())
    parameters = [one for module in modules for one in module.parameters()]
    assert not any(one.requires_grad for one in parameters)
    assert not any(one.grad is not None and one.grad.any() for one in parameters)
    gradients = {name: arena.grad for name, arena in trainables.arenas.items()}
    assert {name for name, gradient in gradients.items() if gradient.any()} == {"tokens"}
    assert [*step.learning_rates] == ["tokens"]
    assert len(step.optimizer.param_groups) == 1


def test_frozen_adapters_get_no_gradient_and_stay_in_the_network(make_stages: MakeConfig) -> None:
    stages = build_stages(make_stages(LORA, TOKENS))
    (first,), trainables = next(stages)
    move(first)
    (second,), _ = next(stages)
    lora = trainables.lora
    assert lora is not None
    trained = lora.arena.flat.detach().clone()
    with_adapters = prediction(second)
    move(second)
    assert torch.equal(lora.arena.flat, trained) and not lora.arena.grad.any()
    with lora.base():
        assert not torch.equal(prediction(second), with_adapters)


def test_a_check_of_gradients_leaves_adapters_of_a_later_stage_as_they_are(
    make_stages: MakeConfig,
) -> None:
    steps, trainables = next(build_stages(make_stages(TOKENS, LORA)))
    assert trainables.lora is not None
    before = trainables.lora.arena.flat.detach().clone()
    check_gradients(steps, trainables)
    assert torch.equal(trainables.lora.arena.flat, before)


def move(step: Step) -> None:
    for rate in step.learning_rates.values():
        rate.fill_(1e-2)
    run_step(step)


@torch.no_grad()
def prediction(step: Step) -> Tensor:
    photos = torch.zeros(1, dtype=torch.int64)
    latents = torch.ones(1, *step.latents.latent_shape)
    sizes = step.prompts.sizes[photos]
    return step.family.predict(latents, photos + 500, step.prompts.plain_class(photos), sizes)
