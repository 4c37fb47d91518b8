"""What the attention maps' kernels share: rows of a head in pieces, logits and maps of a tile.

A tile of keys is two pieces side by side, KEYS_MAIN and KEYS_REST columns wide, so that 77 text
tokens take 64 + 16 columns, not 128; the head dim is split alike (80 = 64 + 16).
"""

import triton
import triton.language as tl


@triton.jit
def _load_piece(
    ptr,
    rows,
    num_rows,
    stride,
    FIRST: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Return columns FIRST to FIRST + WIDTH of the rows at ``ptr``, 0 past the last column.

    Past the last row it is the last one again: a mask of each row would take registers.

    Args:
        ptr: [num_rows, HEAD_DIM], the head's first element.
        rows: int32 [n].
        num_rows: int32.
        stride: int32, elements between rows.
        FIRST: First column.
        WIDTH: Number of columns.
        HEAD_DIM: Columns that are there.
        UPCAST: Widen to float32.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + tl.minimum(rows, num_rows - 1)[:, None] * stride + columns[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        piece = tl.load(ptrs, mask=columns[None, :] < HEAD_DIM, other=0.0)
    else:
        piece = tl.load(ptrs)
    if UPCAST:
        piece = piece.to(tl.float32)
    return piece


@triton.jit
def load_rows(
    ptr,
    rows,
    num_rows,
    stride,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Return both pieces of the rows at ``ptr``; the first twice where there is one only."""
    main = _load_piece(ptr, rows, num_rows, stride, 0, DIM_MAIN, HEAD_DIM, UPCAST)
    if DIM_REST == 0:
        return main, main
    else:
        rest = _load_piece(ptr, rows, num_rows, stride, DIM_MAIN, DIM_REST, HEAD_DIM, UPCAST)
        return main, rest


@triton.jit
def products_of(
    query_main,
    query_rest,
    key_main,
    key_rest,
    scale,
    DIM_REST: tl.constexpr,  # noqa: N803
):
    """Return query @ key^T * scale [queries, keys] in float32; past the last key, the last again.

    That will do where those columns are not stored: a mask of each column takes registers.
    """
    products = tl.dot(query_main, tl.trans(key_main), input_precision="ieee")
    if DIM_REST > 0:
        products = tl.dot(query_rest, tl.trans(key_rest), products, input_precision="ieee")
    return products * scale


@triton.jit
def logits_of(
    query_main,
    query_rest,
    key_main,
    key_rest,
    keys,
    num_keys,
    scale,
    DIM_REST: tl.constexpr,  # noqa: N803
):
    """Return the same, -inf past the last key."""
    products = products_of(query_main, query_rest, key_main, key_rest, scale, DIM_REST)
    return products + tl.where(keys < num_keys, 0.0, float("-inf"))[None, :]


@triton.jit
def softmax_maps(
    query_main,
    query_rest,
    key_ptr,
    num_keys,
    stride,
    scale,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    KEYS_MAIN: tl.constexpr,  # noqa: N803
    KEYS_REST: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Return both pieces of a head's maps over all keys, which one tile holds, and the log sum exp.

    Without a second piece the first comes twice.

    Args:
        query_main: [queries, DIM_MAIN].
        query_rest: [queries, DIM_REST], not used where that is 0.
        key_ptr: [num_keys, HEAD_DIM], of this head.
        num_keys: K, at most KEYS_MAIN + KEYS_REST.
        stride: int32, elements between keys.
        scale: float32.
        HEAD_DIM: D.
        DIM_MAIN: Width of the first piece of the head dim.
        DIM_REST: Width of the second, or 0.
        KEYS_MAIN: Width of the first piece of the tile.
        KEYS_REST: Width of the second, or 0.
        UPCAST: Products in float32.
    """
    keys = tl.arange(0, KEYS_MAIN)
    key_main, key_rest = load_rows(
        key_ptr, keys, num_keys, stride, HEAD_DIM, DIM_MAIN, DIM_REST, UPCAST
    )
    main = logits_of(query_main, query_rest, key_main, key_rest, keys, num_keys, scale, DIM_REST)
    highest = tl.max(main, 1)
    if KEYS_REST > 0:
        keys = KEYS_MAIN + tl.arange(0, KEYS_REST)
        key_main, key_rest = load_rows(
            key_ptr, keys, num_keys, stride, HEAD_DIM, DIM_MAIN, DIM_REST, UPCAST
        )
        rest = logits_of(
            query_main, query_rest, key_main, key_rest, keys, num_keys, scale, DIM_REST
        )
        highest = tl.maximum(highest, tl.max(rest, 1))
    main = tl.exp(main - highest[:, None])
    total = tl.sum(main, 1)
    if KEYS_REST > 0:
        rest = tl.exp(rest - highest[:, None])
        total += tl.sum(rest, 1)
    share = 1.0 / total
    main *= share[:, None]
    if KEYS_REST > 0:
        return main, rest * share[:, None], highest + tl.log(total)
    else:
        return main, main, highest + tl.log(total)


@triton.jit
def shifted_maps(
    query_main,
    query_rest,
    key_ptr,
    keys,
    num_keys,
    stride,
    logsumexp,
    scale,
    MASK: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Return exp(logits - logsumexp) [queries, keys] of a head; with MASK 0 past the last key."""
    key_main, key_rest = load_rows(
        key_ptr, keys, num_keys, stride, HEAD_DIM, DIM_MAIN, DIM_REST, UPCAST
    )
    if MASK:
        logits = logits_of(
            query_main, query_rest, key_main, key_rest, keys, num_keys, scale, DIM_REST
        )
    else:
        logits = products_of(query_main, query_rest, key_main, key_rest, scale, DIM_REST)
    return tl.exp(logits - logsumexp[:, None])


@triton.jit
def load_grads(grad_ptr, rows, num_queries, keys, num_keys):
    """Return the maps' gradient [queries, keys] without its factor, 0 past the ends of [Q, K]."""
    mask = (rows[:, None] < num_queries) & (keys[None, :] < num_keys)
    return tl.load(grad_ptr + rows[:, None] * num_keys + keys[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    ptr,
    rows,
    num_rows,
    stride,
    main,
    rest,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
):
    """Store both pieces of the rows at ``ptr``; the second is not used where DIM_REST is 0."""
    ptrs = ptr + rows[:, None] * stride
    columns = tl.arange(0, DIM_MAIN)
    mask = (rows[:, None] < num_rows) & (columns[None, :] < HEAD_DIM)
    tl.store(ptrs + columns[None, :], main, mask=mask)
    if DIM_REST > 0:
        columns = DIM_MAIN + tl.arange(0, DIM_REST)
        mask = (rows[:, None] < num_rows) & (columns[None, :] < HEAD_DIM)
        tl.store(ptrs + columns[None, :], rest, mask=mask)


@triton.jit
def narrow(value, like, UPCAST: tl.constexpr):  # noqa: N803
    """Round float32 to what is multiplied with ``like``: bfloat16 for float16, for its range."""
    if UPCAST or like.dtype == tl.float32:
        return value.to(tl.float32)
    else:
        return value.to(tl.bfloat16)
