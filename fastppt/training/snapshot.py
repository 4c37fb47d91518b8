"""What a try-out of a step writes: kept aside and put back, or never changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastppt.training.step import Step


class Snapshot:
    """The values of tensors and the states of generators at one moment.

    Args:
        tensors: Copied to host memory, so that a try-out has the device's to itself; those that are
            zero throughout, such as gradients between steps, need no copy. Waits for the device.
        generators: Their states are taken.
    """

    def __init__(self, tensors: Iterable[Tensor], generators: Iterable[torch.Generator]) -> None:
        self._values = [
            (tensor, None if _is_zero(tensor) else tensor.detach().to("cpu", copy=True))
            for tensor in tensors
        ]
        self._states = [(generator, generator.get_state()) for generator in generators]

    @torch.no_grad()
    def restore(self) -> None:
        """Write everything back to where it was."""
        for tensor, value in self._values:
            if value is None:
                tensor.zero_()
            else:
                tensor.copy_(value)
        for generator, state in self._states:
            generator.set_state(state)


def _is_zero(tensor: Tensor) -> bool:
    """Say whether every bit of a tensor is zero; of one with gaps it is not looked at."""
    return tensor.is_contiguous() and not tensor.detach().view(-1).view(torch.uint8).any().item()


def rule_out_updates(step: Step) -> None:
    """Make the loss of the step that comes next not a number, so that it updates nothing."""
    step.losses.fill_(torch.nan)


def tensors_without_update(step: Step) -> list[Tensor]:
    """Return what a step that updates nothing writes: of all that one writes, the small part.

    It leaves bit for bit as they are what is trained, its working copies, the optimizer's state and
    the moving average: of full fine-tuning tens of gigabytes.
    """
    owners = tuple(f"{name}/" for name in (*step.learning_rates, "average"))
    return [
        tensor
        for name, tensor in named_tensors(step).items()
        if name.endswith("/gradient") or not name.startswith(owners)
    ]


def written_tensors(step: Step) -> list[Tensor]:
    """Return every tensor that a step writes and that outlives it: those of `named_tensors`."""
    return list(named_tensors(step).values())


def named_tensors(step: Step) -> dict[str, Tensor]:
    """Return every tensor that a step writes and that outlives it, by name.

    Those are parameters with their working copies, gradients and the optimizer's state, the metric
    ring, the indicator, the loss scale, the moving average, the losses and samples so far. The
    learning rate is the loop's to write. A name begins with that of the trainable, or of the part
    of the step, that it belongs to.
    """
    named = {"losses": step.losses, "samples": step.samples}
    if step.layer_losses is not None:
        named["layer_losses"] = step.layer_losses
    ring = step.ring
    named |= {"ring/rows": ring.rows, "ring/samples": ring.samples, "ring/count": ring.count}
    if step.indicator is not None:
        named["indicator/base_ema"] = step.indicator.base_ema
        named["indicator/tuned_ema"] = step.indicator.tuned_ema
    if step.loss_scale is not None:
        named["loss_scale/scale"] = step.loss_scale.scale
        named["loss_scale/good_steps"] = step.loss_scale.good_steps
    if step.average is not None:
        named["average/num_updates"] = step.average.num_updates
        averages = step.average.averages.items()
        named |= {f"{name}/average": average for name, average in averages}
    for name, group in zip(step.learning_rates, step.optimizer.param_groups, strict=True):
        (param,) = group["params"]
        state = step.optimizer.state[param]
        named |= {f"{name}/values": param, f"{name}/gradient": param.grad}
        named |= {f"{name}/{key}": each for key, each in state.items() if key != "anchor"}
        for copy in group.get("working_copy", ()):
            if copy is not None:
                named[f"{name}/working_copy"] = copy
    return named
