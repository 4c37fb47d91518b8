"""Steps and runs that train peft's adapters: engines, anchor, base pass, resume, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.families.loading import load_family
from fastppt.trainables.peft_files import adapter_files, load_adapter
from fastppt.trainables.peft_tuners import PeftAdapters
from fastppt.trainables.trainables import Trainables
from fastppt.training.batch import draw, make_batch
from fastppt.training.compiling import check_gradients, compile_blocks
from fastppt.training.loop import train
from fastppt.training.runners import EagerRunner, GraphRunner, make_runner
from fastppt.training.step import Step, accumulate_gradients, base_pass, run_step
from tests.training.replay import ReplayRecorder
from tests.training.runs import contents, resume_copy
from tests.training.stages import are_equal, build_stages, run_stage, state_of
from tests.training.weight_steps import APT, DENOISING, Table, stage, weights_config

KINDS: dict[str, Table] = {
    "oft": {"block_size": 8, "constraint": 1e-4},
    "dora": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 2},
    "boft": {"block_size": 4, "factors": 2},
}
MODELS = ("mini-sd", "mini-sdxl", "mini-sd3")


def slow_but(fast: tuple[str, str] | None) -> pytest.MarkDecorator:
    """Every kind with every model; one of these, or none, is not slow."""
    cases = [(kind, model) for kind in KINDS for model in MODELS]
    return pytest.mark.parametrize(
        ("kind", "model"),
        [pytest.param(*case, marks=[] if case == fast else pytest.mark.slow) for case in cases],
    )


def config_of(
    photos: Path,
    kind: str,
    model: str = "mini-sdxl",
    objectives: Table = DENOISING,
    stage_settings: Table | None = None,
    **settings: object,
) -> RunConfig:
    trainables = {kind: {"learning_rate": 1e-3} | KINDS[kind]}
    stages = [stage(trainables, objectives, **(stage_settings or {}))]
    return weights_config(photos, stages, model, **settings)


def prepared(config: RunConfig, dtype: torch.dtype | None = None) -> tuple[list[Step], Trainables]:
    return next(build_stages(config, dtype))


def stir(trainables: Trainables, distance: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(3)
    for tensor in adapters_of(trainables).tensors.values():
        tensor.add_(distance * torch.randn(tensor.shape, generator=generator))


def adapters_of(trainables: Trainables) -> PeftAdapters:
    assert isinstance(trainables.network, PeftAdapters)
    return trainables.network


def gradients_of(trainables: Trainables) -> Tensor:
    return adapters_of(trainables).arena.grad.clone()


@slow_but(("oft", "mini-sd3"))
def test_replayed_steps_equal_eager_ones(photos: Path, kind: str, model: str) -> None:
    objectives = APT | {"anchor": {"weight": 0.1}}
    config = config_of(photos, kind, model, objectives, model__precision="bf16")
    states = []
    for replayed in (False, True):
        steps, trainables = prepared(config)
        stir(trainables)
        start = state_of(steps[0])
        recorder = ReplayRecorder([steps[0].generator])
        run_stage(GraphRunner(steps, recorder) if replayed else EagerRunner(steps), steps, 3)
        states.append(state_of(steps[0]))
        assert not are_equal(start, states[-1])
    assert are_equal(*states)


@slow_but(None)
def test_checkpointed_blocks_give_the_same_gradients(photos: Path, kind: str, model: str) -> None:
    found = []
    for checkpointing in (False, True):
        config = config_of(photos, kind, model, APT, gradient_checkpointing=checkpointing)
        (step,), trainables = prepared(config, torch.float64)
        stir(trainables)
        accumulate_gradients(step)
        found.append(gradients_of(trainables))
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() <= 1e-12 * found[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model"), [(kind, "mini-sdxl") for kind in KINDS])
def test_compiled_blocks_give_the_same_gradients(photos: Path, kind: str, model: str) -> None:
    found = []
    for compiled in (False, True):
        (step,), trainables = prepared(config_of(photos, kind, model, APT), torch.float64)
        stir(trainables)
        if compiled:
            compile_blocks(step.family)
        accumulate_gradients(step)
        found.append(gradients_of(trainables))
    assert (found[0] - found[1]).norm() <= 1e-9 * found[0].norm()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "loha" else pytest.mark.slow) for kind in KINDS]
)
def test_check_of_compiled_gradients_sees_every_value(
    photos: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start half of the values have no gradient; the check puts them where all have one."""
    (step,), trainables = prepared(config_of(photos, kind, "mini-sd"))
    before = adapters_of(trainables).arena.flat.detach().clone()
    tensors = adapters_of(trainables).arena.tensors
    passes: list[str] = []
    wrong = [0]

    def second_is_wrong(step: Step, *, with_base: bool) -> None:
        accumulate_gradients(step, with_base=with_base)
        if passes:
            tensors[wrong[0]].grad.mul_(2)
        passes.append("one more")

    monkeypatch.setattr("fastppt.training.compiling.accumulate_gradients", second_is_wrong)
    for wrong[0] in range(len(next(iter(adapters_of(trainables).values.values())))):
        passes.clear()
        with pytest.raises(UserError, match=r"1 of .* trained tensors differ"):
            check_gradients([step], trainables)
    assert torch.equal(adapters_of(trainables).arena.flat, before)


@pytest.mark.parametrize(("kind", "to"), [("loha", "start"), ("loha", "zero"), ("boft", "start")])
def test_anchor_holds_the_values_themselves(photos: Path, kind: str, to: str) -> None:
    weight = 0.7
    objectives = {"denoising": {"weight": 0.0}, "anchor": {"weight": weight, "to": to}}
    (step,), trainables = prepared(config_of(photos, kind, "mini-sd", objectives), torch.float64)
    arena = adapters_of(trainables).arena
    place = arena.flat.detach().clone() if to == "start" else torch.zeros_like(arena.flat)
    stir(trainables)
    distance = arena.flat.detach() - place
    run_step(step)
    expected = weight * float(distance.square().sum())
    assert float(step.optimizer.penalty) == pytest.approx(expected, rel=1e-9)
    assert expected > 0


@pytest.mark.parametrize("kind", ["dora", "boft"])
def test_scales_are_not_held_at_zero(photos: Path, kind: str) -> None:
    with pytest.raises(UserError, match=rf"{kind} with its scales at zero is no adapter"):
        config_of(photos, kind, objectives={"denoising": {}, "anchor": {"to": "zero"}})


def test_base_pass_does_not_see_what_was_trained(photos: Path) -> None:
    (step,), trainables = prepared(config_of(photos, "dora", objectives=APT))
    batch = make_batch(step, draw(step))
    before = base_pass(step, batch).clone()
    stir(trainables)
    assert torch.equal(base_pass(step, batch), before)
    assert adapters_of(trainables).switch.enabled


def lengths(trainables: Trainables) -> list[tuple[Tensor, float]]:
    """||Q|| of each block, and its limit."""
    found = []
    for values in adapters_of(trainables).values.values():
        triangles = values["oft_R.weight"].detach()
        limit = 1e-4 * 8**2 / len(triangles) ** 0.5
        found.append((2**0.5 * triangles.norm(dim=1), limit))
    return found


def test_rotations_are_held_after_every_step(photos: Path) -> None:
    (step,), trainables = prepared(config_of(photos, "oft"))
    for number in range(4):
        step.learning_rate.fill_(1e-3)
        run_step(step, number)
        assert all((norms <= limit * (1 + 1e-5)).all() for norms, limit in lengths(trainables))
    assert any((norms > 0.99 * limit).any() for norms, limit in lengths(trainables))


def test_skipped_steps_and_frozen_stages_leave_rotations_alone(photos: Path) -> None:
    word = {"tokens": {}}
    oft = {"oft": dict(KINDS["oft"])}
    stages = [stage(oft | word, steps=2), stage(word, steps=2)]
    config = weights_config(photos, stages, "mini-sd", prompts__token="<v>")
    made = build_stages(config)
    (first,), trainables = next(made)
    stir(trainables, 1.0)
    flat = adapters_of(trainables).arena.flat
    far = flat.detach().clone()
    first.losses.fill_(torch.nan)
    run_step(first)
    assert torch.equal(flat, far)
    (second,), _ = next(made)
    run_step(second)
    assert torch.equal(flat, far)
    assert second.held_rotations is None


@slow_but(("dora", "mini-sdxl"))
def test_a_resumed_run_equals_the_uninterrupted_one(
    photos: Path, kind: str, model: str, tmp_path: Path
) -> None:
    objectives = APT | {"anchor": {"weight": 0.1}}
    settings: dict[str, Any] = {"model__precision": "bf16", "checkpoint_every": 3, "name": "x"}
    config = config_of(
        photos, kind, model, objectives, {"steps": 5}, output=str(tmp_path / "out"), **settings
    )
    whole = train(config, Console(quiet=True)).folder.root
    assert contents(resume_copy(whole, 3, tmp_path / "copy")) == contents(whole)


@slow_but(("lokr", "mini-sd3"))
def test_a_stock_network_with_the_files_predicts_the_same(
    photos: Path, kind: str, model: str, tmp_path: Path
) -> None:
    config = config_of(photos, kind, model)
    (step,), trainables = prepared(config, torch.float64)
    stir(trainables)
    for name, content in adapter_files(adapters_of(trainables), torch.float64, {}).items():
        (tmp_path / name).write_bytes(content)
    stock = load_family(config.model, dtype=torch.float64)
    batch = make_batch(step, draw(step))
    asked = (batch.noisy, batch.timesteps, step.prompts.subject(batch.photos), batch.sizes)
    ours, base = step.family.predict(*asked), stock.predict(*asked)
    if kind == "boft":
        load_adapter(stock.network, tmp_path)
    else:
        peft.PeftModel.from_pretrained(stock.network, str(tmp_path))
    moved = (ours - base).norm()
    assert moved > 1e-4 * base.norm()
    assert (ours - stock.predict(*asked)).norm() <= 1e-7 * moved


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_equal_eager_ones_on_a_gpu(photos: Path, kind: str) -> None:
    """One capture, replayed: nothing in it may look at the host, nor the inverse of OFT."""
    objectives = APT | {"anchor": {"weight": 0.1}}
    config = config_of(photos, kind, "mini-sdxl", objectives, model__device="cuda")
    drifts = []
    for engine in ("eager", "graph"):
        steps, trainables = prepared(config)
        stir(trainables)
        start = adapters_of(trainables).arena.flat.detach().clone()
        run_stage(make_runner(engine, steps), steps, 5)
        drifts.append(adapters_of(trainables).arena.flat.detach() - start)
    assert drifts[0].norm() > 0
    # Attention's backward adds up in any order.
    assert (drifts[0] - drifts[1]).norm() <= 1e-2 * drifts[0].norm()
