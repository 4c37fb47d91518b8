"""The launches of the attention maps, and the buffers between them.

Shape suffixes: B batch, H heads, Q image tokens, K text tokens, J base columns, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.anchor_penalty.op import launch_weighted_sum
from fastppt_kernels.attention_alignment.plan import (
    ALIGNED_ELEMENTS,
    BLOCKS,
    HEADS,
    MAX_HEAD_DIM,
    SUM_SIZE,
    SUM_WARPS,
    choose_keys,
    forward_tiling,
    gradient_keys,
    key_tiling,
    name_dims,
    query_tiling,
)
from fastppt_kernels.launch import DTYPE_CODES, device_of, is_interpreted, use_triton


def runs_kernels(query: Tensor) -> bool:
    """Return whether kernels do the work on ``query``: float64 is left to PyTorch."""
    return use_triton(query) and query.dtype in DTYPE_CODES and query.shape[-1] <= MAX_HEAD_DIM


def keeps_logsumexp(query: Tensor, logsumexp: Tensor | None) -> bool:
    """Return whether the forward keeps a logsumexp for the backward."""
    return logsumexp is None and runs_kernels(query)


def _readable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where neighbours of the last dimension are apart."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _stride_unit(*tensors: Tensor) -> int:
    strides = [s for t in tensors for s in _strides(t)]
    return ALIGNED_ELEMENTS if all(s % ALIGNED_ELEMENTS == 0 for s in strides) else 1


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides of batch, heads and tokens, 0 where there is one only."""
    pairs = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return [0 if size == 1 else stride for size, stride in pairs]


def _in_units(tensor: Tensor, unit: int) -> list[int]:
    return [stride // unit for stride in _strides(tensor)]


def launch_map_sum(
    query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do the work of :func:`attention_map_sum` in one launch, two from 6 heads on.

    One more comes first where a softmax has more keys than a tile, 80 mostly, for its logsumexp.

    Memory: a [B, Q, K] float32 for each 5 heads beyond the first 5.

    Memory traffic: q once (once a tile of 64 or 80 keys), the keys once a block of 64 queries,
    4 Q K bytes for each 5 heads, written and read again. FLOPs: 2 H Q K D, twice that with the
    logsumexp; 77 keys cost what 80 do, see ``choose_keys``.

    Returns:
        The map sum, and the logsumexp [B, H, Q], or no elements where it is given.
    """
    map_sum, others, kept = _launch_groups(query, key, scale, logsumexp)
    if others is not None:
        _launch_difference(map_sum, others, None, None)
    return map_sum, kept


def launch_alignment(
    query: Tensor,
    key: Tensor,
    base_map_sum: Tensor,
    scale: float,
    logsumexp: Tensor | None,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the work of :func:`attention_alignment_loss`: the launches of its map sum, and the loss.

    The sum is made by the same launches as the base's, so that equal inputs give a loss of 0.

    Memory traffic: that of :func:`launch_map_sum`, the base once, and the difference.

    Returns:
        The loss, the difference [B, Q, K], and the logsumexp as of :func:`launch_map_sum`.
    """
    difference, others, kept = _launch_groups(query, key, scale, logsumexp)
    partials = _launch_difference(difference, others, base_map_sum, columns)
    weight = 1.0 / (query.shape[0] * query.shape[1])
    return launch_weighted_sum(partials, weight), difference, kept


def _launch_groups(
    query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Write the first group's map sum, the others', and the logsumexp where it is not given."""
    from fastppt_kernels.attention_alignment.triton_kernel import (
        attention_logsumexp_kernel,
        attention_map_sum_kernel,
    )

    query, key = _readable(query), _readable(key)
    num_batches, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    unit = _stride_unit(query, key)
    strides = [*_in_units(query, unit), *_in_units(key, unit)]
    tiling = forward_tiling(query.dtype, head_dim)
    blocks = -(-num_queries // tiling.block_queries)
    num_groups = -(-num_heads // HEADS)
    keys_main, keys_rest = choose_keys(query.dtype, head_dim, num_keys, logsumexp is not None)
    options: dict[str, Any] = {
        "STRIDE_UNIT": unit,
        **name_dims(query.dtype, head_dim),
        "BLOCK_QUERIES": tiling.block_queries,
        "UPCAST": is_interpreted(),
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }
    shape = (num_batches, num_queries, num_keys)
    map_sum = torch.empty(shape, dtype=torch.float32, device=query.device)
    others = torch.empty((num_groups - 1, *shape), dtype=torch.float32, device=query.device)
    kept_shape = query.shape[:3] if logsumexp is None else (0,)
    kept = torch.empty(kept_shape, dtype=torch.float32, device=query.device)
    given = None if logsumexp is None else logsumexp.contiguous()
    with device_of(query):
        if given is None and num_keys > keys_main + keys_rest:
            attention_logsumexp_kernel[(blocks, num_heads, num_batches)](
                query,
                key,
                kept,
                scale,
                *strides,
                num_heads,
                num_queries,
                num_keys,
                KEYS=keys_main,
                **options,
            )
            given = kept
        attention_map_sum_kernel[
            (blocks, -(-num_keys // (keys_main + keys_rest)), num_groups * num_batches)
        ](
            query,
            key,
            kept if given is None else given,
            map_sum,
            others,
            scale,
            *strides,
            num_batches,
            num_heads,
            num_queries,
            num_keys,
            GIVEN_LOGSUMEXP=given is not None,
            KEYS_MAIN=keys_main,
            KEYS_REST=keys_rest,
            HEADS=HEADS,
            **options,
        )
    return map_sum, others if num_groups > 1 else None, kept


def _launch_difference(
    map_sum: Tensor, others: Tensor | None, base_map_sum: Tensor | None, columns: Tensor | None
) -> Tensor:
    """Add the other groups and subtract the base, in place; return the sums of the squares."""
    from fastppt_kernels.attention_alignment.triton_kernel import attention_difference_kernel

    num_batches, num_queries, num_keys = map_sum.shape
    blocks = -(-num_queries * num_keys // SUM_SIZE)
    partials = torch.empty(num_batches * blocks, dtype=torch.float32, device=map_sum.device)
    base = None if base_map_sum is None else base_map_sum.contiguous()
    with device_of(map_sum):
        attention_difference_kernel[(blocks, num_batches)](
            map_sum,
            map_sum if others is None else others,
            base,
            None if columns is None else columns.to(torch.int64).contiguous(),
            None if base is None else partials,
            1 if others is None else 1 + others.shape[0],
            num_queries,
            num_keys,
            num_keys if base is None else base.shape[2],
            BLOCK_SIZE=SUM_SIZE,
            num_warps=SUM_WARPS,
        )
    return partials


def launch_backward(
    query: Tensor,
    key: Tensor,
    grad_map_sum: Tensor,
    grad: Tensor,
    factor: float,
    scale: float,
    logsumexp: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and logsumexp in two launches, mostly three.

    The third sums the gradients of the keys over splits of the queries: of 640 for narrow inputs,
    160 for float32. There is none where one split holds all queries.

    Memory: the float32 gradient of the keys for each split, and 4 bytes a query and head; at
    SDXL's 64x64 layer 13 % of the float32 maps [H, Q, K], 24 % with what the forward kept.

    Memory traffic: q twice and its gradient once, the keys once a block of queries, grad_map_sum
    twice a head, from the cache. FLOPs: 8 H Q K D, and 2 more for a softmax over more than 80 keys.

    Args:
        query: [B, H, Q, D].
        key: [B, H, K, D].
        grad_map_sum: float32 [B, Q, K]; ``factor * grad`` of it is the gradient of every map.
        grad: 0-dim, float32.
        factor: A constant.
        scale: The factor of the products.
        logsumexp: [B, H, Q], or None.
        kept: Where it is None, what the forward kept.

    Returns:
        The gradients in the dtypes of what they are of; that of the logsumexp has no elements
        where there is none.
    """
    from fastppt_kernels.attention_alignment.triton_backward_kernel import (
        attention_map_backward_query_kernel,
    )

    grad_query = torch.empty_like(query)
    out = _readable(grad_query)
    query, key = _readable(query), _readable(key)
    num_batches, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    unit = _stride_unit(query, key, out)
    keys_main, keys_rest = choose_keys(query.dtype, head_dim, num_keys, logsumexp is not None)
    tiling = query_tiling(query.dtype, head_dim)
    shifts = kept if logsumexp is None else logsumexp.contiguous()
    sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    grad_map_sum = grad_map_sum.contiguous()
    with device_of(query):
        attention_map_backward_query_kernel[
            (-(-num_queries // tiling.block_queries), num_heads, num_batches)
        ](
            query,
            key,
            shifts,
            grad_map_sum,
            grad,
            out,
            sums,
            factor,
            scale,
            *_in_units(query, unit),
            *_in_units(key, unit),
            *_in_units(out, unit),
            num_heads,
            num_queries,
            num_keys,
            GIVEN_LOGSUMEXP=logsumexp is not None,
            STRIDE_UNIT=unit,
            **name_dims(query.dtype, head_dim),
            KEYS_MAIN=keys_main,
            KEYS_REST=keys_rest,
            ONE_TILE=logsumexp is None and num_keys <= keys_main + keys_rest,
            BLOCK_QUERIES=tiling.block_queries,
            UPCAST=is_interpreted(),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
        grad_key = _launch_key_gradient(
            query, key, shifts, sums, grad_map_sum, grad, factor, scale, logsumexp is not None
        )
    if out is not grad_query:
        grad_query.copy_(out)
    return grad_query, grad_key, query.new_empty(0) if logsumexp is None else sums


def _launch_key_gradient(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    sums: Tensor,
    grad_map_sum: Tensor,
    grad: Tensor,
    factor: float,
    scale: float,
    given_logsumexp: bool,
) -> Tensor:
    """Return the gradient of the keys; arguments as of the kernel."""
    from fastppt_kernels.attention_alignment.triton_backward_kernel import (
        attention_map_backward_key_kernel,
        attention_sum_splits_kernel,
    )

    num_batches, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    tiling = key_tiling(query.dtype, head_dim)
    num_splits = -(-num_queries // (BLOCKS * tiling.block_queries))
    grad_key = torch.empty_like(key)
    split_shape = (num_splits, *key.shape)
    if num_splits == 1:
        partials = grad_key[None]
    else:
        partials = torch.empty(split_shape, dtype=torch.float32, device=key.device)
    unit = _stride_unit(query, key)
    keys = gradient_keys(query.dtype, head_dim)
    attention_map_backward_key_kernel[(num_splits, -(-num_keys // keys), num_heads * num_batches)](
        query,
        key,
        logsumexp,
        sums,
        grad_map_sum,
        grad,
        partials,
        factor,
        scale,
        *_in_units(query, unit),
        *_in_units(key, unit),
        *partials.stride()[:4],
        num_heads,
        num_queries,
        num_keys,
        GIVEN_LOGSUMEXP=given_logsumexp,
        STRIDE_UNIT=unit,
        **name_dims(query.dtype, head_dim),
        KEYS=keys,
        BLOCK_QUERIES=tiling.block_queries,
        BLOCKS=BLOCKS,
        UPCAST=is_interpreted(),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    if num_splits > 1:
        attention_sum_splits_kernel[(-(-key.numel() // SUM_SIZE),)](
            partials,
            grad_key,
            num_splits,
            key.numel(),
            *grad_key.stride()[:3],
            num_heads,
            num_keys,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=SUM_SIZE,
            num_warps=SUM_WARPS,
        )
    return grad_key
