"""Which of many names a user's patterns choose."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from fastppt.errors import UserError


def match_targets(
    targets: Sequence[str] | None, names: Sequence[str], what: str, key: str
) -> list[str]:
    """Return the names that a pattern matches, in their order.

    Args:
        targets: The patterns, in which * matches any text, dots included; None takes all names.
        names: What there is.
        what: What a name is of, such as `attention projection`.
        key: Of the table in the configuration that holds ``targets``, for messages.

    Raises:
        UserError: a pattern matches nothing; the nearest names are listed.
    """
    if targets is None:
        return [*names]
    chosen: set[str] = set()
    for target in targets:
        matches = [name for name in names if fnmatchcase(name, target)]
        if not matches:
            near = difflib.get_close_matches(target, names, n=3, cutoff=0.0)
            raise UserError(
                f"{key}.targets: {target!r} matches no {what}; the nearest are {', '.join(near)}"
            )
        chosen.update(matches)
    return [name for name in names if name in chosen]
