"""Replayed steps are eager ones bit for bit; capturing changes nothing; changes are named."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.training import engine, graph, loop, runners
from fastppt.training.constants import MODULES_EVERY, Constants, constants_of
from fastppt.training.graph import CapturedFunction, Function, why_not_capture
from fastppt.training.loss_scale import GROWTH_INTERVAL
from fastppt.training.runners import EagerRunner, GraphRunner
from fastppt.training.snapshot import (
    Snapshot,
    named_tensors,
    tensors_without_update,
    written_tensors,
)
from fastppt.training.step import Step
from tests.training.replay import Recording, ReplayRecorder, storage_of
from tests.training.stages import WITH_BASE, are_equal, build_stage, run_stage, state_of
from tests.training.weight_steps import FULL, anchored, prepare

MakeConfig = Callable[..., RunConfig]


CONSISTENT = {"stage.0.objectives.direct_consistency.beta": 1000.0}


def graph_runner(steps: list[Step]) -> tuple[GraphRunner, ReplayRecorder]:
    recorder = ReplayRecorder([steps[0].generator])
    return GraphRunner(steps, recorder), recorder


def eager_and_replayed(
    make_config: MakeConfig, num_steps: int, model: str = "mini-sdxl", **settings: object
) -> tuple[list[Tensor], list[Tensor], ReplayRecorder]:
    """What a stage goes on with after its steps, by either engine."""
    steps, _ = build_stage(make_config, model, **settings)
    start = state_of(steps[0])
    run_stage(EagerRunner(steps), steps, num_steps)
    eager = state_of(steps[0])
    assert not are_equal(start, eager)
    steps, _ = build_stage(make_config, model, **settings)
    runner, recorder = graph_runner(steps)
    run_stage(runner, steps, num_steps)
    return eager, state_of(steps[0]), recorder


@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sd3"])
def test_twenty_replayed_steps_equal_eager_ones(make_config: MakeConfig, model: str) -> None:
    eager, replayed, recorder = eager_and_replayed(make_config, 20, model)
    assert are_equal(eager, replayed)
    assert len(recorder.recordings) == 1


@pytest.mark.parametrize(
    ("model", "settings", "num_graphs"),
    [
        ("mini-sdxl", {"stage.0.gradient_accumulation": 3, "stage.0.batch_size": 2}, 2),
        ("mini-sd", {"stage.0.schedule": "cosine", "stage.0.warmup_steps": 2}, 1),
        ("mini-sd3", {"model.precision": "fp16"}, 1),
        ("mini-sd3", {"model.precision": "bf16", "stage.0.objectives.anchor.form": "raw"}, 1),
        ("mini-sd3", {"stage.0.objectives.anchor.form": "decoupled"}, 1),
        ("mini-sd", {"gradient_checkpointing": True}, 1),
        ("mini-sdxl", WITH_BASE | {"stage.0.base_every": 2}, 2),
        ("mini-sd", WITH_BASE | {"stage.0.base_every": 3, "stage.0.gradient_accumulation": 2}, 3),
        ("mini-sd3", WITH_BASE | {"gradient_checkpointing": True}, 1),
        ("mini-sd", CONSISTENT | {"stage.0.objectives.denoising.weighting": "min_snr"}, 1),
    ],
)
def test_every_kind_of_step_is_replayed_as_it_runs(
    make_config: MakeConfig, model: str, settings: dict[str, object], num_graphs: int
) -> None:
    eager, replayed, recorder = eager_and_replayed(make_config, 4, model, **settings)
    assert are_equal(eager, replayed)
    assert len(recorder.recordings) == num_graphs


@pytest.mark.parametrize(("num_passes", "num_graphs"), [(1, 2), (2, 3)])
def test_each_bucket_has_its_graph_and_all_share_the_update(
    make_config: MakeConfig, photos: Path, tmp_path: Path, num_passes: int, num_graphs: int
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.glob("*"))):
        size = (96, 64) if number in (1, 4) else (72, 72)
        Image.open(path).convert("RGB").resize(size).save(folder / f"{number}.png")
    settings = {"photos.folder": str(folder), "photos.resolution": 64, "photos.buckets": True}
    settings["stage.0.gradient_accumulation"] = num_passes
    eager, replayed, recorder = eager_and_replayed(make_config, 5, **settings)
    assert are_equal(eager, replayed)
    assert len(recorder.recordings) == num_graphs


# What a capture must leave as it was.

FP16_WITH_BASE = WITH_BASE | {"model.precision": "fp16", "stage.0.gradient_accumulation": 2}
UPDATED = [
    {"model.precision": "fp16", "stage.0.gradient_accumulation": 2},
    {"stage.0.ema_decay": 0.9, "stage.0.objectives.anchor.form": "raw"},
]


def test_a_capture_leaves_everything_as_it_was(make_config: MakeConfig) -> None:
    steps, _ = build_stage(make_config, "mini-sd", **FP16_WITH_BASE)
    run_stage(EagerRunner(steps), steps, 2)
    # Gradients of a pass that the update has not taken yet.
    runners.accumulate_gradients(steps[0])
    before, runner = state_of(steps[0]), graph_runner(steps)[0]
    assert not runner.is_ready(0, 2)
    runner.prepare(0, 2)
    assert runner.is_ready(0, 2) and are_equal(before, state_of(steps[0]))


def test_everything_that_a_step_writes_is_in_the_snapshot(make_config: MakeConfig) -> None:
    steps, _ = build_stage(make_config, "mini-sd", **FP16_WITH_BASE)
    runner, recorder = graph_runner(steps)
    runner.prepare(0, 0)
    seen = {storage_of(t) for recording in recorder.recordings for t in recording.written}
    assert seen == {storage_of(tensor) for tensor in written_tensors(steps[0])}


@pytest.mark.slow
def test_what_is_left_out_of_the_snapshot_is_seen_to_change(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, _ = build_stage(make_config, "mini-sd3", **FP16_WITH_BASE)
    (step,) = steps
    run_stage(EagerRunner(steps), steps, 1)
    names = list(named_tensors(step))
    places = {tensor.data_ptr(): index for index, tensor in enumerate(written_tensors(step))}
    kept = [places[tensor.data_ptr()] for tensor in tensors_without_update(step)]
    # The generator is the last of the state.
    last = len(places)
    assert 0 < len(kept) < last
    for left_out in (*kept, last):
        # So that gradients are not zero, and the loss scale moves with the next good step.
        runners.accumulate_gradients(step)
        step.loss_scale.good_steps.fill_(GROWTH_INTERVAL - 1)
        before = state_of(step)

        def all_but_one(step: Step, left_out: int = left_out) -> list[Tensor]:
            chosen = [index for index in kept if index != left_out]
            return [written_tensors(step)[index] for index in chosen]

        monkeypatch.setattr(runners, "tensors_without_update", all_but_one)
        runner, recorder = graph_runner(steps)
        if left_out == last:
            recorder.generators = []
        runner.prepare(0, 0)
        # A loss that is not a number says nothing of the scale: it neither grows nor backs off.
        stays = left_out != last and names[left_out].startswith("loss_scale/")
        assert changed_places(before, step) == ([] if stays else [left_out])


def changed_places(before: list[Tensor], step: Step) -> list[int]:
    """Which tensors of a step's state are not as they were."""
    pairs = zip(before, state_of(step), strict=True)
    return [index for index, (a, b) in enumerate(pairs) if not are_equal([a], [b])]


@pytest.mark.parametrize("settings", UPDATED, ids=lambda settings: ", ".join(settings))
def test_what_is_trained_is_not_kept_aside_because_try_outs_do_not_change_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    steps, _ = build_stage(make_config, "mini-sd", **settings)
    (step,) = steps
    run_stage(EagerRunner(steps), steps, 2)
    before = state_of(step)
    kept = {tensor.data_ptr() for tensor in tensors_without_update(step)}
    trained = [i for i, tensor in enumerate(written_tensors(step)) if tensor.data_ptr() not in kept]
    names = [name for i, name in enumerate(named_tensors(step)) if i in trained]
    assert {name.partition("/")[2] for name in names} >= {"values", "exp_avg", "exp_avg_sq"}
    assert not any(before[i].isnan().any() for i in trained)
    graph_runner(steps)[0].prepare(0, 2)
    assert changed_places(before, step) == []
    # That they do is what the loss makes of them.
    monkeypatch.setattr(runners, "rule_out_updates", lambda step: None)
    graph_runner(steps)[0].prepare(0, 2)
    assert set(changed_places(before, step)) == set(trained)


@pytest.mark.parametrize(
    ("trainables", "objectives", "settings"),
    [
        (FULL, anchored(storage="host"), {"stage__optimizer": {"moments": "8bit"}}),
        ({"custom_diffusion": {}, "tokens": {"keep_norm": True}}, anchored(), {}),
        pytest.param(
            *(FULL, anchored(form="decoupled"), {"model.precision": "bf16"}), marks=pytest.mark.slow
        ),
        pytest.param(
            *({"full": {"master_weights": False}}, anchored(), {"model.precision": "bf16"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *({"oft": {"block_size": 8, "constraint": 1e-3}}, anchored(), {}),
            marks=pytest.mark.slow,
        ),
        pytest.param({"svdiff": {}}, anchored(), {"stage__ema_decay": 0.9}, marks=pytest.mark.slow),
    ],
    ids=["8 bit", "kept norms", "bf16", "bf16 alone", "oft", "svdiff"],
)
def test_a_try_out_changes_nothing_of_what_can_be_trained(
    photos: Path, trainables: Any, objectives: Any, settings: dict[str, Any]
) -> None:
    step, _ = prepare(photos, trainables, objectives, "mini-sd", **settings)
    run_stage(EagerRunner([step]), [step], 2)
    before = state_of(step)
    graph_runner([step])[0].prepare(0, 2)
    assert changed_places(before, step) == []
    run_stage(EagerRunner([step]), [step], 1)
    assert changed_places(before, step)


def test_tensors_of_zeros_are_put_back_without_a_copy() -> None:
    zeros, negative, gaps = torch.zeros(3), -torch.zeros(3), torch.zeros(4)[::2]
    tensors = [zeros, negative, gaps, torch.zeros(()), torch.zeros(2, dtype=torch.bool)]
    before = [tensor.clone() for tensor in tensors]
    snapshot = Snapshot(tensors, [])
    assert [value is None for _, value in snapshot._values] == [True, False, False, True, True]
    for tensor in tensors:
        tensor.fill_(1)
    snapshot.restore()
    assert are_equal(before, tensors)


def test_a_capture_that_fails_leaves_everything_as_it_was_and_says_why(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ReplayRecorder, function: Function) -> Callable[[], None]:
        function()
        raise RuntimeError("operation not permitted\nand a stack")

    monkeypatch.setattr(ReplayRecorder, "record", fail)
    steps, _ = build_stage(make_config)
    before, runner = state_of(steps[0]), graph_runner(steps)[0]
    message = r"cannot be captured \(operation not permitted\); pass --engine eager"
    with pytest.raises(UserError, match=message):
        runner.prepare(0, 0)
    assert are_equal(before, state_of(steps[0])) and not runner.is_ready(0, 0)


# What a capture holds for good.


def move(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def shrink(tensor: Tensor) -> None:
    tensor.data = tensor.data[:1]


def widen(tensor: Tensor) -> None:
    tensor.data = tensor.data.double()


def replace_in(owner: object, name: str, value: object) -> None:
    # Frozen ones too: this is a test of what nobody should do.
    vars(owner)[name] = value


CHANGES: dict[str, Callable[[Step], object]] = {
    "the address of latents.posteriors": lambda step: move(step.latents.posteriors),
    "the shape of latents.posteriors": lambda step: shrink(step.latents.posteriors),
    "the dtype of latents.posteriors": lambda step: widen(step.latents.posteriors),
    "the device of latents.posteriors": lambda step: replace_in(
        step.latents, "posteriors", step.latents.posteriors.to("meta")
    ),
    "the address of prompts.embeddings.tokens": lambda step: move(step.prompts.embeddings.tokens),
    "the address of learning_rates.lora": lambda step: move(step.learning_rate),
    "the address of ring.rows": lambda step: replace_in(step.ring, "rows", step.ring.rows.clone()),
    "trainables.parts.lora.switch.enabled": lambda step: replace_in(
        step.trainables.lora.switch, "enabled", False
    ),
    "stage.batch_size": lambda step: replace_in(step.stage, "batch_size", 2),
    "stage.gradient_accumulation": lambda step: replace_in(step.stage, "gradient_accumulation", 4),
    "stage.objectives.denoising.weight": lambda step: replace_in(
        step.stage.objectives.denoising, "weight", 2.0
    ),
    "optimizer.max_grad_norm": lambda step: replace_in(step.optimizer, "max_grad_norm", 2.0),
    "optimizer.param_groups.0.betas": lambda step: step.optimizer.param_groups[0].update(
        betas=(0.5, 0.9)
    ),
    "optimizer.param_groups.0.anchor_weight": lambda step: step.optimizer.param_groups[0].update(
        anchor_weight=2.0
    ),
    "optimizer.param_groups.0.params.0.grad": lambda step: step.optimizer.zero_grad(),
    "network.training": lambda step: step.family.network.train(),
}


@pytest.fixture
def captured(make_config: MakeConfig) -> tuple[Step, Constants]:
    steps, _ = build_stage(make_config, "mini-sd")
    return steps[0], constants_of(steps[0])


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_constant_is_named(captured: tuple[Step, Constants], what: str) -> None:
    step, constants = captured
    constants.check()
    CHANGES[what](step)
    with pytest.raises(UserError) as raised:
        constants.check()
    assert str(raised.value).startswith(f"engine graph: {what} was ")
    assert "pass --engine eager" in str(raised.value)


def test_a_working_copy_elsewhere_is_named(make_config: MakeConfig) -> None:
    (step,), _ = build_stage(make_config, "mini-sd3", **{"model.precision": "bf16"})
    constants = constants_of(step)
    constants.check()
    move(step.optimizer.param_groups[0]["working_copy"][0])
    with pytest.raises(UserError, match=r"the address of .*\.working_copy was"):
        constants.check()


def test_a_changed_constant_stops_the_replay(make_config: MakeConfig) -> None:
    steps, _ = build_stage(make_config)
    runner, _ = graph_runner(steps)
    runner.run(0, 0)
    steps[0].optimizer.param_groups[0]["eps"] = 1e-3
    before = state_of(steps[0])
    with pytest.raises(UserError, match=r"0\.eps was 1e-08 when .* and is 0\.001 now"):
        runner.run(0, 1)
    assert are_equal(before, state_of(steps[0]))


def test_weights_that_move_are_found_soon(captured: tuple[Step, Constants]) -> None:
    step, constants = captured
    name, weight = next(iter(step.family.network.named_parameters()))
    move(weight)
    for _ in range(MODULES_EVERY - 1):
        constants.check()
    with pytest.raises(UserError, match=f"the address of [A-Za-z0-9]+.{name} was"):
        constants.check()


def test_written_values_are_no_change(captured: tuple[Step, Constants]) -> None:
    step, constants = captured
    step.learning_rate.fill_(5.0)
    step.latents.posteriors.zero_()
    for _ in range(MODULES_EVERY):
        constants.check()


# The capture itself.


def captured_function(
    function: Function, tensors: list[Tensor], modules: dict[str, nn.Module] | None = None
) -> CapturedFunction:
    return CapturedFunction(
        function,
        ReplayRecorder([]),
        written=lambda: tensors,
        constants=lambda: Constants({}, modules),
    )


def test_a_host_read_in_a_capture_is_refused() -> None:
    total = torch.zeros(1)
    function = captured_function(lambda: total.add_(total.item()), [total])
    with pytest.raises(AssertionError, match="reads a tensor's value on the host"):
        function()


def test_a_recording_holds_what_python_said_when_it_was_made() -> None:
    """The recorder of these tests is as blind as a CUDA graph."""
    total, amount = torch.zeros(1), [1.0]
    function = captured_function(lambda: total.add_(torch.ones(1) * amount[0]), [total])
    function()
    amount[0] = 5.0
    function()
    assert total == 2.0


def test_a_recording_does_not_find_what_another_left_behind() -> None:
    recorder, left = ReplayRecorder([]), []
    first = recorder.record(lambda: left.append(torch.ones(1) * 2))
    total = torch.zeros(1)
    second = recorder.record(lambda: total.add_(left[-1]))
    total.zero_()
    first()
    second()
    assert total.isnan()


def test_writing_is_seen_through_views_and_lists() -> None:
    total, other = torch.zeros(4), torch.zeros(2)
    with Recording() as recording:
        total[1:3].mul_(2)
        torch._foreach_add_([other], 1.0)
        torch.ones(3).add_(1)
    assert {storage_of(t) for t in recording.written} == {storage_of(total), storage_of(other)}


def test_code_that_is_compiled_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    monkeypatch.setattr(graph, "_count_compiled", lambda: min(len(runs), 5))
    captured_function(lambda: runs.append(0), []).capture()
    # Five that compile, one that does not, and the capture.
    assert len(runs) == 7
    monkeypatch.setattr(graph, "_count_compiled", lambda: len(runs))
    with pytest.raises(UserError, match="still compiled anew in step 16"):
        captured_function(lambda: runs.append(0), []).capture()


def test_a_function_is_captured_once() -> None:
    runs: list[int] = []
    function = captured_function(lambda: runs.append(0), [])
    for _ in range(5):
        function()
    assert len(runs) == graph.TRY_OUTS + 1


# Whole runs.


@pytest.fixture
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "why_not_capture", lambda device: None)
    monkeypatch.setattr(runners, "CudaRecorder", lambda device, given: ReplayRecorder(given))


@pytest.mark.parametrize("more", [{}, WITH_BASE | {"photos.refresh_every": 2}])
def test_a_run_with_graphs_writes_what_an_eager_one_does(
    make_config: MakeConfig, tmp_path: Path, graphs_on_the_cpu: None, more: dict[str, object]
) -> None:
    files: dict[str, Any] = {}
    for name in ("eager", "graph"):
        settings = {"engine": name, "output": str(tmp_path / name), "stage.0.steps": 9, **more}
        result = loop.train(make_config(**settings), Console(file=StringIO()))
        files[name] = [
            (result.folder.root / file).read_bytes() for file in (DIFFUSERS_FILE, "metrics.jsonl")
        ]
        assert ("capture" in result.seconds) == (name == "graph")
    assert files["eager"] == files["graph"]


def test_the_card_counts_the_seconds_of_captures(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, graphs_on_the_cpu: None
) -> None:
    told: list[float] = []

    def model_card(*given: Any, **_: Any) -> str:
        told.append(given[-1])
        return ""

    monkeypatch.setattr(loop, "model_card", model_card)
    settings = {"engine": "graph", "stage.0.steps": 2}
    spent = loop.train(make_config(**settings), Console(file=StringIO())).seconds
    assert told == [spent["capture"] + spent["first step"] + spent["train"]]


def test_graphs_need_a_gpu_and_the_memory_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_capture(torch.device("cpu")) == "captures CUDA graphs, which need a GPU"
    assert why_not_capture(torch.device("cuda")) is None
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    reason = "needs torch's memory cache: unset PYTORCH_NO_CUDA_MEMORY_CACHING"
    assert why_not_capture(torch.device("cuda:1")) == reason


def test_auto_takes_graphs_where_they_can_be_captured(
    make_config: MakeConfig, graphs_on_the_cpu: None
) -> None:
    result = loop.train(make_config(**{"stage.0.steps": 2}), Console(file=StringIO()))
    assert result.config.engine == "graph"
