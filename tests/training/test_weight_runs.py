"""Runs that train the network's own weights, by every engine, and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastppt.errors import UserError
from fastppt.mini import build_mini
from fastppt.training.compiling import check_gradients
from fastppt.training.loop import train
from fastppt.training.run import TrainingRun
from fastppt.training.runners import EagerRunner, GraphRunner, StageRunner, make_runner
from fastppt.training.step import accumulate_gradients, run_step
from fastppt_kernels.testing import ForbidHostReads
from tests.training.objective_steps import compile_blocks_by, metrics_of
from tests.training.replay import ReplayRecorder
from tests.training.runs import contents, resume, resume_copy
from tests.training.stages import are_equal, state_of
from tests.training.test_graph_gpu import _repeatable  # noqa: F401
from tests.training.weight_steps import (
    APT,
    DENOISING,
    FULL,
    WORD,
    Table,
    anchored,
    prepare,
    stage,
    stir,
    weights_config,
)

SLOW = pytest.mark.slow


# Engines.


def take(runner: StageRunner, num_steps: int) -> None:
    for number in range(num_steps):
        runner.run(0, number)


KINDS = [
    ("mini-sd3", FULL, APT | {"anchor": {"weight": 0.1}}, {"dtype": torch.bfloat16}),
    pytest.param("mini-sdxl", FULL, APT, {"stage__base_every": 2}, marks=SLOW),
    pytest.param("mini-sd", FULL, DENOISING, {"dtype": torch.float16}, marks=SLOW),
    pytest.param("mini-sd", WORD, APT, {"stage__gradient_accumulation": 2}, marks=SLOW),
    pytest.param("mini-sdxl", FULL, APT, {"gradient_checkpointing": True}, marks=SLOW),
    pytest.param(
        "mini-sd3",
        {"full": {"learning_rate": 1e-3, "master_weights": False}},
        DENOISING | {"anchor": {"weight": 0.1, "storage": "host"}},
        {"dtype": torch.bfloat16},
        marks=SLOW,
    ),
]


@pytest.mark.parametrize(("model", "trainables", "objectives", "settings"), KINDS)
def test_replayed_steps_equal_eager_ones(
    photos: Path, model: str, trainables: Table, objectives: Table, settings: dict[str, object]
) -> None:
    ends = []
    for replayed in (False, True):
        step, _ = prepare(photos, trainables, objectives, model, **settings)
        start = state_of(step)
        runner = (
            GraphRunner([step], ReplayRecorder([step.generator]))
            if replayed
            else EagerRunner([step])
        )
        take(runner, 4)
        ends.append(state_of(step))
        assert not are_equal(start, ends[-1])
    assert are_equal(*ends)


@pytest.mark.gpu
@pytest.mark.usefixtures("_repeatable")
@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sd3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("master_weights", "objectives"),
    [(True, APT | anchored()), (False, anchored(storage="host"))],
    ids=["base_pass", "host_anchor"],
)
def test_captured_steps_equal_eager_ones_on_a_gpu(
    photos: Path, model: str, dtype: torch.dtype, master_weights: bool, objectives: Table
) -> None:
    moving = {"full": {"learning_rate": 1e-3, "master_weights": master_weights}}
    ends = []
    for engine in ("eager", "eager", "graph"):
        settings = {"model.device": "cuda", "stage__base_every": 2 if master_weights else 1}
        step, _ = prepare(photos, moving, objectives, model, dtype, **settings)
        take(make_runner(engine, [step]), 6)
        ends.append(state_of(step))
    assert are_equal(ends[0], ends[1]), "eager steps do not repeat, so replayed ones cannot"
    assert are_equal(ends[0], ends[2])


@pytest.mark.slow
def test_compiled_blocks_give_the_gradients_of_eager_ones(photos: Path) -> None:
    """With the base's weights in their place for one pass, and the trained ones for the next."""
    step, trainables = prepare(photos, FULL, APT, "mini-sd3", torch.float64)
    compile_blocks_by("aot_eager", step.family)
    stir(trainables)
    check_gradients([step], trainables)
    for arena in trainables.arenas.values():
        arena.grad.zero_()
    state = step.generator.get_state()
    accumulate_gradients(step)
    compiled = trainables.network.arenas[""].grad.clone()
    other, others = prepare(photos, FULL, APT, "mini-sd3", torch.float64)
    stir(others)
    other.generator.set_state(state)
    accumulate_gradients(other)
    eager = others.network.arenas[""].grad
    assert (compiled - eager).abs().max() <= 1e-9 * eager.abs().max()


@pytest.mark.slow
def test_gradients_of_checkpointed_blocks_are_those_of_others(photos: Path) -> None:
    found = []
    for checkpointing in (False, True):
        step, trainables = prepare(
            photos, FULL, APT, "mini-sd3", torch.float64, gradient_checkpointing=checkpointing
        )
        stir(trainables)
        accumulate_gradients(step)
        found.append(trainables.network.arenas[""].grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-15)


def test_steps_make_no_host_read(photos: Path) -> None:
    step, _ = prepare(photos, WORD, APT | anchored(), "mini-sd3", torch.bfloat16)
    with ForbidHostReads():
        for number in range(3):
            run_step(step, number)
    assert metrics_of(step, 3)[-1]["grad_norm"] > 0


# Runs.


@pytest.mark.parametrize(
    ("model", "trainables", "objectives", "settings"),
    [
        ("mini-sd3", FULL, APT | anchored(), {"model.precision": "bf16"}),
        pytest.param("mini-sd", WORD, APT | anchored(), {"prompts.token": "<v>"}, marks=SLOW),
        pytest.param(
            "mini-sd3",
            {"full": {"learning_rate": 1e-3, "master_weights": False}},
            anchored(storage="host"),
            {"model.precision": "bf16"},
            marks=SLOW,
        ),
        pytest.param(
            "mini-sd",
            FULL,
            anchored(),
            {"model.precision": "fp16", "stage.0.optimizer.moments": "8bit"},
            marks=SLOW,
        ),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    photos: Path,
    tmp_path: Path,
    model: str,
    trainables: Table,
    objectives: Table,
    settings: dict[str, object],
) -> None:
    stages = [stage(trainables, objectives, steps=3)]
    settings = {"output": str(tmp_path / "out"), "checkpoint_every": 2, "name": "x"} | settings
    whole = train(weights_config(photos, stages, model, **settings), Console(quiet=True))
    expected = contents(whole.folder.root)
    state = load_file(whole.folder.checkpoint(2) / "state.safetensors")
    # The base's weights are loaded with the model.
    assert not any(name.endswith("/anchor") and "tokens" not in name for name in state)
    assert contents(resume_copy(whole.folder.root, 2, tmp_path / "resumed")) == expected


@pytest.mark.slow
def test_a_resumed_run_may_have_its_anchor_elsewhere(photos: Path, tmp_path: Path) -> None:
    settings = {"output": str(tmp_path / "out"), "checkpoint_every": 2, "name": "x"}
    stages = [stage(FULL, anchored(storage="host"), steps=3)]
    whole = train(weights_config(photos, stages, "mini-sd3", **settings), Console(quiet=True))
    moved = {"stage__0__objectives__anchor__storage": "device"}
    copy = resume_copy(whole.folder.root, 2, tmp_path / "copy", **moved)
    assert contents(copy) == contents(whole.folder.root)


def test_a_base_that_vanishes_while_it_is_trained_takes_nothing_with_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole pipeline needs the base's other parts; the run goes on when they are back."""
    base, away = tmp_path / "base", tmp_path / "away"
    build_mini("mini-sd3").save_pretrained(base)
    stages = [stage(FULL, steps=3, ema_decay=0.5)]

    def run(name: str) -> Path:
        settings = {"output": str(tmp_path / name), "name": "x"}
        config = weights_config(photos, stages, str(base), **settings)
        return train(config, Console(quiet=True)).folder.root

    expected = contents(run("whole"))
    go = TrainingRun.go

    def vanish(each: TrainingRun) -> None:
        go(each)
        base.rename(away)

    monkeypatch.setattr(TrainingRun, "go", vanish)
    kept = tmp_path / "cut" / "checkpoints" / "step-000003"
    with pytest.raises(UserError, match=rf"All is trained, and kept in {kept}; .* --resume"):
        run("cut")
    state = load_file(kept / "state.safetensors")
    assert not torch.equal(state["full/values"], state["full/average"])
    monkeypatch.undo()
    away.rename(base)
    assert resume(tmp_path / "cut") is not None
    finished = contents(tmp_path / "cut")
    assert {name: finished[name] for name in expected} == expected


@pytest.mark.slow
def test_weights_that_a_stage_does_not_train_stay_bit_for_bit(photos: Path, tmp_path: Path) -> None:
    """The second stage asks the base, which is the network as it was before the first."""
    stages = [stage(FULL, steps=3), stage({"tokens": {}}, APT, steps=3)]
    settings = {"output": str(tmp_path / "out"), "checkpoint_every": 1, "prompts.token": "<v>"}
    run = train(weights_config(photos, stages, "mini-sd", **settings), Console(quiet=True))
    states = [
        load_file(run.folder.checkpoint(number) / "state.safetensors") for number in (2, 3, 4, 5)
    ]
    values = [state["full/values"] for state in states]
    assert not torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2]) and torch.equal(values[2], values[3])
    assert contents(resume_copy(run.folder.root, 4, tmp_path / "resumed")) == contents(
        run.folder.root
    )
