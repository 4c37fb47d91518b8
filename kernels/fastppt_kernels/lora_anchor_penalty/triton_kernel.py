"""The kernels of the LoRA anchor penalty.

A pair has two factors, seen alike as F [rank, columns]: its down A [rank, in], and the transpose
of its up, B^T [rank, out], which lies in memory as [out, rank]. With an anchor, the factors of a
side are U and V: U = A, V = Y = A - A0 of a down, U = X^T = (B - B0)^T, V = B0^T of an up; without
one, U = F alone. Then all that is needed of a side is the Grams U U^T, U V^T, V V^T, and all that
is added to its gradient is H1 U + H2 V, with H1 and H2 from the Grams of the other side.

Tables of work have TABLE_COLUMNS int64 a row, one row a program; ``plan.py`` writes them.
"""

import triton
import triton.language as tl

from fastppt_kernels.triton_foreign import advance, load_foreign, store_foreign


@triton.jit
def _tile(
    rank,
    width,
    first_rank,
    column,
    RANKS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    UP: tl.constexpr,  # noqa: N803
):
    """Return where a tile begins, and its offsets from there and its mask.

    [RANKS, COLUMNS] of a down, [COLUMNS, RANKS] of an up. Offsets are int32; the beginning is not.
    """
    ranks = tl.arange(0, RANKS)
    columns = tl.arange(0, COLUMNS)
    if UP:
        start = column.to(tl.int64) * rank + first_rank
        offsets = columns[:, None] * rank + ranks[None, :]
        mask = (column + columns[:, None] < width) & (first_rank + ranks[None, :] < rank)
    else:
        start = first_rank.to(tl.int64) * width + column
        offsets = ranks[:, None] * width + columns[None, :]
        mask = (first_rank + ranks[:, None] < rank) & (column + columns[None, :] < width)
    return start, offsets, mask


@triton.jit
def _load_factors(
    value_address,
    anchor_address,
    first_rank,
    column,
    rank,
    width,
    code,
    RANKS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    UP: tl.constexpr,  # noqa: N803
    ANCHORED: tl.constexpr,  # noqa: N803
):
    """Return U and V of a tile, as :func:`_tile` lays them; V is U without an anchor."""
    start, offsets, mask = _tile(rank, width, first_rank, column, RANKS, COLUMNS, UP)
    value_code = code & 3
    value = load_foreign(
        advance(value_address, start, value_code), offsets, mask, value_code, False
    )
    if ANCHORED:
        anchor_code = (code >> 2) & 3
        anchor = load_foreign(
            advance(anchor_address, start, anchor_code), offsets, mask, anchor_code, False
        )
        if UP:
            return value - anchor, anchor
        else:
            return value, value - anchor
    else:
        return value, value


@triton.jit
def _gram_side(
    row_ptr,
    scratch_ptr,
    UP: tl.constexpr,  # noqa: N803
    ANCHORED: tl.constexpr,  # noqa: N803
    ONE_TILE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    OTHER_TILE: tl.constexpr,  # noqa: N803
    CHUNK_COLUMNS: tl.constexpr,  # noqa: N803
    BLOCK_COLUMNS: tl.constexpr,  # noqa: N803
):
    """Write one tile of a chunk's Grams; see :func:`lora_gram_kernel`."""
    value_address = tl.load(row_ptr)
    anchor_address = tl.load(row_ptr + 1)
    width = tl.load(row_ptr + 3).to(tl.int32)
    rank = tl.load(row_ptr + 4).to(tl.int32)
    column = tl.load(row_ptr + 5).to(tl.int32)
    first = tl.load(row_ptr + 6).to(tl.int32)
    other_first = tl.load(row_ptr + 7).to(tl.int32)
    code = tl.load(row_ptr + 8).to(tl.int32)
    out_ptr = scratch_ptr + tl.load(row_ptr + 9)
    uu = tl.zeros([TILE, OTHER_TILE], tl.float32)
    if ANCHORED:
        uv = tl.zeros([TILE, OTHER_TILE], tl.float32)
        vv = tl.zeros([TILE, OTHER_TILE], tl.float32)
    last = tl.minimum(column + CHUNK_COLUMNS, width)
    while column < last:
        u, v = _load_factors(
            value_address,
            anchor_address,
            first,
            column,
            rank,
            width,
            code,
            TILE,
            BLOCK_COLUMNS,
            UP,
            ANCHORED,
        )
        if ONE_TILE:
            other_u, other_v = u, v
        else:
            other_u, other_v = _load_factors(
                value_address,
                anchor_address,
                other_first,
                column,
                rank,
                width,
                code,
                OTHER_TILE,
                BLOCK_COLUMNS,
                UP,
                ANCHORED,
            )
        if UP:
            uu = tl.dot(tl.trans(u), other_u, uu, input_precision="ieee")
            if ANCHORED:
                uv = tl.dot(tl.trans(u), other_v, uv, input_precision="ieee")
                vv = tl.dot(tl.trans(v), other_v, vv, input_precision="ieee")
        else:
            uu = tl.dot(u, tl.trans(other_u), uu, input_precision="ieee")
            if ANCHORED:
                uv = tl.dot(u, tl.trans(other_v), uv, input_precision="ieee")
                vv = tl.dot(v, tl.trans(other_v), vv, input_precision="ieee")
        column += BLOCK_COLUMNS
    ranks = first + tl.arange(0, TILE)
    other_ranks = other_first + tl.arange(0, OTHER_TILE)
    out = ranks[:, None] * rank + other_ranks[None, :]
    mask = (ranks[:, None] < rank) & (other_ranks[None, :] < rank)
    tl.store(out_ptr + out, uu, mask=mask)
    if ANCHORED:
        tl.store(out_ptr + rank * rank + out, uv, mask=mask)
        tl.store(out_ptr + 2 * rank * rank + out, vv, mask=mask)


@triton.jit
def lora_gram_kernel(
    table_ptr,
    scratch_ptr,
    ANCHORED: tl.constexpr,  # noqa: N803
    ONE_TILE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    OTHER_TILE: tl.constexpr,  # noqa: N803
    CHUNK_COLUMNS: tl.constexpr,  # noqa: N803
    BLOCK_COLUMNS: tl.constexpr,  # noqa: N803
):
    """Write one tile of the Grams of a chunk of columns: U U^T, and U V^T and V V^T.

    Products and sums in float32, never tf32.

    Memory traffic: each element of a factor (and of its anchor) is read once with ONE_TILE, else
    rank / TILE + rank / OTHER_TILE times, all but the first from the cache; 4 rank^2 bytes a Gram
    and chunk are written, which is rank / CHUNK_COLUMNS of what is read. FLOPs: 2 rank an element
    and Gram; at rank 32 that is 16 a byte, so that float32 arithmetic (14 FLOPs a byte of an
    H200's bandwidth) is the floor from there on.

    Args:
        table_ptr: int64 [programs, 10]: addresses of value, anchor and gradient; width, rank,
            first column, first rank of the tile's rows, first rank of its columns, code, place of
            the chunk's Grams in the scratch. Code: the dtypes of the three, two bits each; bit 8:
            it is an up.
        scratch_ptr: float32 [floats]; written at the places of the chunks, [rank, rank] a Gram.
        ANCHORED: There are anchors.
        ONE_TILE: All ranks are at most TILE, which is OTHER_TILE.
        TILE: Rows of a tile of a Gram; fewer than 64, or Triton (3.6, 3.7) takes tf32 on sm100
            though it is told not to.
        OTHER_TILE: Its columns.
        CHUNK_COLUMNS: Columns a chunk.
        BLOCK_COLUMNS: Columns loaded at a time.
    """
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 10
    if (tl.load(row_ptr + 8) >> 8) & 1 == 1:
        _gram_side(
            row_ptr,
            scratch_ptr,
            True,
            ANCHORED,
            ONE_TILE,
            TILE,
            OTHER_TILE,
            CHUNK_COLUMNS,
            BLOCK_COLUMNS,
        )
    else:
        _gram_side(
            row_ptr,
            scratch_ptr,
            False,
            ANCHORED,
            ONE_TILE,
            TILE,
            OTHER_TILE,
            CHUNK_COLUMNS,
            BLOCK_COLUMNS,
        )


@triton.jit
def _sum_chunks(partial_ptr, offsets, mask, num_chunks, stride):
    """Return the sum over the chunks, in their order, of the elements at ``offsets``."""
    total = tl.zeros(offsets.shape, tl.float32)
    chunk = num_chunks * 0
    while chunk < num_chunks:
        total += tl.load(partial_ptr + chunk * stride + offsets, mask=mask, other=0.0)
        chunk += 1
    return total


@triton.jit
def lora_reduce_kernel(
    table_ptr,
    scratch_ptr,
    penalty_ptr,
    weight_ptr,
    weight,
    ANCHORED: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Sum a pair's Grams over their chunks; write its part of the penalty and the H of its sides.

    With Grams of the down AA = A A^T, AY = A Y^T, YY and of the up XX = X^T X, XZ = X^T B0, ZZ:
        part = scale^2 (<XX, AA> + 2 <XZ, AY> + <ZZ, YY>)
        H1^T, H2 of the down = 2 weight scale^2 times XX + XZ = X^T B and XZ + ZZ = B^T B0
        H1, H2 of the up     = 2 weight scale^2 times AA and AY
    Without an anchor XX = B^T B, and the other Grams and H2 are left out. The H take the place of
    the Grams they come from, in the first chunk: each element is read once, by its writer, for
    which the down has the transpose of its H1 (XX is its own).

    Memory traffic: 4 bytes an element of each chunk's Grams, and of the H.

    Args:
        table_ptr: int64 [programs, 10]: rank, first element; place of the first chunk of the
            down's Grams in the scratch, number of the chunks, the same two of the up; place of the
            H of the down and of the up; the bits of float32 scale^2; place of the part.
        scratch_ptr: float32 [floats]; read at the Grams, written at the H.
        penalty_ptr: float32 [parts]; written.
        weight_ptr: float32 [], or None.
        weight: float32; used where ``weight_ptr`` is None.
        ANCHORED: There are anchors.
        BLOCK_SIZE: Elements of the [rank, rank] matrices a program.
    """
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 10
    rank = tl.load(row_ptr).to(tl.int32)
    element = tl.load(row_ptr + 1).to(tl.int32) + tl.arange(0, BLOCK_SIZE)
    down_ptr = scratch_ptr + tl.load(row_ptr + 2)
    down_chunks = tl.load(row_ptr + 3)
    up_ptr = scratch_ptr + tl.load(row_ptr + 4)
    up_chunks = tl.load(row_ptr + 5)
    down_h_ptr = scratch_ptr + tl.load(row_ptr + 6)
    up_h_ptr = scratch_ptr + tl.load(row_ptr + 7)
    squared_scale = tl.load(row_ptr + 8).to(tl.int32).to(tl.float32, bitcast=True)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr)
    factor = 2.0 * squared_scale * weight
    size = rank * rank
    mask = element < size
    stride = 3 * size if ANCHORED else size
    xx = _sum_chunks(up_ptr, element, mask, up_chunks, stride)
    aa = _sum_chunks(down_ptr, element, mask, down_chunks, stride)
    square = xx * aa
    if ANCHORED:
        xz = _sum_chunks(up_ptr + size, element, mask, up_chunks, stride)
        zz = _sum_chunks(up_ptr + 2 * size, element, mask, up_chunks, stride)
        ay = _sum_chunks(down_ptr + size, element, mask, down_chunks, stride)
        yy = _sum_chunks(down_ptr + 2 * size, element, mask, down_chunks, stride)
        square += 2.0 * xz * ay + zz * yy
        tl.store(down_h_ptr + element, factor * (xx + xz), mask=mask)
        tl.store(down_h_ptr + size + element, factor * (xz + zz), mask=mask)
        tl.store(up_h_ptr + element, factor * aa, mask=mask)
        tl.store(up_h_ptr + size + element, factor * ay, mask=mask)
    else:
        tl.store(down_h_ptr + element, factor * xx, mask=mask)
        tl.store(up_h_ptr + element, factor * aa, mask=mask)
    tl.store(penalty_ptr + tl.load(row_ptr + 9), squared_scale * tl.sum(square))


@triton.jit
def _apply_side(
    row_ptr,
    scratch_ptr,
    UP: tl.constexpr,  # noqa: N803
    ANCHORED: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    BLOCK_RANKS: tl.constexpr,  # noqa: N803
    BLOCK_COLUMNS: tl.constexpr,  # noqa: N803
):
    """Add one tile of H1 U + H2 V to the gradient; see :func:`lora_apply_kernel`."""
    value_address = tl.load(row_ptr)
    anchor_address = tl.load(row_ptr + 1)
    grad_address = tl.load(row_ptr + 2)
    width = tl.load(row_ptr + 3).to(tl.int32)
    rank = tl.load(row_ptr + 4).to(tl.int32)
    column = tl.load(row_ptr + 5).to(tl.int32)
    first = tl.load(row_ptr + 6).to(tl.int32)
    ranks = first + tl.arange(0, TILE)
    code = tl.load(row_ptr + 8).to(tl.int32)
    h_ptr = scratch_ptr + tl.load(row_ptr + 9)
    delta = tl.zeros([TILE, BLOCK_COLUMNS], tl.float32)
    inner_first = rank * 0
    while inner_first < rank:
        inner = inner_first + tl.arange(0, BLOCK_RANKS)
        u, v = _load_factors(
            value_address,
            anchor_address,
            inner_first,
            column,
            rank,
            width,
            code,
            BLOCK_RANKS,
            BLOCK_COLUMNS,
            UP,
            ANCHORED,
        )
        if UP:
            u, v = tl.trans(u), tl.trans(v)
        h_offsets = ranks[:, None] * rank + inner[None, :]
        h_mask = (ranks[:, None] < rank) & (inner[None, :] < rank)
        # An anchored down has the transpose of its H1.
        h1_offsets = h_offsets if UP or not ANCHORED else inner[None, :] * rank + ranks[:, None]
        h1 = tl.load(h_ptr + h1_offsets, mask=h_mask, other=0.0)
        delta = tl.dot(h1, u, delta, input_precision="ieee")
        if ANCHORED:
            h2 = tl.load(h_ptr + rank * rank + h_offsets, mask=h_mask, other=0.0)
            delta = tl.dot(h2, v, delta, input_precision="ieee")
        inner_first += BLOCK_RANKS
    start, offsets, mask = _tile(rank, width, first, column, TILE, BLOCK_COLUMNS, UP)
    grad_code = (code >> 4) & 3
    grad_address = advance(grad_address, start, grad_code)
    if UP:
        delta = tl.trans(delta)
    grad = load_foreign(grad_address, offsets, mask, grad_code, False)
    store_foreign(grad_address, offsets, grad + delta, mask, grad_code, False)


@triton.jit
def lora_apply_kernel(
    table_ptr,
    scratch_ptr,
    ANCHORED: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    BLOCK_RANKS: tl.constexpr,  # noqa: N803
    BLOCK_COLUMNS: tl.constexpr,  # noqa: N803
):
    """Add one tile of H1 U + H2 V to the gradient of a factor.

    Products and sums in float32, never tf32; a narrow gradient is rounded once.

    Memory traffic: each element of a factor (and of its anchor) is read ceil(rank / TILE) times,
    all but the first from the cache; each of the gradient is read and written once. FLOPs: 2 rank
    an element (4 rank with an anchor).

    Args:
        table_ptr: int64 [programs, 10], as of :func:`lora_gram_kernel`; the last entry is the
            place of H1 (of an anchored down its transpose) in the scratch, which H2 follows.
        scratch_ptr: float32 [floats].
        ANCHORED: There are anchors.
        TILE: Ranks a tile; fewer than 64, as of :func:`lora_gram_kernel`.
        BLOCK_RANKS: Ranks summed over at a time.
        BLOCK_COLUMNS: Columns a tile.
    """
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 10
    if (tl.load(row_ptr + 8) >> 8) & 1 == 1:
        _apply_side(row_ptr, scratch_ptr, True, ANCHORED, TILE, BLOCK_RANKS, BLOCK_COLUMNS)
    else:
        _apply_side(row_ptr, scratch_ptr, False, ANCHORED, TILE, BLOCK_RANKS, BLOCK_COLUMNS)
