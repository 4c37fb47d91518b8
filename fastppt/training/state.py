"""All that a run goes on from at the boundary of two steps, as tensors by name.

Those are the tensors that a step writes (`named_tensors`), the anchors, and the generators. What is
encoded from the photos is not among them: it is encoded again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fastppt.errors import UserError
from fastppt.trainables.network_weights import NetworkWeights
from fastppt.trainables.trainables import Trainables
from fastppt.training.snapshot import named_tensors
from fastppt.training.step import Step

# Between two steps gradients and losses are zero, working copies are the values rounded, samples
# are those of a step that is over, and the ring has been read; its count is the number of steps.
FOLLOWS = ("losses", "/gradient", "/working_copy", "samples")


def run_state(step: Step) -> dict[str, Tensor]:
    """Return the state of a run between two steps: the tensors themselves, but for the generators'.

    Args:
        step: Any of the stage's; they share all that is written.
    """
    states = {name: generator.get_state() for name, generator in step.generators.items()}
    return _tensors(step) | states


@torch.no_grad()
def place_start(
    state: Mapping[str, Tensor], trainables: Trainables, moving: Collection[str]
) -> None:
    """Let the model be what it was when the stage began, as far as its steps are made of that.

    Anchors go into what they hold: whether an optimizer keeps one depends on the values that it is
    made with. What the stage does not train has the values that it had: prompts are encoded with
    them. So this comes before the stage's steps are built, and `restore_state` after.

    Args:
        state: What `run_state` returned.
        trainables: All that the run trains.
        moving: The arenas that the stage trains.
    """
    for name, arena in trainables.arenas.items():
        values = state.get(f"{name}/anchor" if name in moving else f"{name}/values")
        if values is not None and values.shape == arena.flat.shape:
            arena.flat.copy_(values)
    trainables.refresh()


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
    names = here.keys() | step.generators.keys()
    if names != state.keys():
        different = ", ".join(sorted(names ^ state.keys()))
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
    trainables.refresh()
    for name, generator in step.generators.items():
        generator.set_state(state[name])


def _tensors(step: Step) -> dict[str, Tensor]:
    tensors = {
        name: tensor
        for name, tensor in named_tensors(step).items()
        if not name.startswith("ring/") and not name.endswith(FOLLOWS)
    }
    for name, group in zip(step.learning_rates, step.optimizer.param_groups, strict=True):
        for param in group["params"]:
            anchor = step.optimizer.state[param].get("anchor")
            if anchor is not None and not _comes_with_model(step, anchor):
                tensors[f"{name}/anchor"] = anchor
    # What another stage trains.
    for name, arena in step.trainables.arenas.items():
        tensors.setdefault(f"{name}/values", arena.flat)
    return tensors


def _comes_with_model(step: Step, anchor: Tensor) -> bool:
    """Say whether an anchor is the pretrained weights, which are loaded with the model again."""
    network = step.trainables.network
    pretrained = network.pretrained if isinstance(network, NetworkWeights) else None
    return pretrained is not None and anchor.is_set_to(pretrained)
