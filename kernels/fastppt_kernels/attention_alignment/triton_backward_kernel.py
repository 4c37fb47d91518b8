"""The kernels of the attention maps' gradients.

dP = factor * grad_map, the same for every head; P = exp(logits - logsumexp);
dlogits = P * (dP - rowsum(P * dP)), or P * dP where the logsumexp is one of its own, which then
gets -rowsum(P * dP); dQ = scale dlogits K, dK = scale dlogits^T Q.

Queries and keys have a kernel each: a fused one would take 3 products instead of 4 (2 H Q K D
FLOPs each), but hold a block's dQ and a tile's dK at once, which does not fit in registers at a
head dim of 160, and would have a program only for each head and split of the queries (40 to 70 for
SDXL's layers) where the queries' kernel has one for each block (320 to 640).

Tiles of keys and the head dim come in two pieces: see ``triton_tiles.py``. Strides come in units
of STRIDE_UNIT elements: at 8 the compiler knows that 16 bytes can be loaded at a time. Offsets of
batch and head are int64; those of tokens int32.
"""

import triton
import triton.language as tl

from fastppt_kernels.attention_alignment.triton_tiles import (
    load_rows,
    maps_and_grads,
    narrow,
)


@triton.jit
def _store_piece(
    ptr,
    rows,
    num_rows,
    stride,
    value,
    FIRST: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
):
    """Store ``value`` [n, WIDTH] at columns FIRST to FIRST + WIDTH of the rows at ``ptr``."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = (rows[:, None] < num_rows) & (columns[None, :] < HEAD_DIM)
    tl.store(ptr + rows[:, None] * stride + columns[None, :], value, mask=mask)


@triton.jit
def _load_maps(
    query_main,
    query_rest,
    key_ptr,
    stride_kn,
    logsumexp,
    grad_ptr,
    rows,
    num_queries,
    keys,
    num_keys,
    scale,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Return both pieces of the keys, and the maps and grads [queries, keys] of a head.

    Where it is called twice for the same keys the compiler keeps the first call's results.
    """
    key_main, key_rest = load_rows(
        key_ptr, keys, num_keys, stride_kn, HEAD_DIM, DIM_MAIN, DIM_REST, UPCAST
    )
    maps, grads = maps_and_grads(
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
        DIM_REST,
    )
    return key_main, key_rest, maps, grads


@triton.jit
def _add_products(
    query_main,
    query_rest,
    key_ptr,
    stride_kn,
    logsumexp,
    grad_ptr,
    rows,
    num_queries,
    keys,
    num_keys,
    scale,
    sums,
    total_main,
    total_rest,
    GIVEN_LOGSUMEXP: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Return the rows' sums, and both pieces of dlogits K with those of ``keys`` added.

    With GIVEN_LOGSUMEXP the sums of P * grad grow by those of ``keys``; otherwise they are there.
    """
    key_main, key_rest, maps, grads = _load_maps(
        query_main,
        query_rest,
        key_ptr,
        stride_kn,
        logsumexp,
        grad_ptr,
        rows,
        num_queries,
        keys,
        num_keys,
        scale,
        HEAD_DIM,
        DIM_MAIN,
        DIM_REST,
        UPCAST,
    )
    if GIVEN_LOGSUMEXP:
        dlogits = maps * grads
        sums += tl.sum(dlogits, 1)
    else:
        dlogits = maps * (grads - sums[:, None])
    dlogits = narrow(dlogits, key_main, UPCAST)
    key = narrow(key_main, key_main, UPCAST)
    total_main = tl.dot(dlogits, key, total_main, input_precision="ieee")
    if DIM_REST > 0:
        key = narrow(key_rest, key_rest, UPCAST)
        total_rest = tl.dot(dlogits, key, total_rest, input_precision="ieee")
    return sums, total_main, total_rest


@triton.jit(
    do_not_specialize=[
        "stride_qb",
        "stride_qh",
        "stride_qn",
        "stride_kb",
        "stride_kh",
        "stride_kn",
        "stride_gb",
        "stride_gh",
        "stride_gn",
        "num_heads",
        "num_queries",
        "num_keys",
    ]
)
def attention_map_backward_query_kernel(
    query_ptr,
    key_ptr,
    logsumexp_ptr,
    grad_map_ptr,
    grad_ptr,
    grad_query_ptr,
    sums_ptr,
    factor,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_gb,
    stride_gh,
    stride_gn,
    num_heads,
    num_queries,
    num_keys,
    GIVEN_LOGSUMEXP: tl.constexpr,  # noqa: N803
    STRIDE_UNIT: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    KEYS_MAIN: tl.constexpr,  # noqa: N803
    KEYS_REST: tl.constexpr,  # noqa: N803
    ONE_TILE: tl.constexpr,  # noqa: N803
    BLOCK_QUERIES: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Write the gradient of the queries, and for each row what the keys' or logsumexp's needs.

    Grid: (blocks of queries, heads, batch).

    Memory traffic: query, its gradient, and grad_map for each head (all but the first from the
    cache) once; the keys once a block; 8 bytes a query and head. FLOPs: 4 H Q K D, and 6 H Q K D
    for a softmax over more than one tile, whose maps are computed twice.

    Args:
        query_ptr: [B, H, Q, HEAD_DIM]; float32, bfloat16 or float16.
        key_ptr: [B, H, K, HEAD_DIM], of that dtype.
        logsumexp_ptr: float32 [B, H, Q].
        grad_map_ptr: float32 [B, Q, K].
        grad_ptr: float32 [].
        grad_query_ptr: [B, H, Q, HEAD_DIM], of the query's dtype; written.
        sums_ptr: float32 [B, H, Q]; written: rowsum(P * grad_map), or with GIVEN_LOGSUMEXP the
            gradient of the logsumexp.
        factor: float32; dP = factor * grad * grad_map.
        scale: float32.
        stride_qb: Between batches of the query, in STRIDE_UNIT; then heads and tokens; then of the
            key, and of the query's gradient.
        stride_qh: As above.
        stride_qn: As above.
        stride_kb: As above.
        stride_kh: As above.
        stride_kn: As above.
        stride_gb: As above.
        stride_gh: As above.
        stride_gn: As above.
        num_heads: H.
        num_queries: Q.
        num_keys: K.
        GIVEN_LOGSUMEXP: The logsumexp is a variable of its own, not that of the softmax.
        STRIDE_UNIT: Elements.
        HEAD_DIM: D.
        DIM_MAIN: Width of the first piece of the head dim.
        DIM_REST: Width of the second, or 0.
        KEYS_MAIN: Width of the first piece of a tile.
        KEYS_REST: Width of the second, or 0.
        ONE_TILE: One tile holds all keys, and there is no GIVEN_LOGSUMEXP.
        BLOCK_QUERIES: Queries a program.
        UPCAST: Products in float32 for narrow inputs too: the interpreter has no bfloat16 ones.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    is_row = rows < num_queries
    query_ptr += (batch * stride_qb + head * stride_qh) * STRIDE_UNIT
    key_ptr += (batch * stride_kb + head * stride_kh) * STRIDE_UNIT
    grad_query_ptr += (batch * stride_gb + head * stride_gh) * STRIDE_UNIT
    grad_map_ptr += batch * num_queries * num_keys
    place = (batch * num_heads + head) * num_queries
    query_main, query_rest = load_rows(
        query_ptr, rows, num_queries, stride_qn * STRIDE_UNIT, HEAD_DIM, DIM_MAIN, DIM_REST, UPCAST
    )
    logsumexp = tl.load(logsumexp_ptr + place + tl.minimum(rows, num_queries - 1))
    sums = tl.zeros([BLOCK_QUERIES], tl.float32)
    total_main = tl.zeros([BLOCK_QUERIES, DIM_MAIN], tl.float32)
    # Not used without a second piece.
    total_rest = total_main
    if DIM_REST > 0:
        total_rest = tl.zeros([BLOCK_QUERIES, DIM_REST], tl.float32)
    keys = tl.arange(0, KEYS_MAIN)
    if KEYS_REST > 0:
        rest_keys = KEYS_MAIN + tl.arange(0, KEYS_REST)
    if ONE_TILE:
        _, _, maps, grads = _load_maps(
            query_main,
            query_rest,
            key_ptr,
            stride_kn * STRIDE_UNIT,
            logsumexp,
            grad_map_ptr,
            rows,
            num_queries,
            keys,
            num_keys,
            scale,
            HEAD_DIM,
            DIM_MAIN,
            DIM_REST,
            UPCAST,
        )
        sums += tl.sum(maps * grads, 1)
        if KEYS_REST > 0:
            _, _, maps, grads = _load_maps(
                query_main,
                query_rest,
                key_ptr,
                stride_kn * STRIDE_UNIT,
                logsumexp,
                grad_map_ptr,
                rows,
                num_queries,
                rest_keys,
                num_keys,
                scale,
                HEAD_DIM,
                DIM_MAIN,
                DIM_REST,
                UPCAST,
            )
            sums += tl.sum(maps * grads, 1)
        sums, total_main, total_rest = _add_products(
            query_main,
            query_rest,
            key_ptr,
            stride_kn * STRIDE_UNIT,
            logsumexp,
            grad_map_ptr,
            rows,
            num_queries,
            keys,
            num_keys,
            scale,
            sums,
            total_main,
            total_rest,
            GIVEN_LOGSUMEXP,
            HEAD_DIM,
            DIM_MAIN,
            DIM_REST,
            UPCAST,
        )
        if KEYS_REST > 0:
            sums, total_main, total_rest = _add_products(
                query_main,
                query_rest,
                key_ptr,
                stride_kn * STRIDE_UNIT,
                logsumexp,
                grad_map_ptr,
                rows,
                num_queries,
                rest_keys,
                num_keys,
                scale,
                sums,
                total_main,
                total_rest,
                GIVEN_LOGSUMEXP,
                HEAD_DIM,
                DIM_MAIN,
                DIM_REST,
                UPCAST,
            )
    else:
        first = num_keys * 0
        if not GIVEN_LOGSUMEXP:
            while first < num_keys:
                _, _, maps, grads = _load_maps(
                    query_main,
                    query_rest,
                    key_ptr,
                    stride_kn * STRIDE_UNIT,
                    logsumexp,
                    grad_map_ptr,
                    rows,
                    num_queries,
                    first + keys,
                    num_keys,
                    scale,
                    HEAD_DIM,
                    DIM_MAIN,
                    DIM_REST,
                    UPCAST,
                )
                sums += tl.sum(maps * grads, 1)
                if KEYS_REST > 0:
                    _, _, maps, grads = _load_maps(
                        query_main,
                        query_rest,
                        key_ptr,
                        stride_kn * STRIDE_UNIT,
                        logsumexp,
                        grad_map_ptr,
                        rows,
                        num_queries,
                        first + rest_keys,
                        num_keys,
                        scale,
                        HEAD_DIM,
                        DIM_MAIN,
                        DIM_REST,
                        UPCAST,
                    )
                    sums += tl.sum(maps * grads, 1)
                first += KEYS_MAIN + KEYS_REST
        first = num_keys * 0
        while first < num_keys:
            sums, total_main, total_rest = _add_products(
                query_main,
                query_rest,
                key_ptr,
                stride_kn * STRIDE_UNIT,
                logsumexp,
                grad_map_ptr,
                rows,
                num_queries,
                first + keys,
                num_keys,
                scale,
                sums,
                total_main,
                total_rest,
                GIVEN_LOGSUMEXP,
                HEAD_DIM,
                DIM_MAIN,
                DIM_REST,
                UPCAST,
            )
            if KEYS_REST > 0:
                sums, total_main, total_rest = _add_products(
                    query_main,
                    query_rest,
                    key_ptr,
                    stride_kn * STRIDE_UNIT,
                    logsumexp,
                    grad_map_ptr,
                    rows,
                    num_queries,
                    first + rest_keys,
                    num_keys,
                    scale,
                    sums,
                    total_main,
                    total_rest,
                    GIVEN_LOGSUMEXP,
                    HEAD_DIM,
                    DIM_MAIN,
                    DIM_REST,
                    UPCAST,
                )
            first += KEYS_MAIN + KEYS_REST
    factor = factor * tl.load(grad_ptr)
    if GIVEN_LOGSUMEXP:
        sums = -factor * sums
    tl.store(sums_ptr + place + rows, sums, mask=is_row)
    factor = factor * scale
    stride_gn = stride_gn * STRIDE_UNIT
    _store_piece(
        grad_query_ptr, rows, num_queries, stride_gn, factor * total_main, 0, DIM_MAIN, HEAD_DIM
    )
    if DIM_REST > 0:
        _store_piece(
            grad_query_ptr,
            rows,
            num_queries,
            stride_gn,
            factor * total_rest,
            DIM_MAIN,
            DIM_REST,
            HEAD_DIM,
        )


@triton.jit(
    do_not_specialize=[
        "stride_qb",
        "stride_qh",
        "stride_qn",
        "stride_kb",
        "stride_kh",
        "stride_kn",
        "stride_gs",
        "stride_gb",
        "stride_gh",
        "stride_gn",
        "num_heads",
        "num_queries",
        "num_keys",
    ]
)
def attention_map_backward_key_kernel(
    query_ptr,
    key_ptr,
    logsumexp_ptr,
    sums_ptr,
    grad_map_ptr,
    grad_ptr,
    grad_key_ptr,
    factor,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_gs,
    stride_gb,
    stride_gh,
    stride_gn,
    num_heads,
    num_queries,
    num_keys,
    GIVEN_LOGSUMEXP: tl.constexpr,  # noqa: N803
    STRIDE_UNIT: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    BLOCK_QUERIES: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Write the gradient of a piece of keys from a split of the queries, in the queries' order.

    Grid: (splits of BLOCKS * BLOCK_QUERIES queries, pieces of keys, heads * batch).

    Memory traffic: queries and keys once, grad_map for each head (all but the first from the
    cache), 8 bytes a query and head, and the gradient once a split. FLOPs: 4 H Q K D.

    Args:
        query_ptr: [B, H, Q, HEAD_DIM]; float32, bfloat16 or float16.
        key_ptr: [B, H, K, HEAD_DIM], of that dtype.
        logsumexp_ptr: float32 [B, H, Q].
        sums_ptr: float32 [B, H, Q], rowsum(P * grad_map); not read with GIVEN_LOGSUMEXP.
        grad_map_ptr: float32 [B, Q, K].
        grad_ptr: float32 [].
        grad_key_ptr: [splits, B, H, K, HEAD_DIM], float32 or, of one split, the key's dtype;
            written.
        factor: float32; dP = factor * grad * grad_map.
        scale: float32.
        stride_qb: Between batches of the query, in STRIDE_UNIT; then heads and tokens; then of the
            key.
        stride_qh: As above.
        stride_qn: As above.
        stride_kb: As above.
        stride_kh: As above.
        stride_kn: As above.
        stride_gs: Between splits of the key's gradient, in elements; then batches, heads, tokens.
        stride_gb: As above.
        stride_gh: As above.
        stride_gn: As above.
        num_heads: H.
        num_queries: Q.
        num_keys: K.
        GIVEN_LOGSUMEXP: The logsumexp is a variable of its own, not that of the softmax.
        STRIDE_UNIT: Elements.
        HEAD_DIM: D.
        DIM_MAIN: Width of the first piece of the head dim.
        DIM_REST: Width of the second, or 0.
        KEYS: Keys a program.
        BLOCK_QUERIES: Queries taken at a time.
        BLOCKS: Blocks of queries a split.
        UPCAST: Products in float32 for narrow inputs too: the interpreter has no bfloat16 ones.
    """
    head = (tl.program_id(2) % num_heads).to(tl.int64)
    batch = (tl.program_id(2) // num_heads).to(tl.int64)
    query_ptr += (batch * stride_qb + head * stride_qh) * STRIDE_UNIT
    key_ptr += (batch * stride_kb + head * stride_kh) * STRIDE_UNIT
    grad_map_ptr += batch * num_queries * num_keys
    place = (batch * num_heads + head) * num_queries
    keys = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key_main, key_rest = load_rows(
        key_ptr, keys, num_keys, stride_kn * STRIDE_UNIT, HEAD_DIM, DIM_MAIN, DIM_REST, UPCAST
    )
    total_main = tl.zeros([KEYS, DIM_MAIN], tl.float32)
    if DIM_REST > 0:
        total_rest = tl.zeros([KEYS, DIM_REST], tl.float32)
    for block in range(BLOCKS):
        rows = (tl.program_id(0) * BLOCKS + block) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        is_row = rows < num_queries
        query_main, query_rest = load_rows(
            query_ptr,
            rows,
            num_queries,
            stride_qn * STRIDE_UNIT,
            HEAD_DIM,
            DIM_MAIN,
            DIM_REST,
            UPCAST,
        )
        maps, grads = maps_and_grads(
            query_main,
            query_rest,
            key_main,
            key_rest,
            tl.load(logsumexp_ptr + place + tl.minimum(rows, num_queries - 1)),
            grad_map_ptr,
            rows,
            num_queries,
            keys,
            num_keys,
            scale,
            DIM_REST,
        )
        if not GIVEN_LOGSUMEXP:
            # Past the last query grads and sums are 0, and so is what is added.
            grads -= tl.load(sums_ptr + place + rows, mask=is_row, other=0.0)[:, None]
        dlogits = tl.trans(narrow(maps * grads, query_main, UPCAST))
        query = narrow(query_main, query_main, UPCAST)
        total_main = tl.dot(dlogits, query, total_main, input_precision="ieee")
        if DIM_REST > 0:
            query = narrow(query_rest, query_rest, UPCAST)
            total_rest = tl.dot(dlogits, query, total_rest, input_precision="ieee")
    factor = factor * tl.load(grad_ptr) * scale
    grad_key_ptr += tl.program_id(0).to(tl.int64) * stride_gs + batch * stride_gb + head * stride_gh
    _store_piece(
        grad_key_ptr, keys, num_keys, stride_gn, factor * total_main, 0, DIM_MAIN, HEAD_DIM
    )
    if DIM_REST > 0:
        _store_piece(
            grad_key_ptr,
            keys,
            num_keys,
            stride_gn,
            factor * total_rest,
            DIM_MAIN,
            DIM_REST,
            HEAD_DIM,
        )


@triton.jit(
    do_not_specialize=[
        "num_splits",
        "num_elements",
        "stride_kb",
        "stride_kh",
        "stride_kn",
        "num_heads",
        "num_keys",
    ]
)
def attention_sum_splits_kernel(
    partial_ptr,
    grad_key_ptr,
    num_splits,
    num_elements,
    stride_kb,
    stride_kh,
    stride_kn,
    num_heads,
    num_keys,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Write the sum over the splits, in their order, of the gradient of the keys.

    Memory traffic: 4 bytes an element and split, and the gradient once.

    Args:
        partial_ptr: float32 [num_splits, B, H, K, HEAD_DIM].
        grad_key_ptr: [B, H, K, HEAD_DIM]; float32, bfloat16 or float16; written.
        num_splits: Splits.
        num_elements: B H K HEAD_DIM.
        stride_kb: Between batches of the gradient, in elements; then heads and tokens.
        stride_kh: As above.
        stride_kn: As above.
        num_heads: H.
        num_keys: K.
        HEAD_DIM: D.
        BLOCK_SIZE: Elements a program.
    """
    element = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = element < num_elements
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    split = num_splits * 0
    while split < num_splits:
        place = split.to(tl.int64) * num_elements
        total += tl.load(partial_ptr + place + element, mask=mask, other=0.0)
        split += 1
    row = element // HEAD_DIM
    head = row // num_keys
    offsets = (head // num_heads).to(tl.int64) * stride_kb + (head % num_heads) * stride_kh
    offsets += (row % num_keys) * stride_kn + element % HEAD_DIM
    tl.store(grad_key_ptr + offsets, total, mask=mask)
