"""Adapters that the peft library knows besides LoRA: DoRA, LoHa, LoKr, OFT and BOFT."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppt.families.attention import AdapterSwitch, Projections
from fastppt.trainables.arena import ParameterArena
from fastppt.trainables.rotations import Boft, Oft
from fastppt.trainables.targets import match_targets
from fastppt.trainables.tuners import Dora, Loha, Lokr, Tuner, Values
from fastppt.trainables_config import (
    AdapterConfig,
    BoftConfig,
    DoraConfig,
    LohaConfig,
    LokrConfig,
    OftConfig,
)

DEFAULT_BLOCK_SIZE = 32
"""Of OFT where the configuration says nothing: peft's default."""


class PeftAdapters:
    """All adapters of one kind in a network, in one arena.

    A new adapter changes nothing. The network computes with the values as they are, rounded where
    it is in 16 bits: there is no copy of them to keep up.

    Args:
        groups: The projections of the frozen network, as `Family.make_adaptable` returns them.
        config: The kind, its settings and targets.
        seed: Of the initial values; drawn on the CPU, so the same on every device.
        device: Where values and gradients live.
        dtype: Of values and gradients; float32 unless arithmetic is being checked.
        key: The trainable's table in the configuration, for messages.

    Attributes:
        tuner: The kind, and its settings.
        values: The parameters of each adapted projection, by its module path and by their names in
            peft's files; views of the arena.
        arena: The flat buffers that hold them.
        switch: Turns all of them off for a base pass.

    Raises:
        UserError: a target matches no attention projection, or a projection does not fit the
            settings.
    """

    def __init__(
        self,
        groups: Sequence[Projections],
        config: AdapterConfig,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        key: str,
    ) -> None:
        self.tuner = make_tuner(config)
        self.switch = AdapterSwitch()
        linears = {
            name: linear
            for group in groups
            for name, linear in zip(group.names, group.linears, strict=True)
        }
        adapted = match_targets(config.targets, [*linears], "attention projection", key)
        self.tuner.check({name: linears[name].in_features for name in adapted}, key)
        shapes = {name: self.tuner.shapes(linears[name]) for name in adapted}
        every_shape = [shape for by_name in shapes.values() for shape in by_name.values()]
        self.arena = ParameterArena(every_shape, device, dtype)
        tensors = iter(self.arena.tensors)
        self.values: dict[str, Values] = {
            name: {part: next(tensors) for part in by_name} for name, by_name in shapes.items()
        }
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, values in self.values.items():
            detached = {part: value.detach() for part, value in values.items()}
            self.tuner.initialize_(detached, linears[name], generator)
        for group in groups:
            by_linear = tuple(self.values.get(name) for name in group.names)
            if any(by_linear):
                group.adapt(TunedProjections(self.tuner, by_linear, self.switch))

    @property
    def arenas(self) -> dict[str, ParameterArena]:
        """The one arena."""
        return {"": self.arena}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All trained values, views of the arena, by projection and name."""
        return {
            f"{name}.{part}": value.detach()
            for name, values in self.values.items()
            for part, value in values.items()
        }

    def refresh(self) -> None:
        """Do nothing: the network computes with the values themselves."""

    def base(self) -> AbstractContextManager[None]:
        """Run the passes inside without the adapters: by a flag, so at no cost."""
        return self.switch.base()

    @property
    def are_held(self) -> bool:
        """Say whether the values have a limit, which `hold_` keeps them to after an update."""
        return isinstance(self.tuner, Oft) and self.tuner.constraint is not None

    @torch.no_grad()
    def hold_(self, skipped: Tensor) -> None:
        """Take rotations that went too far back to their limit.

        Args:
            skipped: 0-dim bool, whether the update was: then all values stay as they are.
        """
        assert isinstance(self.tuner, Oft)
        for values in self.values.values():
            self.tuner.hold_(values, skipped)


@dataclass(frozen=True)
class TunedProjections:
    """The adapters of linear projections that share an input, as `ProjectionAdapter` says.

    Attributes:
        tuner: How they change the projections.
        values: Of each linear; None for one that is left as it is.
        switch: Turns them off for a base pass.
    """

    tuner: Tuner
    values: tuple[Values | None, ...]
    switch: AdapterSwitch

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Return the n projections, each [..., O], of [..., I] inputs."""
        weights = weight.chunk(len(self.values))
        biases = [None] * len(weights) if bias is None else bias.chunk(len(weights))
        return tuple(
            F.linear(inputs, own_weight, own_bias)
            if values is None
            else self.tuner.project(inputs, own_weight, own_bias, values)
            for own_weight, own_bias, values in zip(weights, biases, self.values, strict=True)
        )


def make_tuner(config: AdapterConfig) -> Tuner:
    """Return the kind of adapters that a table of the configuration describes."""
    match config:
        case DoraConfig():
            return Dora(config.rank, _scale(config.rank, config.alpha))
        case LohaConfig():
            return Loha(config.rank, _scale(config.rank, config.alpha))
        case LokrConfig():
            scale = _scale(config.rank, config.alpha)
            return Lokr(config.rank, scale, config.decompose_factor)
        case OftConfig():
            size = config.block_size
            if config.num_blocks is None and size is None:
                size = DEFAULT_BLOCK_SIZE
            return Oft(size, config.num_blocks, config.constraint)
        case BoftConfig():
            return Boft(config.block_size, config.factors)
        case _:
            raise AssertionError(type(config).__name__)


def _scale(rank: int, alpha: float | None) -> float:
    return 1.0 if alpha is None else alpha / rank
