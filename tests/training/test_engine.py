"""The compile engine computes what the eager one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.photos import find_photos
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.training import engine, loop
from fastppt.training.encoding import encode
from fastppt.training.engine import prepare_engine, resolve_engine
from fastppt.training.loop import build_adapters, build_steps, new_generator, resolve
from fastppt.training.ring import MetricRing
from fastppt.training.step import METRICS, Step, denoising_pass, draw, run_step

CPU = torch.device("cpu")


def test_auto_is_eager() -> None:
    assert resolve_engine("auto") == "eager"
    assert resolve_engine("compile") == "compile"


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones(make_config: Callable[..., RunConfig]) -> None:
    """First gradients tensor by tensor, then the drift of 20 steps, both in float64."""
    gradients, drifts = [], []
    for name in ("eager", "compile"):
        family = load_family(ModelConfig(path="mini-sdxl", device="cpu"), dtype=torch.float64)
        config = resolve(make_config(engine=name), family)
        adapters = build_adapters(config, family, dtype=torch.float64)
        prepare_engine(config.engine, family)
        photos = find_photos(config.photos.folder)
        buckets, _ = encode(config, family, photos, Console(quiet=True))
        ring = MetricRing(METRICS, 32, family.device)
        generator = new_generator(config, family)
        (step,) = build_steps(config, config.stage[0], family, adapters, buckets, ring, generator)
        step.learning_rate.fill_(1e-3)
        start = adapters.arena.flat.detach().clone()
        state = generator.get_state()
        # At the start the up-projections are zero and hide half of the gradients.
        for pair in adapters.pairs:
            pair.up.fill_(0.01)
        denoising_pass(step, draw(step)).backward()
        gradients.append([tensor.grad.clone() for tensor in adapters.arena.tensors])
        adapters.arena.grad.zero_()
        adapters.arena.flat.data.copy_(start)
        generator.set_state(state)
        for _ in range(20):
            run_step(step)
        drifts.append(adapters.arena.flat.detach() - start)
    for eager, compiled in zip(*gradients, strict=True):
        assert (eager - compiled).abs().max() <= 1e-9 * eager.abs().max()
    assert drifts[0].abs().max() > 0
    assert (drifts[0] - drifts[1]).abs().max() <= 1e-9 * drifts[0].abs().max()


def test_samples_are_drawn_without_compiling(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[str] = []
    compiled_blocks: list[int] = []
    monkeypatch.setattr(
        torch._dynamo.convert_frame,
        "_compile",
        lambda code, *args, **kwargs: traced.append(code.co_name),
    )

    def count_compiled_blocks(step: Step) -> None:
        modules = step.family.network.modules()
        compiled_blocks.append(sum(m._compiled_call_impl is not None for m in modules))

    monkeypatch.setattr(loop, "run_step", count_compiled_blocks)
    settings = {"engine": "compile", "samples.enabled": True, "samples.steps": 1}
    loop.train(make_config(**settings), Console(quiet=True))
    # The engine is at work in the steps, and not in the pictures before and after them.
    assert len(compiled_blocks) == 6 and min(compiled_blocks) > 0
    assert traced == []


def test_blocks_are_compiled_and_the_rest_is_not(make_config: Callable[..., RunConfig]) -> None:
    family = load_family(ModelConfig(path="mini-sdxl", device="cpu"))
    prepare_engine("compile", family)
    compiled = {
        type(module).__name__
        for module in family.network.modules()
        if module._compiled_call_impl is not None
    }
    assert compiled == {"BasicTransformerBlock"}


def test_engines_are_listed_with_the_reason_against_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "why_not_compile", lambda device: "needs something")
    assert engine.engines(CPU) == {"eager": None, "compile": "needs something"}


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
            return engine.why_not_compile(CPU)
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
    assert engine.why_not_compile(torch.device("cuda")) == "needs triton: pip install triton"


def test_compile_on_a_gpu_needs_a_c_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._dynamo.device_interface import CudaInterface

    monkeypatch.setattr(CudaInterface, "raise_if_triton_unavailable", lambda device: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = engine.why_not_compile(torch.device("cuda"))
    assert reason == "needs a C compiler: install gcc, or set CC to another one"
    monkeypatch.setenv("CC", compiler(tmp_path, "exit 0"))
    assert engine.why_not_compile(torch.device("cuda")) is None


def test_engine_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    monkeypatch.setattr(engine, "why_not_compile", lambda device: "needs a C++ compiler")
    prepare_engine("eager", family)
    with pytest.raises(UserError, match=r"engine compile: needs a C\+\+ compiler\. Pass --engine"):
        prepare_engine("compile", family)
