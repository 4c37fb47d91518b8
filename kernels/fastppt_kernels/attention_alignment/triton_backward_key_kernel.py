"""The kernels of the attention maps' gradient with respect to the keys.

dK = scale dlogits^T Q, with dlogits as of ``triton_backward_query_kernel.py``, which runs before
and leaves each row's logsumexp and rowsum(P * grad_map). A split of the queries has a partial
gradient of its own; the splits are summed in their order.
"""

import triton
import triton.language as tl

from fastppt_kernels.attention_alignment.triton_tiles import (
    load_grads,
    load_rows,
    narrow,
    products_of,
    store_rows,
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
        "split_queries",
    ]
)
def attention_map_backward_key_kernel(
    query_ptr,
    key_ptr,
    logsumexp_ptr,
    sums_ptr,
    grad_map_ptr,
    grad_ptr,
    partial_ptr,
    factor,
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
    split_queries,
    GIVEN_LOGSUMEXP: tl.constexpr,  # noqa: N803
    STRIDE_UNIT: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIM_MAIN: tl.constexpr,  # noqa: N803
    DIM_REST: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    BLOCK_QUERIES: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
):
    """Write the gradient of a piece of keys from a split of the queries, in the queries' order.

    Grid: (heads * batch, pieces of keys, splits of the queries).

    Memory traffic: queries and keys once, grad_map for each head (all but the first from the
    cache), 8 bytes a query and head, and the gradient once a split. FLOPs: 4 H Q K D.

    Args:
        query_ptr: [B, H, Q, HEAD_DIM]; float32, bfloat16 or float16.
        key_ptr: [B, H, K, HEAD_DIM], of that dtype.
        logsumexp_ptr: float32 [B, H, Q].
        sums_ptr: float32 [B, H, Q], rowsum(P * grad_map); not read with GIVEN_LOGSUMEXP.
        grad_map_ptr: float32 [B, Q, K].
        grad_ptr: float32 [].
        partial_ptr: float32 [splits, B, H, K, HEAD_DIM]; written.
        factor: float32; dP = factor * grad * grad_map.
        scale: float32.
        stride_qb: Between batches of the query, in STRIDE_UNIT; then heads and tokens; then of the
            key.
        stride_qh: As above.
        stride_qn: As above.
        stride_kb: As above.
        stride_kh: As above.
        stride_kn: As above.
        num_heads: H.
        num_queries: Q.
        num_keys: K.
        split_queries: Queries a split, a multiple of BLOCK_QUERIES.
        GIVEN_LOGSUMEXP: The logsumexp is a variable of its own, not that of the softmax.
        STRIDE_UNIT: Elements.
        HEAD_DIM: D.
        DIM_MAIN: Width of the first piece of the head dim.
        DIM_REST: Width of the second, or 0.
        KEYS: Keys a program.
        BLOCK_QUERIES: Queries taken at a time.
        UPCAST: Products in float32 for narrow inputs too: the interpreter has no bfloat16 ones.
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    query_ptr += (batch * stride_qb + head * stride_qh) * STRIDE_UNIT
    key_ptr += (batch * stride_kb + head * stride_kh) * STRIDE_UNIT
    grad_map_ptr += batch * num_queries * num_keys
    place = (batch * num_heads + head) * num_queries
    keys = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key_main, key_rest = load_rows(
        key_ptr, keys, num_keys, stride_kn * STRIDE_UNIT, HEAD_DIM, DIM_MAIN, DIM_REST, UPCAST
    )
    total_main = tl.zeros([KEYS, DIM_MAIN], tl.float32)
    # Not used without a second piece.
    total_rest = total_main
    if DIM_REST > 0:
        total_rest = tl.zeros([KEYS, DIM_REST], tl.float32)
    first = tl.program_id(2) * split_queries
    last = tl.minimum(first + split_queries, num_queries)
    while first < last:
        rows = first + tl.arange(0, BLOCK_QUERIES)
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
        logsumexp = tl.load(logsumexp_ptr + place + tl.minimum(rows, num_queries - 1))
        grads = load_grads(grad_map_ptr, rows, num_queries, keys, num_keys)
        if not GIVEN_LOGSUMEXP:
            # Past the last query grads and sums are 0, and so is what is added.
            sums = tl.load(sums_ptr + place + rows, mask=rows < num_queries, other=0.0)
            grads -= sums[:, None]
        logits = products_of(query_main, query_rest, key_main, key_rest, scale, DIM_REST)
        dlogits = tl.exp(logits - logsumexp[:, None]) * grads
        dlogits = tl.trans(narrow(dlogits, query_main, UPCAST))
        query = narrow(query_main, query_main, UPCAST)
        total_main = tl.dot(dlogits, query, total_main, input_precision="ieee")
        if DIM_REST > 0:
            query = narrow(query_rest, query_rest, UPCAST)
            total_rest = tl.dot(dlogits, query, total_rest, input_precision="ieee")
        first += BLOCK_QUERIES
    factor = factor * tl.load(grad_ptr) * scale
    split = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    store_rows(
        partial_ptr + split * num_keys * HEAD_DIM,
        keys,
        num_keys,
        HEAD_DIM,
        factor * total_main,
        factor * total_rest,
        HEAD_DIM,
        DIM_MAIN,
        DIM_REST,
    )


@triton.jit(
    do_not_specialize=[
        "num_splits",
        "num_elements",
        "stride_kb",
        "stride_kh",
        "stride_kn",
        "stride_kd",
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
    stride_kd,
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
        stride_kb: Between batches of the gradient, in elements; then heads, tokens and columns.
        stride_kh: As above.
        stride_kn: As above.
        stride_kd: As above.
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
    offsets += (row % num_keys) * stride_kn + (element % HEAD_DIM) * stride_kd
    tl.store(grad_key_ptr + offsets, total, mask=mask)
