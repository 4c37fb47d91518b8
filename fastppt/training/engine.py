"""How a step runs: eager, or with each transformer block compiled."""

from __future__ import annotations

import torch

from fastppt.config import Engine
from fastppt.families.base import Family


def resolve_engine(engine: Engine) -> Engine:
    """Return the engine that ``auto`` stands for.

    It is eager everywhere: one run of a few hundred steps hardly repays a cold compilation.
    """
    return "eager" if engine == "auto" else engine


def prepare_engine(engine: Engine, family: Family) -> None:
    """Make the family's network ready to run steps under a resolved engine.

    ``compile`` is regional: each repeated block is compiled by itself, which takes a fraction of
    the time of the whole network and, unlike the whole network under Inductor on the CPU, gives
    right adapter gradients.
    """
    if engine != "compile":
        return
    # Base and tuned passes, and the batch shapes of training and of sampling, are each one variant.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    blocks = [
        module
        for module in family.network.modules()
        if type(module).__name__ in family.repeated_blocks
    ]
    assert blocks, f"{family.name} names no block of its network in repeated_blocks"
    for block in blocks:
        block.compile()
