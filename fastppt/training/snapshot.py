"""What a try-out run of a step writes, kept aside and put back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastppt.training.step import Step


class Snapshot:
    """The values of tensors and the states of generators at one moment.

    Args:
        tensors: Copied to host memory, so that a try-out has the device's to itself. The copy waits
            for the device.
        generators: Their states are taken.
    """

    def __init__(self, tensors: Iterable[Tensor], generators: Iterable[torch.Generator]) -> None:
        self._values = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
        self._states = [(generator, generator.get_state()) for generator in generators]

    @torch.no_grad()
    def restore(self) -> None:
        """Write everything back to where it was."""
        for tensor, value in self._values:
            tensor.copy_(value)
        for generator, state in self._states:
            generator.set_state(state)


def written_tensors(step: Step) -> list[Tensor]:
    """Return every tensor that a step writes and that outlives it.

    Those are parameters with their working copies, gradients and the optimizer's state, the metric
    ring, the indicator, the loss scale, the losses so far. The learning rate is the loop's to
    write.
    """
    written = [step.losses, step.ring.rows, step.ring.count]
    if step.indicator is not None:
        written += [step.indicator.base_ema, step.indicator.tuned_ema]
    if step.loss_scale is not None:
        written += [step.loss_scale.scale, step.loss_scale.good_steps]
    for group in step.optimizer.param_groups:
        for param in group["params"]:
            state = step.optimizer.state[param]
            written += [param, param.grad, state["step"], state["exp_avg"], state["exp_avg_sq"]]
        written += [copy for copy in group.get("working_copy", ()) if copy is not None]
    return written
