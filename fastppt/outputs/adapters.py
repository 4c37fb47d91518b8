"""A LoRA file in memory: one form for all forms on disk.

Shape legend: I input width, O output width, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastppt.families.lora_keys import Detection, LayerName

Form = Literal["kohya", "diffusers", "peft"]
FORMS: tuple[Form, ...] = ("kohya", "diffusers", "peft")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Adapter:
    """What is added to one layer's weight: ``alpha / rank * up @ down``.

    Attributes:
        down: [r, I], or [r, I, 1, 1] of a 1x1 convolution; host.
        up: [O, r], or [O, r, 1, 1]; host.
        alpha: Strength.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Inner dimension r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied by: alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, whatever its form.

    Attributes:
        adapters: By component and module path, in the order of the file.
        metadata: What the file says of itself, without what only its form needs.
        form: That it was read from.
        detection: The model family that it is for.
    """

    adapters: dict[LayerName, Adapter]
    metadata: dict[str, str]
    form: Form
    detection: Detection

    @property
    def components(self) -> dict[str, dict[str, Adapter]]:
        """The adapters of each component by module path."""
        found: dict[str, dict[str, Adapter]] = {}
        for (component, path), one in self.adapters.items():
            found.setdefault(component, {})[path] = one
        return found

    def cast(self, dtype: torch.dtype) -> LoraFile:
        """Return the file with its tensors in another type; alphas stay as they are."""
        return self._map(lambda one: Adapter(one.down.to(dtype), one.up.to(dtype), one.alpha))

    def folded(self) -> LoraFile:
        """Return the file with alpha / rank taken into the up side, so that alpha is the rank."""
        return self._map(
            lambda one: (
                one
                if one.alpha == one.rank
                else Adapter(one.down, one.up * one.scale, float(one.rank))
            )
        )

    def _map(self, change: Callable[[Adapter], Adapter]) -> LoraFile:
        return replace(self, adapters={name: change(one) for name, one in self.adapters.items()})
