"""The parts of a training step, forward, backward and update: told apart as the step runs.

Nothing of the step is taken apart for it: marks are set where its backward pass reaches the
network's prediction, and where its optimizer begins. In a captured step they are event nodes of the
graph. What the loss itself takes backward counts as forward, and what scales and gathers losses
after the backward pass as backward.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.attention import count_maps
from bench.step_costs import FORMULAS
from bench.step_ways import TrainerStep
from bench.traffic import Traffic, TrafficCounter
from fastppt.training.step import run_step

PARTS = FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
END = "end"

Mark = Callable[[str], None]

ours = torch.ops.fastppt_kernels


def _scores_flop(query_shape, key_shape, *args, **kwargs) -> int:
    """Return the operations of Q K^T."""
    return 2 * count_maps([query_shape, key_shape]) * query_shape[-1]


def _scores_backward_flop(query_shape, key_shape, *args, **kwargs) -> int:
    """Return those of Q K^T again, and of the gradients of both."""
    return 3 * _scores_flop(query_shape, key_shape)


def _attention_flop(query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _attention_backward_flop(
    grad_shape, statistics_shape, query_shape, key_shape, value_shape, *args, **kwargs
) -> int:
    return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)


# Our own operators, which a counter sees as one each.
OUR_FORMULAS = {
    ours.attention: _attention_flop,
    ours.attention_backward: _attention_backward_flop,
    ours.attention_map_sum: _scores_flop,
    ours.attention_alignment: _scores_flop,
    ours.attention_map_backward: _scores_backward_flop,
}


class PartMarks(AbstractContextManager["PartMarks"]):
    """Calls a mark at the beginning of each part of a step but the first.

    Set it before the step is captured. The hooks are taken away at the exit.

    Attributes:
        mark: Is called with `BACKWARD` and `UPDATE`.
    """

    def __init__(self, step: TrainerStep, mark: Mark) -> None:
        self.mark = mark
        optimizer = step.step.optimizer
        self._hooks = [
            step.family.network.register_forward_hook(self._after_forward),
            optimizer.register_step_pre_hook(lambda *_: self.mark(UPDATE)),
        ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        (prediction,) = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        # A base pass has no backward pass.
        if prediction.requires_grad:
            prediction.register_hook(self._before_backward)

    def _before_backward(self, grad: Tensor) -> None:
        self.mark(BACKWARD)


class PartClock:
    """Times the parts of steps.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._times: dict[str, float] = {}
        self._events: dict[str, torch.cuda.Event] = {}
        if self._on_gpu:
            # External: as nodes of a captured graph they are recorded by each replay.
            self._events = {
                name: torch.cuda.Event(enable_timing=True, external=True) for name in (*PARTS, END)
            }

    def __call__(self, name: str) -> None:
        """Note the time of a mark."""
        if self._on_gpu:
            self._events[name].record()
        else:
            self._times[name] = time.perf_counter()

    def time(self, step: Callable[[], object]) -> dict[str, float]:
        """Take a step; returns the seconds of each part."""
        self(FORWARD)
        step()
        self(END)
        names = [*PARTS, END]
        if self._on_gpu:
            self._events[END].synchronize()
            pairs = zip(PARTS, names[1:], strict=True)
            return {a: self._events[a].elapsed_time(self._events[b]) / 1e3 for a, b in pairs}
        return {a: self._times[b] - self._times[a] for a, b in zip(PARTS, names[1:], strict=True)}


def count_parts(step: TrainerStep, marks: PartMarks) -> dict[str, tuple[int, Traffic]]:
    """Take an eager step; returns the operations and the bytes of each part.

    Operations are those of products, convolutions and attentions, as `count_flops` counts them,
    and those of our attentions and their alignment.

    Args:
        step: Has taken steps before.
        marks: On it; their mark is put back.
    """
    counts: list[tuple[int, Traffic]] = []
    before = marks.mark
    formulas = FORMULAS | OUR_FORMULAS
    with FlopCounterMode(display=False, custom_mapping=formulas) as flops, TrafficCounter() as load:

        def mark(name: str) -> None:
            counts.append((flops.get_total_flops(), load.take()))

        marks.mark = mark
        try:
            run_step(step.step, step.number)
        finally:
            marks.mark = before
        mark(END)
    sums = [0, *(total for total, _ in counts)]
    return {
        name: (sums[index + 1] - sums[index], counts[index][1]) for index, name in enumerate(PARTS)
    }
