"""Which engine runs the steps: eager, compile, graph or graph+compile."""

from __future__ import annotations

import torch

from fastppt.config_types import CompileScope, Engine
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.training.compiling import compile_blocks, compile_network, why_not_compile
from fastppt.training.graph import why_not_capture


def resolve_engine(engine: Engine, device: torch.device) -> Engine:
    """Return the engine that ``auto`` stands for on a device: graph where it can be, else eager.

    It never compiles: one run of a few hundred steps hardly repays a cold compilation.
    """
    if engine != "auto":
        return engine
    return "graph" if why_not_capture(device) is None else "eager"


def why_auto(device: torch.device) -> str:
    """Return why ``auto`` takes what it takes on a device."""
    reason = why_not_capture(device)
    if reason is None:
        return "a step is one launch, and nothing has to be compiled first"
    return f"graph {reason}; one run of a few hundred steps hardly repays a compilation"


def fallback_note(engine: Engine, device: torch.device) -> str | None:
    """Return a line for the user where ``auto`` has to do without graphs on a GPU; else None."""
    if engine != "auto" or device.type != "cuda":
        return None
    reason = why_not_capture(device)
    return None if reason is None else f"engine eager, not graph: {reason}"


def engines(device: torch.device) -> dict[Engine, str | None]:
    """Return every engine, and why it cannot be used on a device; None if it can."""
    names: tuple[Engine, ...] = ("eager", "compile", "graph", "graph+compile")
    return {name: why_not(name, device) for name in names}


def why_not(engine: Engine, device: torch.device) -> str | None:
    """Return why a resolved engine cannot be used on a device; None if it can."""
    parts = engine.split("+")
    reason = why_not_capture(device) if "graph" in parts else None
    if reason is None and "compile" in parts:
        reason = why_not_compile(device)
    return reason


def prepare_engine(engine: Engine, scope: CompileScope, family: Family) -> None:
    """Make the family's network ready to run steps under a resolved engine.

    Args:
        engine: Not auto.
        scope: What a compiling engine compiles as one. The network is to be checked before its
            first step, by `check_gradients`.
        family: Its network is compiled, as it is first called.

    Raises:
        UserError: the engine cannot be used on the family's device.
    """
    reason = why_not(engine, family.device)
    if reason is not None:
        raise UserError(f"engine {engine}: {reason}. Pass --engine eager to do without")
    if not compiles(engine):
        return
    if scope == "network":
        compile_network(family)
    else:
        compile_blocks(family)


def compiles(engine: Engine) -> bool:
    """Say whether a resolved engine compiles the network."""
    return "compile" in engine
