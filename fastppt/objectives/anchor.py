"""The L2 anchor (Preserve and Personalize, arXiv 2505.19519, Algorithm 1, line 9).

penalty = weight * sum_i ||theta_i - theta_0_i||^2, over all elements of all trained tensors.

Its gradient enters inside the optimizer, before clipping, so that a step reads each parameter once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastppt.config import AnchorConfig
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.trainables import LORA, Trainables


def anchored_groups(
    trainables: Trainables, learning_rates: Mapping[str, Tensor], anchor: AnchorConfig | None
) -> list[dict[str, Any]]:
    """Return the `AnchoredAdamW` parameter groups that train all that moves, and hold it.

    Args:
        trainables: Each is a group of its own.
        learning_rates: 0-dim tensors on the device, by the name of the trainable.
        anchor: Weight, form and place of the anchor; None for no anchor.
    """
    return [anchored_group(trainables.lora, learning_rates[LORA], anchor)]


def anchored_group(
    adapters: LoraAdapters, learning_rate: Tensor, anchor: AnchorConfig | None
) -> dict[str, Any]:
    """Return the `AnchoredAdamW` parameter group that trains the adapters and holds them.

    Args:
        adapters: Their arena becomes the group's one parameter.
        learning_rate: 0-dim tensor on the device; the loop writes it, the step reads it.
        anchor: Weight, form and place of the anchor; None for no anchor.
    """
    group: dict[str, Any] = {"params": [adapters.arena.flat], "lr": learning_rate}
    if adapters.arena.working_copy is not None:
        group["working_copy"] = adapters.arena.working_copy
    if anchor is None:
        return group | {"anchor_weight": 0.0}
    group |= {"anchor_weight": anchor.weight, "form": anchor.form, "anchor": anchor.to}
    if anchor.form == "effective":
        group["lora_pairs"] = [(pair.down, pair.up, pair.scale) for pair in adapters.pairs]
    return group
