"""The kernels of the attention maps: log sum exp, head sums, difference from the base.

Tiles of keys and the head dim come in two pieces: see ``triton_tiles.py``. Strides come in units
of STRIDE_UNIT elements: at 8 the compiler knows that 16 bytes can be loaded at a time. Offsets of
batch and head are int64; those of tokens int32.
"""

import triton
import triton.language as tl

from fastppt_kernels.attention_alignment.triton_tiles import (
    load_rows,
    logits_of,
    shifted_maps,
    softmax_maps,
)


@triton.jit(
    do_not_specialize=[
        "stride_qb",
        "stride_qh",
        "stride_qn",
        "stride_kb",
        "stride_kh",
        "stride_kn",
        "num_heads",
        "num_queries",
        "num_keys",
    ]
)
def attention_logsumexp_kernel(
    query_ptr,
    key_ptr,
    logsumexp_ptr,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    num_heads,
    num_queries,
    num_keys,
    STRIDE_UNIT: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    BLOCK_QUERIES: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Write log sum_k exp(q k^T * scale) of every head and query, over all keys.

    Grid: (blocks of queries, heads, batch). For keys that do not fit in one tile, whose maps need
    it before their first column can be written.

    Memory traffic: the queries once, the keys once a block, 4 bytes a query and head.
    FLOPs: 2 H Q K D.

    Args:
        query_ptr: [B, H, Q, HEAD_DIM]; float32, bfloat16 or float16.
        key_ptr: [B, H, K, HEAD_DIM], of that dtype.
        logsumexp_ptr: float32 [B, H, Q]; written.
        scale: float32.
        stride_qb: Between batches of the query, in STRIDE_UNIT; then heads and tokens, and keys.
        stride_qh: As above.
        stride_qn: As above.
        stride_kb: As above.
        stride_kh: As above.
        stride_kn: As above.
        num_heads: H.
        num_queries: Q.
        num_keys: K.
        STRIDE_UNIT: Elements.
        HEAD_DIM: D.
        DIM_MAIN: Width of the first piece of the head dim.
        DIM_REST: Width of the second, or 0.
        KEYS: Keys taken at a time.
        BLOCK_QUERIES: Queries a program.
        UPCAST: Products in float32 for narrow inputs too: the interpreter has no bfloat16 ones.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    unit_head = head.to(tl.int64) * STRIDE_UNIT
    unit_batch = batch.to(tl.int64) * STRIDE_UNIT
    query_ptr += unit_batch * stride_qb + unit_head * stride_qh
    key_ptr += unit_batch * stride_kb + unit_head * stride_kh
    query_main, query_rest = load_rows(
        query_ptr, rows, num_queries, stride_qn * STRIDE_UNIT, HEAD_DIM, DIM_MAIN, DIM_REST, UPCAST
    )
    highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    first = num_keys * 0
    while first < num_keys:
        keys = first + tl.arange(0, KEYS)
        key_main, key_rest = load_rows(
            key_ptr, keys, num_keys, stride_kn * STRIDE_UNIT, HEAD_DIM, DIM_MAIN, DIM_REST, UPCAST
        )
        logits = logits_of(
            query_main, query_rest, key_main, key_rest, keys, num_keys, scale, DIM_REST
        )
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        highest = higher
        first += KEYS
    logsumexp_ptr += (batch.to(tl.int64) * num_heads + head) * num_queries
    tl.store(logsumexp_ptr + rows, highest + tl.log(total), mask=rows < num_queries)


@triton.jit(
    do_not_specialize=[
        "stride_qb",
        "stride_qh",
        "stride_qn",
        "stride_kb",
        "stride_kh",
        "stride_kn",
        "num_batches",
        "num_heads",
        "group_heads",
        "num_queries",
        "num_keys",
    ]
)
def attention_map_sum_kernel(
    query_ptr,
    key_ptr,
    logsumexp_ptr,
    sum_ptr,
    other_sum_ptr,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    num_batches,
    num_heads,
    group_heads,
    num_queries,
    num_keys,
    STRIDE_UNIT: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    KEYS_MAIN: tl.constexpr,  # noqa: N803
    KEYS_REST: tl.constexpr,  # noqa: N803
    BLOCK_QUERIES: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Write the sum over a group of heads of the maps of a block of queries and a tile of keys.

    Grid: (blocks of queries, tiles of keys, groups * batch). Heads are summed in their order.

    Memory traffic: the queries once a tile, the keys once a block, 4 Q K bytes a group, and 4 bytes
    a query and head of a logsumexp. FLOPs: 2 H Q K D, and H Q K exponentials.

    Args:
        query_ptr: [B, H, Q, HEAD_DIM]; float32, bfloat16 or float16.
        key_ptr: [B, H, K, HEAD_DIM], of that dtype.
        logsumexp_ptr: float32 [B, H, Q]; maps are exp(logits - logsumexp). None: a softmax over
            the keys, which one tile holds.
        sum_ptr: float32 [B, Q, K]; written with the first group's.
        other_sum_ptr: float32 [groups - 1, B, Q, K]; written with those of the others.
        scale: float32.
        stride_qb: Between batches of the query, in STRIDE_UNIT; then heads and tokens, and keys.
        stride_qh: As above.
        stride_qn: As above.
        stride_kb: As above.
        stride_kh: As above.
        stride_kn: As above.
        num_batches: B.
        num_heads: H.
        group_heads: Heads a group; the last group may have fewer.
        num_queries: Q.
        num_keys: K.
        STRIDE_UNIT: Elements.
        HEAD_DIM: D.
        DIM_MAIN: Width of the first piece of the head dim.
        DIM_REST: Width of the second, or 0.
        KEYS_MAIN: Width of the first piece of a tile.
        KEYS_REST: Width of the second, or 0.
        BLOCK_QUERIES: Queries a program.
        UPCAST: Products in float32 for narrow inputs too: the interpreter has no bfloat16 ones.
    """
    group = tl.program_id(2) // num_batches
    batch = (tl.program_id(2) % num_batches).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    keys = tl.program_id(1) * (KEYS_MAIN + KEYS_REST) + tl.arange(0, KEYS_MAIN)
    query_ptr += batch * stride_qb * STRIDE_UNIT
    key_ptr += batch * stride_kb * STRIDE_UNIT
    sum_main = tl.zeros([BLOCK_QUERIES, KEYS_MAIN], tl.float32)
    if KEYS_REST > 0:
        rest_keys = tl.program_id(1) * (KEYS_MAIN + KEYS_REST) + KEYS_MAIN
        rest_keys += tl.arange(0, KEYS_REST)
        sum_rest = tl.zeros([BLOCK_QUERIES, KEYS_REST], tl.float32)
    head = group.to(tl.int64) * group_heads
    last = tl.minimum(head + group_heads, num_heads)
    # Not a loop of a constant length, which LLVM unrolls until registers spill.
    while head < last:
        head_key_ptr = key_ptr + head * stride_kh * STRIDE_UNIT
        query_main, query_rest = load_rows(
            query_ptr + head * stride_qh * STRIDE_UNIT,
            rows,
            num_queries,
            stride_qn * STRIDE_UNIT,
            HEAD_DIM,
            DIM_MAIN,
            DIM_REST,
            UPCAST,
        )
        if logsumexp_ptr is None:
            main, rest, _ = softmax_maps(
                query_main,
                query_rest,
                head_key_ptr,
                num_keys,
                stride_kn * STRIDE_UNIT,
                scale,
                HEAD_DIM,
                DIM_MAIN,
                DIM_REST,
                KEYS_MAIN,
                KEYS_REST,
                UPCAST,
            )
            sum_main += main
            if KEYS_REST > 0:
                sum_rest += rest
        else:
            place = (batch * num_heads + head) * num_queries
            logsumexp = tl.load(logsumexp_ptr + place + tl.minimum(rows, num_queries - 1))
            sum_main += shifted_maps(
                query_main,
                query_rest,
                head_key_ptr,
                keys,
                num_keys,
                stride_kn * STRIDE_UNIT,
                logsumexp,
                scale,
                False,
                HEAD_DIM,
                DIM_MAIN,
                DIM_REST,
                UPCAST,
            )
            if KEYS_REST > 0:
                sum_rest += shifted_maps(
                    query_main,
                    query_rest,
                    head_key_ptr,
                    rest_keys,
                    num_keys,
                    stride_kn * STRIDE_UNIT,
                    logsumexp,
                    scale,
                    False,
                    HEAD_DIM,
                    DIM_MAIN,
                    DIM_REST,
                    UPCAST,
                )
        head += 1
    if group > 0:
        sum_ptr = other_sum_ptr + (group - 1).to(tl.int64) * num_batches * num_queries * num_keys
    sum_ptr += batch * num_queries * num_keys
    is_row = rows[:, None] < num_queries
    offsets = rows[:, None] * num_keys + keys[None, :]
    tl.store(sum_ptr + offsets, sum_main, mask=is_row & (keys[None, :] < num_keys))
    if KEYS_REST > 0:
        offsets = rows[:, None] * num_keys + rest_keys[None, :]
        tl.store(sum_ptr + offsets, sum_rest, mask=is_row & (rest_keys[None, :] < num_keys))


@triton.jit(do_not_specialize=["num_groups", "num_queries", "num_keys", "num_columns"])
def attention_difference_kernel(
    sum_ptr,
    other_sum_ptr,
    base_ptr,
    columns_ptr,
    partial_ptr,
    num_groups,
    num_queries,
    num_keys,
    num_columns,
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Add the groups' sums in place, subtract the base, and write each block's sum of squares.

    Grid: (blocks of the elements [Q, K], batch). Groups are added in their order.

    Memory traffic: 4 bytes an element for each group, 4 for the base, 4 written.
    FLOPs: groups + 3 an element.

    Args:
        sum_ptr: float32 [B, Q, K], the first group's; becomes the sum, or the difference.
        other_sum_ptr: float32 [num_groups - 1, B, Q, K].
        base_ptr: float32 [B, Q, num_columns], or None: only add.
        columns_ptr: int64 [B, K], the base's column of each, -1: the difference is 0, past the
            base's: NaN; or None: its own.
        partial_ptr: float32 [programs]; written. None without a base.
        num_groups: Groups.
        num_queries: Q.
        num_keys: K.
        num_columns: Columns of the base.
        BLOCK_SIZE: Elements a program.
    """
    batch = tl.program_id(1).to(tl.int64)
    size = num_queries * num_keys
    element = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = element < size
    own_ptr = sum_ptr + batch * size + element
    value = tl.load(own_ptr, mask=mask, other=0.0)
    group_size = tl.num_programs(1).to(tl.int64) * size
    group_ptr = other_sum_ptr + batch * size
    group = num_groups * 0 + 1
    while group < num_groups:
        value += tl.load(group_ptr + element, mask=mask, other=0.0)
        group_ptr += group_size
        group += 1
    if base_ptr is not None:
        row = element // num_keys
        column = (element % num_keys).to(tl.int64)
        if columns_ptr is not None:
            column = tl.load(columns_ptr + batch * num_keys + column, mask=mask, other=-1)
        is_column = (column >= 0) & (column < num_columns)
        offsets = (batch * num_queries + row) * num_columns + column
        value -= tl.load(base_ptr + offsets, mask=mask & is_column, other=0.0)
        value = tl.where(is_column, value, tl.where(column == -1, 0.0, float("nan")))
        value = tl.where(mask, value, 0.0)
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial_ptr + place, tl.sum(value * value))
    tl.store(own_ptr, value, mask=mask)
