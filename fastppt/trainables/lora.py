"""Low-rank adapters on attention projections (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from fastppt.errors import UserError
from fastppt.families.attention import AdapterSwitch, Projections
from fastppt.trainables.arena import ParameterArena
from fastppt.trainables.joint_lora import JointLora
from fastppt.trainables.targets import match_targets
from fastppt.trainables_config import LoraConfig


@dataclass(frozen=True)
class LoraPair:
    """The adapter of one projection: what is added to its weight is ``scale * up @ down``.

    Shape legend: I input width, O output width, r rank.

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


class LoraAdapters:
    """All adapters of a network, in one arena.

    Down-projections start uniform in +-1/sqrt(I) and up-projections at zero, as in the paper's
    code and in peft, so a new adapter changes nothing.

    Args:
        groups: The projections of the frozen network, as `Family.make_adaptable` returns them.
        config: Rank, alpha and targets, these as patterns: what ``"up"`` stands for, the family
            says.
        seed: Of the initial down-projections; drawn on the CPU, so the same on every device.
        device: Where values and gradients live.
        dtype: Of values and gradients; float32 unless arithmetic is being checked.
        key: The trainable's table in the configuration, for messages.

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
        key: str = "stage.0.trainables.lora",
    ) -> None:
        assert not isinstance(config.targets, str)
        self._key = key
        self.rank = config.rank
        self.alpha = config.alpha if config.alpha is not None else float(config.rank)
        self.switch = AdapterSwitch()
        names = [name for group in groups for name in group.names]
        adapted = {*match_targets(config.targets, names, "attention projection", key)}
        layouts = [layout for group in groups if (layout := _Layout.of(group, adapted))]
        shapes = [shape for layout in layouts for shape in layout.shapes(self.rank)]
        working_dtype = groups[0].linears[0].weight.dtype
        self.arena = ParameterArena(shapes, device, dtype, working_dtype)
        tensors = iter(zip(self.arena.tensors, self.arena.working, strict=True))
        self.pairs: list[LoraPair] = []
        for layout in layouts:
            down, working_down = next(tensors)
            up, working_up = next(tensors)
            joint = JointLora(
                down=down,
                up=up,
                working_down=working_down,
                working_up=working_up,
                whole=self.arena.flat,
                adapted=layout.adapted,
                scale=self.alpha / self.rank,
                switch=self.switch,
            )
            layout.group.adapt(joint)
            self.pairs.extend(layout.pairs(joint))
        generator = torch.Generator("cpu").manual_seed(seed)
        for pair in self.pairs:
            # kaiming_uniform with a = sqrt(5), as nn.Linear initialises itself.
            uniform = torch.rand(pair.down.shape, generator=generator, dtype=torch.float32)
            pair.down.copy_((2 * uniform - 1) * pair.down.shape[1] ** -0.5)
        self.refresh()

    def refresh(self) -> None:
        """Let the network see the values as they are now.

        Whoever writes values calls this after, but for the optimizer, whose update writes both: a
        network in another dtype than theirs computes with a copy. One launch for all adapters;
        none where there is no copy.
        """
        self.arena.refresh()

    @property
    def arenas(self) -> dict[str, ParameterArena]:
        """The one arena."""
        return {"": self.arena}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All trained values, views of the arena, by projection and side."""
        return {
            f"{pair.name}.{side}": tensor
            for pair in self.pairs
            for side, tensor in (("lora_down", pair.down), ("lora_up", pair.up))
        }

    def base(self) -> AbstractContextManager[None]:
        """Run the passes inside without the adapters: by a flag, so at no cost."""
        return self.switch.base()

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
                    f"set {self._key}.targets so that it matches"
                )
            if down.shape[0] != self.rank:
                raise UserError(
                    f"{name}: rank {down.shape[0]} in the file and {self.rank} here; "
                    f"set {self._key}.rank to {down.shape[0]}"
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
                f"({len(missing)} such); set {self._key}.targets so that it matches"
            )
        for name, (down, up, scale) in weights.items():
            pair = here[name]
            pair.down.copy_(down)
            pair.up.copy_(up * (scale / pair.scale) if scale != pair.scale else up)
        self.refresh()


@dataclass(frozen=True)
class _Layout:
    """Which linears of a group are adapted, and so what it needs of the arena."""

    group: Projections
    adapted: tuple[bool, ...]

    @classmethod
    def of(cls, group: Projections, adapted: set[str]) -> _Layout | None:
        flags = tuple(name in adapted for name in group.names)
        return cls(group, flags) if any(flags) else None

    def shapes(self, rank: int) -> list[tuple[int, ...]]:
        linear, num_adapted = self.group.linears[0], sum(self.adapted)
        down = (num_adapted * rank, linear.in_features)
        return [down, (num_adapted, linear.out_features, rank)]

    def pairs(self, joint: JointLora) -> Iterator[LoraPair]:
        ups = joint.up.detach().unbind()
        downs = joint.down.detach().split(ups[0].shape[1])
        names = compress(self.group.names, self.adapted)
        for name, down, up in zip(names, downs, ups, strict=True):
            yield LoraPair(name, down, up, joint.scale)
