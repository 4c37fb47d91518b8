"""Which engine runs, what is said of it, and when it is refused."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
import torch
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.training import engine, loop, run, runners
from fastppt.training.engine import fallback_note, prepare_engine, resolve_engine, why_auto
from fastppt.training.step import Step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MakeConfig = Callable[..., RunConfig]


def captures(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    """Let CUDA graphs be had, or not for a reason."""
    monkeypatch.setattr(engine, "why_not_capture", lambda device: reason)


def test_auto_is_eager_on_the_cpu_and_a_chosen_engine_is_kept() -> None:
    assert resolve_engine("auto", CPU) == "eager"
    assert resolve_engine("graph+compile", CPU) == "graph+compile"
    assert why_auto(CPU).startswith("graph captures CUDA graphs, which need a GPU; one run")
    assert fallback_note("auto", CPU) is None


def test_auto_is_graph_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    captures(monkeypatch, None)
    assert resolve_engine("auto", GPU) == "graph"
    assert why_auto(GPU).startswith("a step is one launch")
    assert fallback_note("auto", GPU) is None


def test_auto_without_graphs_on_a_gpu_is_eager_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captures(monkeypatch, "needs something")
    assert resolve_engine("auto", GPU) == "eager"
    assert fallback_note("auto", GPU) == "engine eager, not graph: needs something"
    assert fallback_note("graph", GPU) is None


def test_the_reason_is_printed_in_one_line(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loop, "fallback_note", lambda chosen, device: f"{chosen}: no [graphs] in this one"
    )
    console = Console(file=StringIO(), width=20)
    loop.train(make_config(**{"stage.0.steps": 1}), console)
    assert console.file.getvalue().startswith("note: auto: no [graphs] in this one\n")


def test_engines_are_listed_with_the_reason_against_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "why_not_compile", lambda device: "needs something")
    no_gpu = "captures CUDA graphs, which need a GPU"
    assert engine.engines(CPU) == {
        "eager": None,
        "compile": "needs something",
        "graph": no_gpu,
        "graph+compile": no_gpu,
    }
    captures(monkeypatch, None)
    assert engine.engines(GPU)["graph"] is None
    assert engine.engines(GPU)["graph+compile"] == "needs something"


def test_engine_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    monkeypatch.setattr(engine, "why_not_compile", lambda device: "needs a C++ compiler")
    prepare_engine("eager", "blocks", family)
    with pytest.raises(UserError, match=r"engine compile: needs a C\+\+ compiler\. Pass --engine"):
        prepare_engine("compile", "blocks", family)
    for name in ("graph", "graph+compile"):
        with pytest.raises(UserError) as raised:
            prepare_engine(name, "blocks", family)
        assert str(raised.value) == (
            f"engine {name}: captures CUDA graphs, which need a GPU. Pass --engine eager to do "
            "without"
        )


@pytest.mark.parametrize(
    ("scope", "compiled"),
    [("blocks", "BasicTransformerBlock"), ("network", "UNet2DConditionModel")],
)
@pytest.mark.parametrize("name", ["compile", "graph+compile"])
def test_a_compiling_engine_compiles_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, family: Family, name: str, scope: str, compiled: str
) -> None:
    captures(monkeypatch, None)
    monkeypatch.setattr(engine, "why_not_compile", lambda device: None)
    prepare_engine(name, scope, family)
    modules = family.network.modules()
    parts = {type(m).__name__ for m in modules if m._compiled_call_impl is not None}
    assert parts == {compiled}


@pytest.mark.parametrize("name", ["auto", "eager", "graph"])
def test_a_scope_for_an_engine_that_compiles_nothing_is_refused(name: str) -> None:
    settings = [("engine", name), ("compile_scope", "network")]
    with pytest.raises(UserError, match=f"compile_scope: engine {name} compiles nothing"):
        build_config(settings=settings)


@pytest.mark.parametrize("scope", ["blocks", "network"])
def test_a_network_compiled_as_one_is_checked_before_it_trains(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    happened: list[str] = []
    monkeypatch.setattr(run, "check_gradients", lambda steps, adapters: happened.append("check"))
    monkeypatch.setattr(runners, "run_step", lambda step, number: happened.append("step"))
    settings = {"engine": "compile", "compile_scope": scope, "stage.0.steps": 2}
    loop.train(make_config(**settings), Console(quiet=True))
    checks = ["check"] if scope == "network" else []
    assert happened == [*checks, "step", "step"]


def test_samples_are_drawn_without_compiling(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[str] = []
    compiled_blocks: list[int] = []
    monkeypatch.setattr(
        torch._dynamo.convert_frame,
        "_compile",
        lambda code, *args, **kwargs: traced.append(code.co_name),
    )

    def count_compiled_blocks(step: Step, number: int) -> None:
        modules = step.family.network.modules()
        compiled_blocks.append(sum(m._compiled_call_impl is not None for m in modules))

    monkeypatch.setattr(runners, "run_step", count_compiled_blocks)
    settings = {"engine": "compile", "samples.enabled": True, "samples.steps": 1}
    loop.train(make_config(**settings), Console(quiet=True))
    # The engine is at work in the steps, and not in the pictures before and after them.
    assert len(compiled_blocks) == 6 and min(compiled_blocks) > 0
    assert traced == []
