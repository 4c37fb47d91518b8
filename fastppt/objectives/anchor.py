"""The L2 anchor (Preserve and Personalize, arXiv 2505.19519, Algorithm 1, line 9).

penalty = weight * sum_i ||theta_i - theta_0_i||^2, over all elements of all trained tensors.

Its gradient enters inside the optimizer, before clipping, so that a step reads each parameter once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastppt.stage_config import AnchorConfig
from fastppt.trainables.arena import ParameterArena
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.network_weights import NetworkWeights
from fastppt.trainables.peft_tuners import PeftAdapters
from fastppt.trainables.svdiff import SpectralShifts
from fastppt.trainables.trainables import Trainables, part_name


def anchored_groups(
    trainables: Trainables,
    learning_rates: Mapping[str, Tensor],
    anchor: AnchorConfig | None,
    moments: str = "fp32",
) -> list[dict[str, Any]]:
    """Return the `AnchoredAdamW` parameter groups that train all that moves, and hold it.

    What is no LoRA has no effective form and is held as it is: the network's own weights are what
    the network sees, and spectral shifts are as long as what they change (of others, our choice).
    Only adapters of the network can be held at zero, and what else a run trains then stays where it
    started: a word at zero is none.

    Args:
        trainables: Each arena is a group of its own, in the order of `Trainables.arenas`.
        learning_rates: 0-dim tensors on the device, by the names of the arenas that are trained;
            the others get no group.
        anchor: Weight, form and place of the anchor; None for no anchor.
        moments: How those of the network's own weights are kept, "fp32" or "8bit".
    """
    groups = []
    for name, trainable in trainables.parts.items():
        for part, arena in trainable.arenas.items():
            rate = learning_rates.get(part_name(name, part))
            if rate is None:
                continue
            if isinstance(trainable, LoraAdapters):
                groups.append(anchored_group(trainable, rate, anchor))
            elif isinstance(trainable, NetworkWeights):
                groups.append(anchored_weights(trainable, rate, anchor, moments))
            else:
                group = _anchored_values(arena, rate, anchor)
                if anchor is not None and isinstance(trainable, PeftAdapters | SpectralShifts):
                    group["anchor"] = anchor.to
                groups.append(group)
    return groups


def anchored_group(
    adapters: LoraAdapters, learning_rate: Tensor, anchor: AnchorConfig | None
) -> dict[str, Any]:
    """Return the `AnchoredAdamW` parameter group that trains the adapters and holds them.

    Args:
        adapters: Their arena becomes the group's one parameter.
        learning_rate: 0-dim tensor on the device; the loop writes it, the step reads it.
        anchor: Weight, form and place of the anchor; None for no anchor.
    """
    group = _group(adapters.arena, learning_rate)
    if anchor is None:
        return group | {"anchor_weight": 0.0}
    group |= {"anchor_weight": anchor.weight, "form": anchor.form, "anchor": anchor.to}
    if anchor.form == "effective":
        group["lora_pairs"] = [(pair.down, pair.up, pair.scale) for pair in adapters.pairs]
    return group


def anchored_weights(
    weights: NetworkWeights, learning_rate: Tensor, anchor: AnchorConfig | None, moments: str
) -> dict[str, Any]:
    """Return the `AnchoredAdamW` parameter group that trains a network's own weights.

    They are held to the pretrained ones, of which there is one set, whoever reads it.

    Args:
        weights: Their arena becomes the group's one parameter.
        learning_rate: 0-dim tensor on the device; the loop writes it, the step reads it.
        anchor: Weight and form of the anchor; None for no anchor.
        moments: "fp32" or "8bit".
    """
    group = _anchored_values(weights.arena, learning_rate, anchor) | {"moments": moments}
    if weights.rounds_stochastically:
        group["rounding"] = "stochastic"
    if anchor is not None and anchor.weight > 0:
        group |= {"anchor": [weights.pretrained], "share_anchor": True}
        group["anchor_storage"] = anchor.storage
    return group


def _anchored_values(
    arena: ParameterArena, learning_rate: Tensor, anchor: AnchorConfig | None
) -> dict[str, Any]:
    group = _group(arena, learning_rate)
    if anchor is None:
        return group | {"anchor_weight": 0.0}
    form = "raw" if anchor.form == "effective" else anchor.form
    return group | {"anchor_weight": anchor.weight, "form": form, "anchor": "start"}


def _group(arena: ParameterArena, learning_rate: Tensor) -> dict[str, Any]:
    group: dict[str, Any] = {"params": [arena.flat], "lr": learning_rate}
    if arena.working_copy is not None:
        group["working_copy"] = arena.working_copy
    return group
