"""CUDA graphs: replayed steps are eager ones bit for bit, in one memory, with the same draws."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO

import pytest
import torch
from PIL import Image
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.trainables.trainables import Trainables
from fastppt.training import loop
from fastppt.training.compiling import check_gradients, compile_blocks
from fastppt.training.engine import fallback_note, resolve_engine
from fastppt.training.graph import CudaRecorder, Function, why_not_capture
from fastppt.training.runners import EagerRunner, GraphRunner, make_runner
from fastppt.training.step import Step
from tests.training.stages import WITH_BASE, are_equal, build_stage, run_stage, state_of

pytestmark = pytest.mark.gpu
repeatable = pytest.mark.usefixtures("_repeatable")

MakeConfig = Callable[..., RunConfig]
GPU = torch.device("cuda")


@pytest.fixture
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the attention and convolution gradients that repeat; a step of others never does.

    Not with ``warn_only``: flash attention's backward then adds up in any order, with a warning.
    """
    # torch asks for it before it calls cuBLAS deterministic.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def gpu_stage(make_config: MakeConfig, model: str = "mini-sdxl", **settings: object) -> list[Step]:
    steps, _ = build_stage(make_config, model, **{"model.device": "cuda", **settings})
    return steps


def check_engines_agree(
    make_config: MakeConfig, num_steps: int, model: str = "mini-sdxl", **settings: object
) -> None:
    """Run a stage by eager steps twice, and by replayed ones."""
    states = []
    for engine in ("eager", "eager", "graph"):
        steps = gpu_stage(make_config, model, **settings)
        run_stage(make_runner(engine, steps), steps, num_steps)
        states.append(state_of(steps[0]))
    assert are_equal(states[0], states[1]), "eager steps do not repeat, so replayed ones cannot"
    assert are_equal(states[0], states[2])


@repeatable
@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sd3"])
def test_twenty_replayed_steps_equal_eager_ones(make_config: MakeConfig, model: str) -> None:
    check_engines_agree(make_config, 20, model)


@repeatable
@pytest.mark.parametrize(
    "settings",
    [
        {"stage.0.gradient_accumulation": 3, "stage.0.batch_size": 2},
        {"stage.0.schedule": "cosine", "stage.0.warmup_steps": 2},
        {"model.precision": "fp16"},
        {"model.precision": "fp32", "stage.0.objectives.anchor.form": "decoupled"},
        {"gradient_checkpointing": True},
        WITH_BASE | {"stage.0.base_every": 2, "stage.0.gradient_accumulation": 2},
    ],
)
def test_every_kind_of_step_is_replayed_as_it_runs(
    make_config: MakeConfig, settings: dict[str, object]
) -> None:
    check_engines_agree(make_config, 6, **settings)


@repeatable
@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sd3"])
def test_steps_with_a_base_pass_are_replayed_in_every_family(
    make_config: MakeConfig, model: str
) -> None:
    check_engines_agree(make_config, 6, model, **WITH_BASE)


def test_a_capture_leaves_everything_as_it_was(make_config: MakeConfig) -> None:
    steps = gpu_stage(make_config, **WITH_BASE)
    run_stage(EagerRunner(steps), steps, 2)
    before, runner = state_of(steps[0]), make_runner("graph", steps)
    runner.prepare(0, 2)
    assert runner.is_ready(0, 2) and are_equal(before, state_of(steps[0]))


def test_memory_does_not_grow_from_replay_to_replay(make_config: MakeConfig) -> None:
    steps = gpu_stage(make_config, **WITH_BASE)
    runner = make_runner("graph", steps)
    run_stage(runner, steps, 2)
    torch.cuda.synchronize()
    before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    torch.cuda.reset_peak_memory_stats()
    run_stage(runner, steps, 50)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert torch.cuda.max_memory_allocated() == before[0]


@repeatable
def test_draws_neither_touch_nor_follow_the_default_generator(make_config: MakeConfig) -> None:
    states = []
    for disturbed in (False, True):
        steps = gpu_stage(make_config)
        runner = make_runner("graph", steps)
        torch.cuda.manual_seed(int(disturbed))
        default = torch.cuda.get_rng_state()
        run_stage(runner, steps, 1)
        if disturbed:
            # What pictures and other code do between steps.
            torch.randn(1000, device=GPU)
            torch.randn(10, device=GPU, generator=torch.Generator(GPU).manual_seed(0))
        else:
            assert torch.equal(torch.cuda.get_rng_state(), default)
        run_stage(runner, steps, 3)
        states.append(state_of(steps[0]))
    assert are_equal(*states)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class WatchedRecorder(CudaRecorder):
    """Refuses whatever waits for the device in a capture, also where CUDA would let it pass."""

    def record(self, function: Function) -> Callable[[], None]:
        def watched() -> None:
            with no_synchronisation():
                function()

        return super().record(watched)


def test_neither_capture_nor_replay_waits_for_the_device(make_config: MakeConfig) -> None:
    steps = gpu_stage(make_config, **WITH_BASE)
    runner = GraphRunner(steps, WatchedRecorder(GPU, [steps[0].generator]))
    runner.prepare(0, 0)
    torch.cuda.synchronize()
    with no_synchronisation():
        run_stage(runner, steps, 10)
    steps[0].ring.start_read(0, 10)
    assert all(row["grad_norm"] > 0 for row in steps[0].ring.finish_read())


@repeatable
def test_pictures_between_replays_change_nothing(make_config: MakeConfig) -> None:
    metrics = []
    for sample_every in (0, 2):
        settings = {"model.device": "cuda", "engine": "graph", "sample_every": sample_every}
        settings |= {"samples.enabled": True, "samples.steps": 2, "stage.0.steps": 6}
        config = make_config(**settings)
        result = loop.train(config, Console(file=StringIO()), overwrite=True)
        assert "capture" in result.seconds
        metrics.append(result.folder.metrics.read_text())
        with Image.open(result.folder.grid(6)) as grid:
            assert grid.getextrema()[0][1] > 0
    assert metrics[0] == metrics[1]


def test_auto_is_graph(make_config: MakeConfig) -> None:
    assert why_not_capture(GPU) is None and fallback_note("auto", GPU) is None
    assert resolve_engine("auto", GPU) == "graph"
    config = make_config(**{"model.device": "cuda", "stage.0.steps": 2})
    assert loop.train(config, Console(file=StringIO())).config.engine == "graph"


HOST_READ = """
import torch
from fastppt.errors import UserError
from fastppt.training.constants import Constants
from fastppt.training.graph import CapturedFunction, CudaRecorder

total = torch.ones(1, device="cuda")
function = CapturedFunction(
    lambda: total.add_(total.item()),
    CudaRecorder(torch.device("cuda"), []),
    written=lambda: [total],
    constants=lambda: Constants({}),
)
try:
    function()
except UserError as error:
    print(error)
assert total.item() == 1.0
assert torch.cuda.current_stream() == torch.cuda.default_stream()
"""


def test_a_host_read_in_a_capture_is_refused() -> None:
    """In a process of its own: a capture that fails leaves torch's memory cache unable to go on."""
    run = subprocess.run([sys.executable, "-c", HOST_READ], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("engine graph: the step cannot be captured (")
    assert run.stdout.endswith("); pass --engine eager\n")


@repeatable
def test_compiled_steps_are_replayed_as_they_run(make_config: MakeConfig) -> None:
    states = []
    for engine in ("compile", "graph+compile"):
        steps = gpu_stage(make_config)
        compile_blocks(steps[0].family)
        run_stage(make_runner(engine, steps), steps, 10)
        states.append(state_of(steps[0]))
    assert are_equal(*states)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["mini-sdxl", "mini-sd3"])
def test_compiled_gradients_are_eager_ones_tensor_by_tensor(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, model: str, precision: str
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings = WITH_BASE | {"model.device": "cuda", "model.precision": precision}
    steps, adapters = build_stage(make_config, model, **settings)
    compile_blocks(steps[0].family)
    check_gradients(steps, Trainables({"lora": adapters}))


def test_twenty_compiled_steps_go_where_eager_ones_go(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, to half of its digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    drifts = []
    for engine in ("eager", "graph+compile"):
        settings = {"model.device": "cuda", "model.precision": "fp32"}
        steps, adapters = build_stage(make_config, **settings)
        if engine == "graph+compile":
            compile_blocks(steps[0].family)
        start = adapters.arena.flat.detach().clone()
        run_stage(make_runner(engine, steps), steps, 20)
        drifts.append(adapters.arena.flat.detach() - start)
    assert drifts[0].norm() > 0
    assert (drifts[1] - drifts[0]).norm() <= torch.finfo(torch.float32).eps ** 0.5 * drifts[
        0
    ].norm()
