"""A captured step is called with what it was called with first, and returns tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastppt.foreign.captured import CapturedStep
from tests.backend.captured_loops import (
    WARMUP,
    Loop,
    anchored,
    are_equal,
    capturing,
    draw_batch,
    loops,
)

__all__ = ["capturing", "loops"]

BATCH = draw_batch(0)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "shape": (
        (draw_batch(0, size=3),),
        {"weight": 1.0},
        r"^batch\['input'\]: was a torch.float32 tensor of shape \(4, 6\) .* shape \(3, 6\)",
    ),
    "dtype": (
        (BATCH | {"target": BATCH["target"].double()},),
        {"weight": 1.0},
        r"^batch\['target'\]: was a torch.float32 .* and is a torch.float64",
    ),
    "constant": ((BATCH,), {"weight": 3.0}, r"^weight: was 1\.0 at the first call and is 3\.0 now"),
    "type of constant": ((BATCH,), {"weight": 1}, r"^weight: was 1\.0 at .* is 1 now"),
    "missing": ((BATCH,), {}, r"^arguments: weight is in the first call or in this one"),
    "other names": (({"input": BATCH["input"]},), {"weight": 1.0}, r"batch\['target'\] is in"),
    "array": ((BATCH | {"input": BATCH["input"].numpy()}, 1.0), {}, r"'input'\]: got a ndarray"),
    "module": ((nn.Linear(1, 1), 1.0), {}, "^batch: got a Linear, want a tensor or a constant"),
    "trained": (
        (BATCH | {"input": torch.zeros(4, 6, requires_grad=True)}, 1.0),
        {},
        r"^batch\['input'\]: requires a gradient",
    ),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("num_before", [1, WARMUP + 1])
def test_other_arguments_are_refused_by_name(loops: list[Loop], what: str, num_before: int) -> None:
    loop = Loop(anchored)
    loops.append(loop)
    step = loop.captured()
    for seed in range(num_before):
        step(draw_batch(seed), 1.0)
    args, kwargs, message = CALLS[what]
    before = loop.state()
    with pytest.raises(ValueError, match=message):
        step(*args, **kwargs)
    assert are_equal(before, loop.state())
    # By name or position, and in any strides.
    turned = {name: tensor.t().contiguous().t() for name, tensor in draw_batch(9).items()}
    step(weight=1.0, batch=turned)


def test_an_argument_that_the_step_writes_is_refused(loops: list[Loop]) -> None:
    loop = Loop(anchored)
    step = CapturedStep(lambda total: total.add_(1), state=(loop.network,), warmup=1)
    step(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^total: the step writes into it"):
        step(torch.zeros(2))


def test_an_output_that_would_stand_still_is_refused() -> None:
    step = CapturedStep(lambda x: {"loss": [x, None, 1.5]}, state=(nn.Linear(1, 1),))
    with pytest.raises(ValueError, match=r"returned a float at output\['loss'\]\[2\]"):
        step(torch.zeros(2))
