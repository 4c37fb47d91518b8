"""Which program of the LoRA kernels does what: the tables of their work, for any list of pairs.

Shape suffixes: p pairs, f factors (2 p: the down and the up of each pair in turn), c chunks.
"""

import struct
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastppt_kernels.launch import split_into_chunks

# Columns summed in one go (few enough for float32, many enough for few partial Grams), and those
# loaded at a time.
GRAM_COLUMNS = 512
GRAM_BLOCK = 32
# Columns of a tile of a gradient, and ranks summed over at a time.
APPLY_COLUMNS = 128
APPLY_RANKS = 16
# Elements of the [rank, rank] matrices a program of the reduction.
REDUCE_SIZE = 1024
# int64 entries a row; even, so that each table begins at a multiple of 16 bytes.
TABLE_COLUMNS = 10
UP_BIT = 1 << 8


class Variant(NamedTuple):
    """How the kernels are compiled for some of the pairs.

    Attributes:
        tile: Rows of a tile of a Gram, and ranks of a tile of a gradient: 16 for ranks up to 16,
            else 32.
        other_tile: Columns of a tile of a Gram: 64 for ranks beyond 32.
        anchored: The pairs have anchors.
    """

    tile: int
    other_tile: int
    anchored: bool

    @property
    def gram_warps(self) -> int:
        """Warps of a program of the Gram kernel: 8 or 16 sums a thread and Gram, or they spill."""
        return max(1, self.tile * self.other_tile // 512) * (2 if self.anchored else 1)


VARIANTS = tuple(
    Variant(*tiles, anchored)
    for tiles in ((16, 16), (32, 32), (32, 64))
    for anchored in (False, True)
)


class PairKey(NamedTuple):
    """All that the work on a pair depends on; addresses and codes: down, up, of each list.

    Attributes:
        rank: Its rank.
        widths: in and out.
        scale: Its scale.
        values: Addresses of A and B.
        anchors: Of A0 and B0, 0 without an anchor.
        grads: Of the gradients, 0 without.
        codes: Dtypes of value, anchor and gradient, two bits each.
    """

    rank: int
    widths: tuple[int, int]
    scale: float
    values: tuple[int, int]
    anchors: tuple[int, int]
    grads: tuple[int, int]
    codes: tuple[int, int]


@dataclass(frozen=True)
class Work:
    """The pairs of one variant: where the tables of the three kernels lie, in rows."""

    variant: Variant
    gram: range
    reduce: range
    apply: range


@dataclass(frozen=True)
class Plan:
    """The work on a list of pairs.

    Attributes:
        rows: int64 [rows, TABLE_COLUMNS], on the host.
        works: One for each variant that occurs.
        num_floats: Size of the scratch.
        num_parts: Parts of the penalty.
    """

    rows: Tensor
    works: tuple[Work, ...]
    num_floats: int
    num_parts: int


def variant_of(pair: PairKey) -> Variant:
    """Return the variant that works on ``pair``."""
    tile = 16 if pair.rank <= 16 else 32
    return Variant(tile, tile if pair.rank <= tile else 64, pair.anchors[0] != 0)


def make_plan(pairs: tuple[PairKey, ...]) -> Plan:
    """Return the work on ``pairs``, none of which has an empty tensor."""
    alike: defaultdict[Variant, list[PairKey]] = defaultdict(list)
    for pair in pairs:
        alike[variant_of(pair)].append(pair)
    tables: list[Tensor] = []
    works = []
    num_rows = num_floats = num_parts = 0
    for variant, members in alike.items():
        places = []
        made, added_floats, added_parts = _tables(variant, members, num_floats, num_parts)
        for table in made:
            places.append(range(num_rows, num_rows + len(table)))
            num_rows += len(table)
        tables += made
        num_floats += added_floats
        num_parts += added_parts
        works.append(Work(variant, *places))
    return Plan(torch.cat(tables), tuple(works), num_floats, num_parts)


def _tables(
    variant: Variant, pairs: list[PairKey], floats_before: int, parts_before: int
) -> tuple[list[Tensor], int, int]:
    """Return the tables of the three kernels, and the floats and parts they use."""
    ranks_f = torch.tensor([pair.rank for pair in pairs]).repeat_interleave(2)
    widths_f = torch.tensor([pair.widths for pair in pairs]).view(-1)
    addresses_f = [
        torch.tensor([getattr(pair, name) for pair in pairs]).view(-1)
        for name in ("values", "anchors", "grads")
    ]
    codes_f = torch.tensor([pair.codes for pair in pairs]).view(-1)
    codes_f[1::2] |= UP_BIT
    squares_f = ranks_f**2
    tiles_f = (ranks_f + variant.tile - 1) // variant.tile
    other_tiles_f = (ranks_f + variant.other_tile - 1) // variant.other_tile

    # The scratch: the Grams of each chunk, by factor. H1 and H2 of a factor take the place of the
    # other factor's Grams in its first chunk.
    index_c, start_c = split_into_chunks(widths_f, GRAM_COLUMNS)
    num_chunks_f = (widths_f + GRAM_COLUMNS - 1) // GRAM_COLUMNS
    floats_c = squares_f[index_c] * (3 if variant.anchored else 1)
    ends_c = floats_c.cumsum(0)
    place_c = ends_c - floats_c + floats_before
    place_f = place_c[num_chunks_f.cumsum(0) - num_chunks_f]
    h_f = place_f.view(-1, 2).flip(1).reshape(-1)

    def rows(factor: Tensor, start: Tensor, i: Tensor, j: Tensor, place: Tensor) -> Tensor:
        columns = [addresses[factor] for addresses in addresses_f]
        columns += [widths_f[factor], ranks_f[factor], start]
        columns += [i * variant.tile, j * variant.other_tile]
        return torch.stack([*columns, codes_f[factor], place], dim=1)

    # Each chunk once for each tile of the Gram.
    chunk, tile = _repeat((tiles_f * other_tiles_f)[index_c])
    factor = index_c[chunk]
    i, j = tile // other_tiles_f[factor], tile % other_tiles_f[factor]
    gram = rows(factor, start_c[chunk], i, j, place_c[chunk])

    index_c, start_c = split_into_chunks(widths_f, APPLY_COLUMNS)
    chunk, tile = _repeat(tiles_f[index_c])
    factor = index_c[chunk]
    apply = rows(factor, start_c[chunk], tile, torch.zeros_like(tile), h_f[factor])

    pair, element = split_into_chunks(squares_f[::2], REDUCE_SIZE)
    scales_p = torch.tensor([_float32_bits(pair.scale**2) for pair in pairs])
    columns = [ranks_f[::2][pair], element]
    for place in (place_f[::2], num_chunks_f[::2], place_f[1::2], num_chunks_f[1::2]):
        columns.append(place[pair])
    columns += [h_f[::2][pair], h_f[1::2][pair], scales_p[pair]]
    reduce = torch.stack([*columns, torch.arange(len(pair)) + parts_before], dim=1)
    return [gram, reduce, apply], int(ends_c[-1]), len(reduce)


def _repeat(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of each of ``counts`` that many times, and the number of the repeat."""
    index = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return index, torch.arange(len(index)) - (counts.cumsum(0) - counts)[index]


def _float32_bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
