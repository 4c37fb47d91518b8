"""The kernel of the attention maps' gradient with respect to the queries.

dP = factor * grad_map, the same for every head; P = exp(logits - logsumexp);
dlogits = P * (dP - rowsum(P * dP)), or P * dP where the logsumexp is one of its own, which then
gets -rowsum(P * dP); dQ = scale dlogits K.

Queries and keys have a kernel each: a fused one would take 3 products instead of 4 (2 H Q K D
FLOPs each), but hold a block's dQ and a tile's dK at once, which does not fit in registers at a
head dim of 160, and would have a program only for each head and split of the queries (60 to 70 for
SDXL's layers) where the queries' kernel has one for each block (320 to 640).

Tiles of keys and the head dim come in two pieces: see ``triton_tiles.py``. Strides come in units
of STRIDE_UNIT elements: at 8 the compiler knows that 16 bytes can be loaded at a time. Offsets of
batch and head are int64; those of tokens int32.
"""

import triton
import triton.language as tl

from fastppt_kernels.attention_alignment.triton_tiles import (
    load_grads,
    load_rows,
    narrow,
    shifted_maps,
    softmax_maps,
    store_rows,
)


@triton.jit
def _add_products(
    dlogits,
    key_ptr,
    keys,
    num_keys,
    stride,
    total_main,
    total_rest,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Return both pieces of the totals with dlogits @ keys added.

    The keys were loaded for the maps: the compiler keeps those.
    """
    key_main, key_rest = load_rows(
        key_ptr, keys, num_keys, stride, HEAD_DIM, DIM_MAIN, DIM_REST, UPCAST
    )
    dlogits = narrow(dlogits, key_main, UPCAST)
    key = narrow(key_main, key_main, UPCAST)
    total_main = tl.dot(dlogits, key, total_main, input_precision="ieee")
    if DIM_REST > 0:
        key = narrow(key_rest, key_rest, UPCAST)
        total_rest = tl.dot(dlogits, key, total_rest, input_precision="ieee")
    return total_main, total_rest


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
        logsumexp_ptr: float32 [B, H, Q]; written with ONE_TILE, else read.
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
        KEYS_REST: Width of the second; 0 without ONE_TILE.
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
    total_main = tl.zeros([BLOCK_QUERIES, DIM_MAIN], tl.float32)
    # Not used without a second piece.
    total_rest = total_main
    if DIM_REST > 0:
        total_rest = tl.zeros([BLOCK_QUERIES, DIM_REST], tl.float32)
    stride_kn = stride_kn * STRIDE_UNIT
    keys = tl.arange(0, KEYS_MAIN)
    if ONE_TILE:
        main, rest, logsumexp = softmax_maps(
            query_main,
            query_rest,
            key_ptr,
            num_keys,
            stride_kn,
            scale,
            HEAD_DIM,
            DIM_MAIN,
            DIM_REST,
            KEYS_MAIN,
            KEYS_REST,
            UPCAST,
        )
        main_grads = load_grads(grad_map_ptr, rows, num_queries, keys, num_keys)
        sums = tl.sum(main * main_grads, 1)
        if KEYS_REST > 0:
            rest_keys = KEYS_MAIN + tl.arange(0, KEYS_REST)
            rest_grads = load_grads(grad_map_ptr, rows, num_queries, rest_keys, num_keys)
            sums += tl.sum(rest * rest_grads, 1)
        total_main, total_rest = _add_products(
            main * (main_grads - sums[:, None]),
            key_ptr,
            keys,
            num_keys,
            stride_kn,
            total_main,
            total_rest,
            HEAD_DIM,
            DIM_MAIN,
            DIM_REST,
            UPCAST,
        )
        if KEYS_REST > 0:
            total_main, total_rest = _add_products(
                rest * (rest_grads - sums[:, None]),
                key_ptr,
                rest_keys,
                num_keys,
                stride_kn,
                total_main,
                total_rest,
                HEAD_DIM,
                DIM_MAIN,
                DIM_REST,
                UPCAST,
            )
        tl.store(logsumexp_ptr + place + rows, logsumexp, mask=is_row)
    else:
        logsumexp = tl.load(logsumexp_ptr + place + tl.minimum(rows, num_queries - 1))
        sums = tl.zeros([BLOCK_QUERIES], tl.float32)
        first = num_keys * 0
        # The gradient is loaded before the maps are made: later it takes more registers.
        if not GIVEN_LOGSUMEXP:
            while first < num_keys:
                grads = load_grads(grad_map_ptr, rows, num_queries, first + keys, num_keys)
                maps = shifted_maps(
                    query_main,
                    query_rest,
                    key_ptr,
                    first + keys,
                    num_keys,
                    stride_kn,
                    logsumexp,
                    scale,
                    False,
                    HEAD_DIM,
                    DIM_MAIN,
                    DIM_REST,
                    UPCAST,
                )
                sums += tl.sum(maps * grads, 1)
                first += KEYS_MAIN
        first = num_keys * 0
        while first < num_keys:
            grads = load_grads(grad_map_ptr, rows, num_queries, first + keys, num_keys)
            maps = shifted_maps(
                query_main,
                query_rest,
                key_ptr,
                first + keys,
                num_keys,
                stride_kn,
                logsumexp,
                scale,
                not GIVEN_LOGSUMEXP,
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
            total_main, total_rest = _add_products(
                dlogits,
                key_ptr,
                first + keys,
                num_keys,
                stride_kn,
                total_main,
                total_rest,
                HEAD_DIM,
                DIM_MAIN,
                DIM_REST,
                UPCAST,
            )
            first += KEYS_MAIN
    factor = factor * tl.load(grad_ptr)
    if GIVEN_LOGSUMEXP:
        sums = -factor * sums
    tl.store(sums_ptr + place + rows, sums, mask=is_row)
    factor = factor * scale
    store_rows(
        grad_query_ptr,
        rows,
        num_queries,
        stride_gn * STRIDE_UNIT,
        factor * total_main,
        factor * total_rest,
        HEAD_DIM,
        DIM_MAIN,
        DIM_REST,
    )
