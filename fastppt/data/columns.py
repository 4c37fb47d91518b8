"""Which token of the class prompt each token of a subject prompt is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from fastppt.families.base import TokenBlock

NOT_COMPARED = -1


def align_columns(subject: Sequence[TokenBlock], base: Sequence[TokenBlock]) -> list[int]:
    """Return the column of the class prompt's attention maps for each column of the subject's.

    What both prompts begin with, and what both end with, is compared token by token; what differs
    between them is not compared. So are "a photo of sks dog" and "a photo of a dog" compared in all
    but "sks". Padding is compared with padding at the same place, for what an encoder makes of it
    depends on its place.

    Source: our choice. Adaptive Personalized Training (arXiv 2507.02687) has prompts of one length,
    a learned token in the place of the class noun.

    Args:
        subject: The subject prompt's tokens, as `Family.token_blocks` returns them.
        base: The class prompt's, of as many blocks of the same sizes.

    Returns:
        One column a token, counted over all blocks; -1 for a token that is not compared.
    """
    columns: list[int] = []
    for ours, theirs in zip(subject, base, strict=True):
        assert ours.size == theirs.size
        start = len(columns)
        columns += [start + column if column >= 0 else column for column in _align(ours, theirs)]
    return columns


def _align(ours: TokenBlock, theirs: TokenBlock) -> list[int]:
    """Return the columns of one block, counted from its start."""
    num_ours, num_theirs = len(ours.ids), len(theirs.ids)
    prefix = _num_equal(ours.ids, theirs.ids)
    # A token of the prefix is not taken a second time, as the last "a" of "a a" beside "a".
    rest = min(num_ours, num_theirs) - prefix
    suffix = min(rest, _num_equal(ours.ids[::-1], theirs.ids[::-1]))
    columns = [NOT_COMPARED] * ours.size
    columns[:prefix] = range(prefix)
    columns[num_ours - suffix : num_ours] = range(num_theirs - suffix, num_theirs)
    padding = max(num_ours, num_theirs)
    columns[padding:] = range(padding, ours.size)
    return columns


def _num_equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = zip(ours, theirs, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
