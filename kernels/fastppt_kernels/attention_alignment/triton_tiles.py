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
    """Return query @ key^T * scale [queries, keys] in float32, -inf past the last key."""
    products = tl.dot(query_main, tl.trans(key_main), input_precision="ieee")
    if DIM_REST > 0:
        products = tl.dot(query_rest, tl.trans(key_rest), products, input_precision="ieee")
    return products * scale + tl.where(keys < num_keys, 0.0, float("-inf"))[None, :]


@triton.jit
def maps_and_grads(
    query_main,
    query_rest,
    key_main,
    key_rest,
    logsumexp,
    grad_ptr,
    rows,
    num_queries,
    keys,
    num_keys,
    scale,
    DIM_REST: tl.constexpr,  # noqa: N803
):
    """Return the maps [queries, keys] of a head and the gradient of every map, without factor.

    Args:
        query_main: [queries, DIM_MAIN].
        query_rest: [queries, DIM_REST], not used where that is 0.
        key_main: [keys, DIM_MAIN].
        key_rest: [keys, DIM_REST].
        logsumexp: float32 [queries].
        grad_ptr: float32 [Q, K], of this batch.
        rows: int32 [queries].
        num_queries: Q.
        keys: int32 [keys].
        num_keys: K.
        scale: float32.
        DIM_REST: Width of the second piece of the head dim, or 0.
    """
    logits = logits_of(query_main, query_rest, key_main, key_rest, keys, num_keys, scale, DIM_REST)
    mask = (rows[:, None] < num_queries) & (keys[None, :] < num_keys)
    grads = tl.load(grad_ptr + rows[:, None] * num_keys + keys[None, :], mask=mask, other=0.0)
    return tl.exp(logits - logsumexp[:, None]), grads


@triton.jit
def narrow(value, like, UPCAST: tl.constexpr):  # noqa: N803
    """Round float32 to what is multiplied with ``like``: bfloat16 for float16, for its range."""
    if UPCAST or like.dtype == tl.float32:
        return value.to(tl.float32)
    else:
        return value.to(tl.bfloat16)
