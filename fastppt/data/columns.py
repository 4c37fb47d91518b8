"""Which token of the class prompt each token of a subject prompt is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from fastppt.families.base import Family, TokenBlock

NOT_COMPARED = -1

# Which token of one text is compared with which of another, places counted from their starts.
Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Prompt:
    """A prompt that says where in it the subject stands.

    Attributes:
        pieces: The text before, between and after the places of the subject.
        words: What stands in these places.
    """

    pieces: tuple[str, ...]
    words: str

    @classmethod
    def of(cls, text: str, place: str, words: str) -> Prompt:
        """Make one of text with a mark such as ``{subject}`` in each place."""
        return cls(tuple(text.split(place)), words)

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.words.join(self.pieces)


@dataclass(frozen=True)
class Columns:
    """How a subject prompt and its class prompt line up.

    Attributes:
        columns: For each token of the subject prompt, padding included and counted over all blocks,
            the token of the class prompt; -1 for one that is not compared.
        lined_up: Every token of the subject prompt has a counterpart, but for the subject's own
            words and for what is cut off in the class prompt.
    """

    columns: list[int]
    lined_up: bool


def align_columns(family: Family, subject: Prompt, base: Prompt) -> Columns:
    """Find the column of the class prompt's attention maps for each column of the subject's.

    Text that both have before, between and after the places of the subject is compared token by
    token: what it begins with, and what it ends with. In the places, the tokens of the subject's
    words and of the class noun are compared likewise, and what is left of both one by one, as far
    as both go: a word that was learned for the class noun is compared with it, and "sks dog" with
    "dog" in "dog" alone. Padding is compared with padding at the same place, for what an encoder
    makes of it depends on its place.

    Where a tokenizer makes one token of a place and of what stands beside it ("{subject}s"), the
    prompts are compared as a whole: what both begin and what both end with.

    Source: Adaptive Personalized Training (arXiv 2507.02687) has prompts of one length, a learned
    token in the place of the class noun. The rest is our choice.

    Args:
        family: Its tokenizers know the learned words already.
        subject: The subject prompt.
        base: The class prompt.
    """
    columns: list[int] = []
    lined_up = True
    sides = zip(_split(family, subject), _split(family, base), strict=True)
    for ours, theirs in sides:
        assert ours.block.size == theirs.block.size
        if len(ours.parts) != len(theirs.parts):
            ours, theirs = ours.whole(), theirs.whole()
        start = len(columns)
        found = _align(ours, theirs)
        columns += [start + column if column >= 0 else column for column in found.columns]
        lined_up = lined_up and found.lined_up
    return Columns(columns, lined_up)


def count_places_read(family: Family, subject: Prompt) -> int:
    """Return how many times the subject's words are read to their end.

    Args:
        family: Its tokenizers know the learned words already.
        subject: A prompt; of its tokenizers the first counts, that of the CLIPs.
    """
    side = _split(family, subject)[0]
    last = len(side.block.ids) - 1
    return sum(
        start + len(part) <= last
        for index, (start, part) in enumerate(side.starts())
        if _is_place(index)
    )


def pair_ends(ours: Sequence[object], theirs: Sequence[object]) -> Pairs:
    """Pair what both begin with, and what both end with."""
    prefix = _num_equal(ours, theirs)
    # A token of the prefix is not taken a second time, as the last "a" of "a a" beside "a".
    rest = min(len(ours), len(theirs)) - prefix
    suffix = min(rest, _num_equal(ours[::-1], theirs[::-1]))
    ends = zip(
        range(len(ours) - suffix, len(ours)),
        range(len(theirs) - suffix, len(theirs)),
        strict=True,
    )
    return [*((place, place) for place in range(prefix)), *ends]


@dataclass(frozen=True)
class _Side:
    """A prompt's tokens, cut where the places of the subject are.

    Attributes:
        block: What the tokenizer makes of the whole prompt.
        parts: Text and places by turns, text first and last; as if nothing were cut off, start and
            end token left out. One part alone where the places cannot be told.
        words: The tokens of the words in the places.
        lead: Number of tokens before the first part.
    """

    block: TokenBlock
    parts: list[list[int]]
    words: list[int]
    lead: int

    def starts(self) -> Iterator[tuple[int, list[int]]]:
        """Give each part with its place in the prompt."""
        start = self.lead
        for part in self.parts:
            yield start, part
            start += len(part)

    def whole(self) -> _Side:
        """Return the same, its places not told apart."""
        return _Side(self.block, [self.block.ids[self.lead : -1]], self.words, self.lead)


def _is_place(index: int) -> bool:
    """Say whether a part is one of the places of the subject."""
    return index % 2 == 1


def _split(family: Family, prompt: Prompt) -> list[_Side]:
    """Return a prompt's tokens by tokenizer, cut where the places of the subject are."""
    # What a tokenizer makes of nothing is a start token, where it has one, and an end token.
    empty = family.token_blocks("")
    words = family.token_blocks(prompt.words)
    pieces = [family.token_blocks(piece.strip()) for piece in prompt.pieces]
    sides = []
    for index, block in enumerate(family.token_blocks(prompt.text)):
        lead, end = len(empty[index].ids) - 1, empty[index].ids[-1]
        own = words[index].ids[lead:-1]
        parts: list[list[int]] = []
        for piece in pieces:
            parts += [own, piece[index].ids[lead:-1]]
        parts = parts[1:]
        joined = [*block.ids[:lead], *(token for part in parts for token in part)]
        side = _Side(block, parts, own, lead)
        is_whole = [*joined[: block.size - 1], end] == block.ids
        sides.append(side if is_whole else side.whole())
    return sides


def _align(ours: _Side, theirs: _Side) -> Columns:
    """Return the columns of one block, counted from its start."""
    num_ours, num_theirs = len(ours.block.ids), len(theirs.block.ids)
    columns = [NOT_COMPARED] * ours.block.size
    columns[: ours.lead] = range(ours.lead)
    columns[num_ours - 1] = num_theirs - 1
    padding = max(num_ours, num_theirs)
    columns[padding:] = range(padding, ours.block.size)
    lined_up = True
    sides = zip(ours.starts(), theirs.starts(), strict=True)
    for index, ((our_start, our_part), (their_start, their_part)) in enumerate(sides):
        pairs = pair_ends(our_part, their_part)
        if _is_place(index):
            pairs += _pair_rest(our_part, their_part, pairs)
        else:
            alone = set(range(len(our_part))) - {column for column, _ in pairs}
            # Where places are not told apart, the words in them are known by their tokens.
            own = ours.words if len(ours.parts) == 1 else []
            is_cut = len(ours.parts) == 1 and num_theirs == theirs.block.size
            lined_up = lined_up and (is_cut or all(our_part[column] in own for column in alone))
        for column, other in pairs:
            if our_start + column < num_ours - 1 and their_start + other < num_theirs - 1:
                columns[our_start + column] = their_start + other
    return Columns(columns, lined_up)


def _pair_rest(ours: Sequence[int], theirs: Sequence[int], pairs: Pairs) -> Pairs:
    """Pair what is not paired yet one by one, as far as both go."""
    taken, other_taken = ({pair[side] for pair in pairs} for side in (0, 1))
    free = (place for place in range(len(ours)) if place not in taken)
    other_free = (place for place in range(len(theirs)) if place not in other_taken)
    return list(zip(free, other_free, strict=False))


def _num_equal(ours: Sequence[object], theirs: Sequence[object]) -> int:
    """Return how many items both begin with."""
    pairs = zip(ours, theirs, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
