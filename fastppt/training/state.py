"""All that a run goes on from at the boundary of two steps, as tensors by name.

Those are the tensors that a step writes (`named_tensors`), the anchors, and the generator. What is
encoded from the photos is not among them: it is encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastppt.errors import UserError
from fastppt.trainables.trainables import Trainables
from fastppt.training.snapshot import named_tensors
from fastppt.training.step import Step

GENERATOR = "generator"

# Between two steps gradients and losses are zero, working copies are the values rounded, samples
# are those of a step that is over, and the ring has been read; its count is the number of steps.
FOLLOWS = ("losses", "/gradient", "/working_copy", "samples")


def run_state(step: Step) -> dict[str, Tensor]:
    """Return the state of a run between two steps: the tensors themselves, but for the generator's.

    Args:
        step: Any of the stage's; they share all that is written.
    """
    return _tensors(step) | {GENERATOR: step.generator.get_state()}


@torch.no_grad()
def place_anchors(state: Mapping[str, Tensor], trainables: Trainables) -> None:
    """Write the anchors into what they hold, as when the stage began.

    Whether an optimizer keeps an anchor depends on the values that it is made with, so this comes
    before the stage's steps are built, and `restore_state` after.
    """
    for name, arena in trainables.arenas.items():
        anchor = state.get(f"{name}/anchor")
        if anchor is not None and anchor.shape == arena.flat.shape:
            arena.flat.copy_(anchor)


@torch.no_grad()
def restore_state(
    step: Step, trainables: Trainables, state: Mapping[str, Tensor], num_steps: int
) -> None:
    """Write a saved state to where the steps read it.

    Args:
        step: Any of the stage's, new.
        trainables: What it trains.
        state: What `run_state` returned.
        num_steps: Steps taken in the whole run.

    Raises:
        UserError: the state is that of other trainables, or of another version.
    """
    here = _tensors(step)
    if here.keys() | {GENERATOR} != state.keys():
        different = ", ".join(sorted((here.keys() | {GENERATOR}) ^ state.keys()))
        raise UserError(
            f"the checkpoint's state is not of this run: {different}. "
            "Resume with the version of fastppt that wrote it"
        )
    for name, tensor in here.items():
        saved = state[name]
        if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"the checkpoint's {name} is {saved.dtype} {tuple(saved.shape)}, and the run's "
                f"{tensor.dtype} {tuple(tensor.shape)}. Is it the same model?"
            )
        tensor.copy_(saved)
    step.ring.count.fill_(num_steps)
    for arena in trainables.arenas.values():
        arena.refresh()
    step.generator.set_state(state[GENERATOR])


def _tensors(step: Step) -> dict[str, Tensor]:
    tensors = {
        name: tensor
        for name, tensor in named_tensors(step).items()
        if not name.startswith("ring/") and not name.endswith(FOLLOWS)
    }
    for name, group in zip(step.learning_rates, step.optimizer.param_groups, strict=True):
        for param in group["params"]:
            anchor = step.optimizer.state[param].get("anchor")
            if anchor is not None:
                tensors[f"{name}/anchor"] = anchor
    # What another stage trains.
    for name, arena in step.trainables.arenas.items():
        tensors.setdefault(f"{name}/values", arena.flat)
    return tensors
