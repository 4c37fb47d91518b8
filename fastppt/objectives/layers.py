"""Which layers an objective looks at, and where they leave what they find.

A layer is looked at twice a step: in the base pass, which is remembered, and in the tuned pass,
which is compared with it. What stands in a layer is called in the middle of a pass, perhaps from
compiled code; so all that it does to the outside is to set an attribute.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from torch import Tensor

from fastppt.errors import UserError


@dataclass
class Outbox:
    """Where a layer of the tuned pass leaves its losses, 0-dim each."""

    losses: tuple[Tensor, ...] = ()


class Sender(Protocol):
    """What stands in a layer during the tuned pass."""

    outbox: Outbox


def collect(senders: Iterable[Sender]) -> list[tuple[Tensor, ...]]:
    """Return the losses of a tuned pass, one entry a layer, before its backward pass begins.

    Where blocks are checkpointed they run once more in the backward pass. From now on all senders
    share one outbox that nobody reads: what they send again is not counted, and holds no more than
    one layer's graph.
    """
    losses = []
    unread = Outbox()
    for sender in senders:
        assert sender.outbox.losses, "the pass did not reach a layer that is looked at"
        losses.append(sender.outbox.losses)
        sender.outbox = unread
    return losses


def match_layers(
    patterns: Sequence[str] | None, names: Collection[str], blocks: Sequence[str], key: str
) -> list[str]:
    """Return the names that a pattern matches, in their own order.

    Args:
        patterns: Where ``*`` matches any text, dots included; None takes what lies in the blocks.
        names: Paths of all layers that can be looked at.
        blocks: Paths of the family's blocks.
        key: The setting, for messages.

    Raises:
        UserError: a pattern matches nothing; the nearest names are named. Or the blocks hold none
            of the layers.
    """
    if patterns is None:
        inside = tuple(f"{block}." for block in blocks)
        found = [name for name in names if name in blocks or name.startswith(inside)]
        if not found:
            raise UserError(
                f"{key}: is not set, and {', '.join(blocks)} of this model have no such layer; "
                f"set it to patterns of your own, such as [{next(iter(names), '')!r}]"
            )
        return found
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UserError(
                f"{key}: {pattern!r} matches no layer that can be held to the base; "
                f"the nearest are {', '.join(near)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
