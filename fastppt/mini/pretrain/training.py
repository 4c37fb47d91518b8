"""A training loop that can be stopped and taken up again at any step, with the same result."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastppt.errors import UserError
from fastppt.outputs.files import write_file


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a network learns.

    Attributes:
        num_steps: Updates in all.
        learning_rate: The highest.
        warmup: Updates until it is reached.
        decay: The last part of the updates, as a fraction, over which it falls to nothing along a
            cosine.
        average: Decay of the moving average of the weights, which is what is kept; it starts
            lower, at (1 + step) / (10 + step).
        weight_decay: AdamW's.
    """

    num_steps: int
    learning_rate: float
    warmup: int = 100
    decay: float = 0.5
    average: float = 0.998
    weight_decay: float = 0.01

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        left = (self.num_steps - step) / (self.decay * self.num_steps)
        fall = 0.5 - 0.5 * torch.cos(torch.tensor(min(1.0, left) * torch.pi)).item()
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * fall


CPU = torch.device("cpu")


class OutOfTimeError(Exception):
    """The piece's time is up; what is done is saved."""


class Deadline:
    """When a piece of the pretraining has to stop."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def passed(self) -> bool:
        """Tell whether it is time to stop."""
        return self._end is not None and time.monotonic() > self._end


def train(
    name: str,
    networks: Mapping[str, nn.Module],
    loss_of: Callable[[torch.Generator], Tensor],
    schedule: Schedule,
    work: Path,
    deadline: Deadline,
    seed: int,
    device: torch.device = CPU,
) -> None:
    """Train networks together, or go on where an earlier piece stopped; leave the averages in them.

    All that is random in a step comes from a generator seeded by ``seed`` and the step, so a
    training that was stopped and taken up again is the uninterrupted one. What is drawn does not
    depend on the device; what is computed from it does, in the last digits.

    Args:
        name: Of the state file in ``work``, and of the log's lines.
        networks: Written. At the end they hold the moving averages, in evaluation mode, and are on
            the CPU again.
        loss_of: The loss of one batch that it draws from the generator, which is the CPU's; 0-dim,
            float32.
        schedule: How long and how fast.
        work: Folder of the state file.
        deadline: When to stop.
        seed: Of the draws.
        device: Where the networks are trained.

    Raises:
        OutOfTimeError: the deadline has passed; the state is saved.
        UserError: the state file is of other networks.
    """
    module = nn.ModuleDict(networks).to(device)
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, schedule.learning_rate, (0.9, 0.98), weight_decay=schedule.weight_decay, fused=True
    )
    averages = [weight.detach().clone() for weight in trained]
    path, start = work / f"{name}.safetensors", 0
    if path.is_file():
        start = _restore(path, module, optimizer, averages)
    module.train()
    since, losses = time.monotonic(), []
    for step in range(start, schedule.num_steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        keep = min(schedule.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [weight.detach() for weight in trained], 1 - keep)
        losses.append(loss.detach())
        done = step + 1
        if done % 100 == 0:
            rate = (time.monotonic() - since) / len(losses)
            print(
                f"{name}: step {done} of {schedule.num_steps}, "
                f"loss {torch.stack(losses).mean():.4f}, {1000 * rate:.0f} ms a step",
                flush=True,
            )
            since, losses = time.monotonic(), []
        stop = deadline.passed()
        if stop or done % 500 == 0 or done == schedule.num_steps:
            _save(path, module, optimizer, averages, done)
        if stop and done < schedule.num_steps:
            raise OutOfTimeError(f"{name}: stopped at step {done} of {schedule.num_steps}")
    for weight, average in zip(trained, averages, strict=True):
        weight.data.copy_(average)
    module.to(CPU).eval()


NETWORKS, AVERAGES, MOMENTS, STEP = "networks.", "averages.", "moments.", "step"


def _save(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Sequence[Tensor],
    step: int,
) -> None:
    """Write all that the next step depends on into one file."""
    tensors = {NETWORKS + name: value for name, value in module.state_dict().items()}
    tensors |= {f"{AVERAGES}{index}": value for index, value in enumerate(averages)}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{MOMENTS}{index}.{key}": value for key, value in moments.items()}
    tensors[STEP] = torch.tensor(step)
    write_file(path, save({name: value.contiguous() for name, value in tensors.items()}))


def _restore(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Sequence[Tensor],
) -> int:
    """Read what `_save` wrote into a training of the same networks; return the step to go on at.

    Raises:
        UserError: they are not the same.
    """
    tensors = load_file(path)

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }

    try:
        module.load_state_dict(part(NETWORKS))
    except RuntimeError as error:
        raise UserError(
            f"{path}: is of networks of other shapes; take another --work, or delete it and what "
            "was made after it"
        ) from error
    kept = part(AVERAGES)
    for index, average in enumerate(averages):
        average.copy_(kept[str(index)])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in part(MOMENTS).items():
        number, key = name.split(".")
        moments.setdefault(int(number), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return int(tensors[STEP])
