"""Compiled steps compute what eager ones do; a network that does not is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastppt.config import ModelConfig, RunConfig
from fastppt.errors import UserError
from fastppt.families.loading import load_family
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.trainables import Trainables
from fastppt.training import compiling
from fastppt.training.compiling import check_gradients, compile_blocks, compile_network
from fastppt.training.step import Step, accumulate_gradients, run_step
from tests.training.class_steps import class_stage, write_class_pictures
from tests.training.stages import WITH_BASE, are_equal, build_stage, state_of

CPU = torch.device("cpu")
MakeConfig = Callable[..., RunConfig]


def knows_float64_attention() -> bool:
    """Say whether torch knows the dtype of what its attention of float64 returns: 2.11 does not."""
    with FakeTensorMode():
        query = torch.empty(1, 1, 1, 8, dtype=torch.float64)
        _, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, query, query
        )
    return logsumexp.dtype == torch.float64


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First gradients tensor by tensor, then the drift of 20 steps, both in float64."""
    if not knows_float64_attention():
        pytest.skip(f"torch {torch.__version__} compiles wrong dtypes for attention in float64")
    gradients, drifts = [], []
    for compiled in (False, True):
        (step,), adapters = build_stage(make_config, dtype=torch.float64)
        if compiled:
            compile_blocks(step.family)
        step.learning_rate.fill_(1e-3)
        start = adapters.arena.flat.detach().clone()
        state = step.generator.get_state()
        # At the start the up-projections are zero and hide half of the gradients.
        for pair in adapters.pairs:
            pair.up.fill_(0.01)
        accumulate_gradients(step)
        gradients.append([tensor.grad.clone() for tensor in adapters.arena.tensors])
        adapters.arena.grad.zero_()
        adapters.arena.flat.data.copy_(start)
        step.losses.zero_()
        step.generator.set_state(state)
        for _ in range(20):
            run_step(step)
        drifts.append(adapters.arena.flat.detach() - start)
    for eager, compiled in zip(*gradients, strict=True):
        assert (eager - compiled).abs().max() <= 1e-9 * eager.abs().max()
    assert drifts[0].abs().max() > 0
    assert (drifts[0] - drifts[1]).abs().max() <= 1e-9 * drifts[0].abs().max()


def compiled_parts(network: torch.nn.Module) -> set[str]:
    return {type(m).__name__ for m in network.modules() if m._compiled_call_impl is not None}


def test_blocks_are_compiled_and_the_rest_is_not() -> None:
    family = load_family(ModelConfig(path="mini-sdxl", device="cpu"))
    compile_blocks(family)
    assert compiled_parts(family.network) == {"BasicTransformerBlock"}


def test_the_network_is_compiled_as_one() -> None:
    family = load_family(ModelConfig(path="mini-sd3", device="cpu"))
    compile_network(family)
    assert compiled_parts(family.network) == {"SD3Transformer2DModel"}


# The check of whole networks. What is compiled, and wrong, is played by a second pass that does
# something to the gradients of the first.


@pytest.fixture
def stage(make_config: MakeConfig) -> tuple[list[Step], LoraAdapters]:
    return build_stage(make_config, "mini-sd3", **WITH_BASE)


def spoil_pass(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], object], *, number: int = 1
) -> list[tuple[str, bool]]:
    """Let a fault change one of the passes; returns the passes so far: stance, and with base."""
    passes: list[tuple[str, bool]] = []

    def accumulate(step: Step, *, with_base: bool) -> None:
        accumulate_gradients(step, with_base=with_base)
        passes.append((torch._dynamo.eval_frame._stance.stance, with_base))
        if len(passes) == number + 1:
            spoil(step.optimizer.param_groups[0]["params"][0].grad)

    monkeypatch.setattr(compiling, "accumulate_gradients", accumulate)
    return passes


@pytest.mark.parametrize(("number", "rounding"), [(1, 1e-5), (3, 0.3)])
def test_a_right_network_passes_the_check_and_nothing_changes(
    stage: tuple[list[Step], LoraAdapters],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    rounding: float,
) -> None:
    before = state_of(stage[0][0])
    passes = spoil_pass(monkeypatch, lambda gradient: gradient.mul_(1 + rounding), number=number)
    check_gradients(stage[0], Trainables({"lora": stage[1]}))
    stances = ("force_eager", "default")
    assert passes == [(stance, base) for base in (False, True) for stance in stances]
    assert are_equal(before, state_of(stage[0][0]))


def test_a_network_that_is_wrong_only_beside_the_base_is_refused(
    stage: tuple[list[Step], LoraAdapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(stage[0][0])
    spoil_pass(monkeypatch, lambda gradient: gradient.mul_(0.25), number=3)
    with pytest.raises(UserError, match="44 of 44 trained tensors differ"):
        check_gradients(stage[0], Trainables({"lora": stage[1]}))
    assert are_equal(before, state_of(stage[0][0]))


def test_a_float16_network_is_checked_where_its_gradients_are_finite(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the loss scale that a run begins with, those of feature alignment overflow."""
    stage = build_stage(make_config, "mini-sdxl", **(WITH_BASE | {"model.precision": "fp16"}))
    before = state_of(stage[0][0])
    gradients: list[Tensor] = []
    spoil_pass(monkeypatch, lambda gradient: gradients.append(gradient.clone()), number=3)
    check_gradients(stage[0], Trainables({"lora": stage[1]}))
    assert gradients[0].isfinite().all() and gradients[0].any()
    assert are_equal(before, state_of(stage[0][0]))


@pytest.mark.parametrize("side", ["lora_down", "lora_up"])
@pytest.mark.parametrize(
    "spoil", [lambda part: part.mul_(1.01), lambda part: part.zero_(), lambda part: part.log_()]
)
def test_one_wrong_gradient_is_named(
    stage: tuple[list[Step], LoraAdapters],
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    spoil: Callable[[Tensor], object],
) -> None:
    pair = stage[1].pairs[3]
    tensor = pair.down if side == "lora_down" else pair.up
    place = (tensor.shape, tensor.stride(), tensor.storage_offset())
    spoil_pass(monkeypatch, lambda gradient: spoil(gradient.as_strided(*place)))
    before = state_of(stage[0][0])
    with pytest.raises(UserError) as raised:
        check_gradients(stage[0], Trainables({"lora": stage[1]}))
    message = str(raised.value)
    assert f"most of all that of {pair.name}.{side} " in message
    assert "1 of 44 trained tensors differ" in message
    assert message.endswith("pass --set compile_scope=blocks")
    assert are_equal(before, state_of(stage[0][0]))


def test_class_images_are_drawn_alike_in_both_passes_and_not_by_the_check(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    stage = class_stage(make_config, write_class_pictures(tmp_path / "robots"), "mini-sd3")
    drawn_with = stage.step.class_generator
    assert drawn_with is not None
    before, generator = state_of(stage.step), drawn_with.get_state()
    check_gradients([stage.step], stage.trainables)
    assert are_equal(before, state_of(stage.step))
    assert torch.equal(generator, drawn_with.get_state())


@pytest.mark.slow
def test_a_network_compiled_as_one_by_autograd_alone_is_right(
    stage: tuple[list[Step], LoraAdapters],
) -> None:
    stage[0][0].family.network.compile(backend="aot_eager")
    check_gradients(stage[0], Trainables({"lora": stage[1]}))


# What compiling needs of the machine.


def compiler(folder: Path, script: str) -> str:
    """Write a program that stands in for a compiler."""
    program = folder / "cxx"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


def why_not_with(program: str) -> str | None:
    """Say why a C++ compiler will not do."""
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        with config.patch({"cpp.cxx": (program,)}):
            return compiling.why_not_compile(CPU)
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()


def test_working_compiler_is_all_that_the_cpu_needs(tmp_path: Path) -> None:
    assert why_not_with(compiler(tmp_path, "exit 0")) is None


def test_missing_compiler_says_what_to_install(tmp_path: Path) -> None:
    reason = why_not_with(str(tmp_path / "none"))
    assert reason == "needs a C++ compiler: install g++, or set CXX to another one"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("<stdin>:1:10: fatal error: Python.h: No such file", "install python3-dev"),
        ("cannot execute 'cc1plus'", "does not work (cannot execute 'cc1plus')"),
    ],
)
def test_compiler_that_fails_says_why(tmp_path: Path, said: str, reason: str) -> None:
    script = f'[ "$1" = --version ] && exit 0\necho "{said}" >&2\nexit 1'
    found = why_not_with(compiler(tmp_path, script))
    assert found is not None and reason in found


def test_compile_on_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils._triton, "has_triton_package", lambda: False)
    assert compiling.why_not_compile(torch.device("cuda")) == "needs triton: pip install triton"


def test_compile_on_a_gpu_needs_a_c_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._dynamo.device_interface import CudaInterface

    monkeypatch.setattr(CudaInterface, "raise_if_triton_unavailable", lambda device: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = compiling.why_not_compile(torch.device("cuda"))
    assert reason == "needs a C compiler: install gcc, or set CC to another one"
    monkeypatch.setenv("CC", compiler(tmp_path, "exit 0"))
    assert compiling.why_not_compile(torch.device("cuda")) is None
