"""The launches of the attention maps, and the buffers between them.

Shape suffixes: B batch, H heads, Q image tokens, K text tokens, J base columns, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.anchor_penalty.op import launch_weighted_sum
from fastppt_kernels.attention_alignment.plan import (
    ALIGNED_ELEMENTS,
    MAX_HEAD_DIM,
    SUM_SIZE,
    SUM_WARPS,
    Tiling,
    choose_gradient_keys,
    choose_group_heads,
    choose_keys,
    choose_split_queries,
    forward_tiling,
    gradient_keys,
    key_tiling,
    logsumexp_keys,
    name_dims,
    query_tiling,
)
from fastppt_kernels.launch import DTYPE_CODES, device_of, is_interpreted, use_triton

# What an int32 offset can reach.
MAX_OFFSET = 2**31 - 1


def runs_kernels(query: Tensor) -> bool:
    """Return whether kernels do the work on ``query``: float64 is left to PyTorch."""
    return use_triton(query) and query.dtype in DTYPE_CODES and query.shape[-1] <= MAX_HEAD_DIM


def _readable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy: where neighbours of the last dimension are apart, and where the
    tokens of a head are so far apart that int32 cannot count the elements between them.
    """
    tokens, head_dim = tensor.shape[-2:]
    is_dense = tensor.stride(-1) == 1 or head_dim == 1
    is_near = tensor.stride(-2) * tokens <= MAX_OFFSET
    return tensor if is_dense and is_near else tensor.contiguous()


def _stride_unit(*tensors: Tensor) -> int:
    strides = [s for t in tensors for s in _strides(t)]
    return ALIGNED_ELEMENTS if all(s % ALIGNED_ELEMENTS == 0 for s in strides) else 1


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides of batch, heads and tokens, 0 where there is one only."""
    pairs = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return [0 if size == 1 else stride for size, stride in pairs]


def _in_units(tensor: Tensor, unit: int) -> list[int]:
    return [stride // unit for stride in _strides(tensor)]


def _options(query: Tensor, unit: int, tiling: Tiling) -> dict[str, Any]:
    """Return the constexprs that all launches over heads have."""
    return {
        "STRIDE_UNIT": unit,
        **name_dims(query.dtype, query.shape[-1]),
        "BLOCK_QUERIES": tiling.block_queries,
        "UPCAST": is_interpreted(),
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }


def launch_map_sum(query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None) -> Tensor:
    """Do the work of :func:`attention_map_sum` in one launch, two from 6 heads on.

    One more comes first where a softmax has more keys than a tile, 80 mostly, for its logsumexp.

    Memory: a [B, Q, K] float32 for each 5 heads beyond the first 5, and 4 bytes a query and head
        for that logsumexp.

    Memory traffic: q once (once a tile of 64 or 80 keys), the keys once a block of 64 queries,
    4 Q K bytes for each 5 heads, written and read again. FLOPs: 2 H Q K D, twice that with the
    logsumexp; 77 keys cost what 80 do, see ``choose_keys``.
    """
    map_sum, others = _launch_groups(query, key, scale, logsumexp)
    if others is not None:
        _launch_difference(map_sum, others, None, None)
    return map_sum


def launch_alignment(
    query: Tensor,
    key: Tensor,
    base_map_sum: Tensor,
    scale: float,
    logsumexp: Tensor | None,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Do the work of :func:`attention_alignment_loss`: the launches of its map sum, and the loss.

    The sum is made by the same launches as the base's, so that equal inputs give a loss of 0.

    Memory traffic: that of :func:`launch_map_sum`, the base once, and the difference.

    Returns:
        The loss and the difference [B, Q, K].
    """
    difference, others = _launch_groups(query, key, scale, logsumexp)
    partials = _launch_difference(difference, others, base_map_sum, columns)
    weight = 1.0 / (query.shape[0] * query.shape[1])
    return launch_weighted_sum(partials, weight), difference


def _launch_logsumexp(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the log sum exp [B, H, Q] of the scaled products of readable tensors."""
    from fastppt_kernels.attention_alignment.triton_kernel import attention_logsumexp_kernel

    num_batches, num_heads, num_queries, head_dim = query.shape
    tiling = forward_tiling(query.dtype, head_dim)
    unit = _stride_unit(query, key)
    logsumexp = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with device_of(query):
        attention_logsumexp_kernel[
            (-(-num_queries // tiling.block_queries), num_heads, num_batches)
        ](
            query,
            key,
            logsumexp,
            scale,
            *_in_units(query, unit),
            *_in_units(key, unit),
            num_heads,
            num_queries,
            key.shape[2],
            KEYS=logsumexp_keys(query.dtype, head_dim),
            **_options(query, unit, tiling),
        )
    return logsumexp


def _launch_groups(
    query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the first group's map sum, and the others' or None where there is one group."""
    from fastppt_kernels.attention_alignment.triton_kernel import attention_map_sum_kernel

    query, key = _readable(query), _readable(key)
    num_batches, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    tiling = forward_tiling(query.dtype, head_dim)
    unit = _stride_unit(query, key)
    group_heads = choose_group_heads(num_heads)
    num_groups = -(-num_heads // group_heads)
    keys_main, keys_rest = choose_keys(query.dtype, head_dim, num_keys, logsumexp is not None)
    if logsumexp is None and num_keys > keys_main + keys_rest:
        logsumexp = _launch_logsumexp(query, key, scale)
    shape = (num_batches, num_queries, num_keys)
    map_sum = torch.empty(shape, dtype=torch.float32, device=query.device)
    others = torch.empty((num_groups - 1, *shape), dtype=torch.float32, device=query.device)
    with device_of(query):
        attention_map_sum_kernel[
            (
                -(-num_queries // tiling.block_queries),
                -(-num_keys // (keys_main + keys_rest)),
                num_groups * num_batches,
            )
        ](
            query,
            key,
            None if logsumexp is None else logsumexp.contiguous(),
            map_sum,
            others,
            scale,
            *_in_units(query, unit),
            *_in_units(key, unit),
            num_batches,
            num_heads,
            group_heads,
            num_queries,
            num_keys,
            KEYS_MAIN=keys_main,
            KEYS_REST=keys_rest,
            **_options(query, unit, tiling),
        )
    return map_sum, others if num_groups > 1 else None


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and logsumexp in three launches.

    One more comes first where a softmax has more keys than a tile, 80 mostly, for its logsumexp.
    The last sums the gradients of the keys over splits of at most 640 queries.

    Memory: the float32 gradient of the keys for each split, and 8 bytes a query and head (4 where
        the logsumexp is given); at SDXL's 64x64 layer 13.5 % of the float32 maps [H, Q, K].

    Memory traffic: q twice and its gradient once, the keys once a block of queries, grad_map_sum
    twice a head, from the cache. FLOPs: 8 H Q K D, and 4 more for a softmax over more than a tile.

    Args:
        query: [B, H, Q, D].
        key: [B, H, K, D].
        grad_map_sum: float32 [B, Q, K]; ``factor * grad`` of it is the gradient of every map.
        grad: 0-dim, float32.
        factor: A constant.
        scale: The factor of the products.
        logsumexp: [B, H, Q], or None.

    Returns:
        The gradients in the dtypes of what they are of; that of the logsumexp has no elements
        where there is none.
    """
    from fastppt_kernels.attention_alignment.triton_backward_query_kernel import (
        attention_map_backward_query_kernel,
    )

    grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
    out = _readable(grad_query)
    query, key = _readable(query), _readable(key)
    num_batches, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    given = logsumexp is not None
    unit = _stride_unit(query, key, out)
    keys_main, keys_rest = choose_gradient_keys(query.dtype, head_dim, num_keys, given)
    one_tile = not given and num_keys <= keys_main + keys_rest
    tiling = query_tiling(query.dtype, head_dim)
    if logsumexp is not None:
        shifts = logsumexp.contiguous()
    elif one_tile:
        shifts = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    else:
        shifts = _launch_logsumexp(query, key, scale)
    sums = torch.empty_like(shifts)
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
            GIVEN_LOGSUMEXP=given,
            KEYS_MAIN=keys_main,
            KEYS_REST=keys_rest,
            ONE_TILE=one_tile,
            **_options(query, unit, tiling),
        )
        _launch_key_gradient(
            query, key, shifts, sums, grad_map_sum, grad, grad_key, factor, scale, given
        )
    if out is not grad_query:
        grad_query.copy_(out)
    return grad_query, grad_key, sums if given else query.new_empty(0)


def _launch_key_gradient(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    sums: Tensor,
    grad_map_sum: Tensor,
    grad: Tensor,
    grad_key: Tensor,
    factor: float,
    scale: float,
    given_logsumexp: bool,
) -> None:
    """Write the gradient of the keys; arguments as of the kernel, ``grad_key`` of any strides."""
    from fastppt_kernels.attention_alignment.triton_backward_key_kernel import (
        attention_map_backward_key_kernel,
        attention_sum_splits_kernel,
    )

    num_batches, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    tiling = key_tiling(query.dtype, head_dim)
    keys = gradient_keys(query.dtype, head_dim)
    num_pieces = -(-num_keys // keys)
    num_programs = num_heads * num_batches
    split_queries = choose_split_queries(
        num_queries, tiling.block_queries, num_programs * num_pieces
    )
    num_splits = -(-num_queries // split_queries)
    partials = torch.empty((num_splits, *key.shape), dtype=torch.float32, device=key.device)
    unit = _stride_unit(query, key)
    attention_map_backward_key_kernel[(num_programs, num_pieces, num_splits)](
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
        num_heads,
        num_queries,
        num_keys,
        split_queries,
        GIVEN_LOGSUMEXP=given_logsumexp,
        KEYS=keys,
        **_options(query, unit, tiling),
    )
    attention_sum_splits_kernel[(-(-key.numel() // SUM_SIZE),)](
        partials,
        grad_key,
        num_splits,
        key.numel(),
        *grad_key.stride(),
        num_heads,
        num_keys,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=SUM_SIZE,
        num_warps=SUM_WARPS,
    )
