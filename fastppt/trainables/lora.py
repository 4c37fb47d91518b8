"""Low-rank adapters on attention projections (Hu et al., arXiv 2106.09685).

Shape legend: M rows of an input, I input width, O output width, r rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastppt.config import LoraConfig
from fastppt.errors import UserError
from fastppt.families.attention import AdapterSwitch, Projections
from fastppt.trainables.arena import ParameterArena


@dataclass(frozen=True)
class LoraPair:
    """The adapter of one projection: what is added to its weight is ``scale * up @ down``.

    Attributes:
        name: Module path of the projection, such as ``mid_block....attn1.to_q``.
        down: [r, I], a view of the trained values.
        up: [O, r], likewise.
        scale: alpha / rank.
    """

    name: str
    down: Tensor
    up: Tensor
    scale: float


@dataclass
class JointLora:
    """Adapters of projections that share an input: one product for all their down-projections.

    Attributes:
        down: [n*r, I], the down-projections of the n adapted linears, stacked.
        ups: One entry a linear: [O, r], or None for a linear without an adapter.
        scale: alpha / rank.
        switch: Turns the adapters off for a base pass.
    """

    down: nn.Parameter
    ups: tuple[nn.Parameter | None, ...]
    scale: float
    switch: AdapterSwitch

    def __call__(self, inputs: Tensor, linears: tuple[nn.Linear, ...]) -> tuple[Tensor, ...]:
        """Return ``linear(x) + scale * x down^T up^T`` for each linear; inputs [..., I]."""
        rows_mi = inputs.flatten(0, -2)
        dtype, rank = inputs.dtype, self.down.shape[0] // self._num_adapted
        low_ranks = iter(F.linear(rows_mi, self.down.to(dtype)).split(rank, dim=1))
        outputs = []
        for linear, up in zip(linears, self.ups, strict=True):
            output = linear(rows_mi)
            if up is not None:
                output = output.addmm_(next(low_ranks), up.to(dtype).t(), alpha=self.scale)
            outputs.append(output.unflatten(0, inputs.shape[:-1]))
        return tuple(outputs)

    @property
    def _num_adapted(self) -> int:
        return sum(up is not None for up in self.ups)


class LoraAdapters:
    """All adapters of a network, in one arena.

    Down-projections start uniform in +-1/sqrt(I) and up-projections at zero, as in the paper's
    code and in peft, so a new adapter changes nothing.

    Args:
        groups: The projections of the frozen network, as `Family.make_adaptable` returns them.
        config: Rank, alpha and targets.
        seed: Of the initial down-projections; drawn on the CPU, so the same on every device.
        device: Where values and gradients live.
        dtype: Of values and gradients; float32 unless arithmetic is being checked.

    Attributes:
        pairs: The adapters by projection, in the order of the network's modules.
        arena: The flat buffers that hold them.
        switch: Turns all of them off for a base pass.

    Raises:
        UserError: a target matches no attention projection; the nearest are named.
    """

    def __init__(
        self,
        groups: Sequence[Projections],
        config: LoraConfig,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rank = config.rank
        self.alpha = config.alpha if config.alpha is not None else float(config.rank)
        self.switch = AdapterSwitch()
        adapted = _match(config.targets, [name for group in groups for name in group.names])
        layouts = [layout for group in groups if (layout := _Layout.of(group, adapted))]
        shapes = [shape for layout in layouts for shape in layout.shapes(self.rank)]
        self.arena = ParameterArena(shapes, device, dtype)
        tensors = iter(self.arena.tensors)
        self.pairs: list[LoraPair] = []
        for layout in layouts:
            joint = layout.build(tensors, self.alpha / self.rank, self.switch)
            layout.group.adapter = joint
            self.pairs.extend(layout.pairs(joint))
        generator = torch.Generator("cpu").manual_seed(seed)
        for pair in self.pairs:
            # kaiming_uniform with a = sqrt(5), as nn.Linear initialises itself.
            uniform = torch.rand(pair.down.shape, generator=generator, dtype=torch.float32)
            pair.down.copy_((2 * uniform - 1) * pair.down.shape[1] ** -0.5)

    @property
    def num_parameters(self) -> int:
        """Trained elements, padding not counted."""
        return sum(pair.down.numel() + pair.up.numel() for pair in self.pairs)

    def load(self, weights: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
        """Take values from elsewhere, keeping what each adapter adds to its weight.

        Args:
            weights: For each projection name: down [r, I], up [O, r], scale.

        Raises:
            UserError: another rank, a shape that does not fit, a projection without an adapter
                here, or an adapter here without values there. Nothing is written then.
        """
        here = {pair.name: pair for pair in self.pairs}
        for name, (down, up, _) in weights.items():
            if name not in here:
                raise UserError(
                    f"{name}: has an adapter in the file and none here; "
                    "set stage.0.trainables.lora.targets so that it matches"
                )
            if down.shape[0] != self.rank:
                raise UserError(
                    f"{name}: rank {down.shape[0]} in the file and {self.rank} here; "
                    f"set stage.0.trainables.lora.rank to {down.shape[0]}"
                )
            if (down.shape, up.shape) != (here[name].down.shape, here[name].up.shape):
                raise UserError(
                    f"{name}: shapes {tuple(down.shape)} and {tuple(up.shape)} in the file, "
                    f"{tuple(here[name].down.shape)} and {tuple(here[name].up.shape)} here; "
                    "it was made for another model"
                )
        missing = [name for name in here if name not in weights]
        if missing:
            raise UserError(
                f"{missing[0]}: has an adapter here and none in the file "
                f"({len(missing)} such); set stage.0.trainables.lora.targets so that it matches"
            )
        for name, (down, up, scale) in weights.items():
            pair = here[name]
            pair.down.copy_(down)
            pair.up.copy_(up * (scale / pair.scale) if scale != pair.scale else up)


@dataclass
class _Layout:
    """Which linears of a group are adapted, and so what it needs of the arena."""

    group: Projections
    adapted: tuple[bool, ...]

    @classmethod
    def of(cls, group: Projections, adapted: set[str]) -> _Layout | None:
        flags = tuple(name in adapted for name in group.names)
        return cls(group, flags) if any(flags) else None

    def shapes(self, rank: int) -> list[tuple[int, ...]]:
        ups = [
            (linear.out_features, rank)
            for linear, adapted in zip(self.group.linears, self.adapted, strict=True)
            if adapted
        ]
        return [(len(ups) * rank, self.group.linears[0].in_features), *ups]

    def build(
        self, tensors: Iterator[nn.Parameter], scale: float, switch: AdapterSwitch
    ) -> JointLora:
        down = next(tensors)
        ups = tuple(next(tensors) if adapted else None for adapted in self.adapted)
        return JointLora(down, ups, scale, switch)

    def pairs(self, joint: JointLora) -> Iterator[LoraPair]:
        rank = joint.down.shape[0] // sum(self.adapted)
        downs = iter(joint.down.detach().split(rank))
        for name, up in zip(self.group.names, joint.ups, strict=True):
            if up is not None:
                yield LoraPair(name, next(downs), up.detach(), joint.scale)


def _match(targets: list[str] | None, names: list[str]) -> set[str]:
    if targets is None:
        return set(names)
    adapted: set[str] = set()
    for target in targets:
        matches = [name for name in names if fnmatchcase(name, target)]
        if not matches:
            near = difflib.get_close_matches(target, names, n=3, cutoff=0.0)
            raise UserError(
                f"stage.0.trainables.lora.targets: {target!r} matches no attention projection; "
                f"the nearest are {', '.join(near)}"
            )
        adapted.update(matches)
    return adapted
