"""What patterns in a configuration choose."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from fastppt.errors import UserError


def match_targets(
    targets: Sequence[str] | None, names: Sequence[str], what: str, key: str
) -> list[str]:
    """Return the names that one of the patterns matches, in their own order.

    Args:
        targets: Patterns, in which * matches any text, dots included; None for all names.
        names: What can be chosen.
        what: What a name is of, such as "attention projection".
        key: The trainable's table in the configuration, for messages.

    Raises:
        UserError: a pattern matches nothing; the nearest names are given.
    """
    if targets is None:
        return [*names]
    for target in targets:
        if not any(fnmatchcase(name, target) for name in names):
            near = difflib.get_close_matches(target, names, n=3, cutoff=0.0)
            raise UserError(
                f"{key}.targets: {target!r} matches no {what}; the nearest are {', '.join(near)}"
            )
    return [name for name in names if any(fnmatchcase(name, target) for target in targets)]
