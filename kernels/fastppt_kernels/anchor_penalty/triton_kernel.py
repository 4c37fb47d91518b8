"""The kernels of the anchor penalty."""

import triton
import triton.language as tl

from fastppt_kernels.triton_foreign import load_foreign, store_foreign


@triton.jit
def _pull(
    param_address,
    anchor_address,
    grad_address,
    offsets,
    mask,
    code,
    factor,
    HAS_GRADS: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    FLOAT32: tl.constexpr,  # noqa: N803
):
    """Add factor * (param - anchor) to the gradient; return the squared differences.

    Args:
        param_address: int64 scalar; as the next two.
        anchor_address: 0 for an anchor of zeros, which is not read.
        grad_address: Not read without HAS_GRADS.
        offsets: [n], in elements.
        mask: [n].
        code: The dtypes, two bits each: param, anchor, grad.
        factor: float32 scalar.
        HAS_GRADS: Write the gradient.
        ALIGNED: All addresses are multiples of 16 bytes.
        FLOAT32: All dtypes are float32; ``code`` is not used.
    """
    if FLOAT32:
        param_code, anchor_code, grad_code = 0, 0, 0
    else:
        param_code, anchor_code, grad_code = code & 3, (code >> 2) & 3, (code >> 4) & 3
    param = load_foreign(param_address, offsets, mask, param_code, ALIGNED)
    anchored = mask & (anchor_address != 0)
    anchor = load_foreign(anchor_address, offsets, anchored, anchor_code, ALIGNED)
    difference = param - anchor
    if HAS_GRADS:
        grad = load_foreign(grad_address, offsets, mask, grad_code, ALIGNED)
        store_foreign(grad_address, offsets, grad + factor * difference, mask, grad_code, ALIGNED)
    return difference * difference


@triton.jit
def _pull_chunk(
    param_address,
    anchor_address,
    grad_address,
    count,
    code,
    factor,
    HAS_GRADS: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    FLOAT32: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Do :func:`_pull` for ``count`` elements, at most BLOCK_SIZE; return the sum of squares."""
    offsets = tl.arange(0, BLOCK_SIZE)
    # A bound that is a multiple of 16 lets a thread's loads be wide ones; the rest follows.
    whole = count // 16 * 16 if ALIGNED else count
    squares = _pull(
        param_address,
        anchor_address,
        grad_address,
        offsets,
        offsets < whole,
        code,
        factor,
        HAS_GRADS,
        ALIGNED,
        FLOAT32,
    )
    square = tl.sum(squares)
    if ALIGNED and whole < count:
        rest = whole + tl.arange(0, 16)
        rest_squares = _pull(
            param_address,
            anchor_address,
            grad_address,
            rest,
            rest < count,
            code,
            factor,
            HAS_GRADS,
            ALIGNED,
            FLOAT32,
        )
        square += tl.sum(rest_squares)
    return square


@triton.jit
def anchor_penalty_kernel(
    table_ptr,
    partial_ptr,
    weight_ptr,
    weight,
    HAS_GRADS: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Add 2 * weight * (param - anchor) to each gradient; write each chunk's sum of squares.

    One program a row of the table. Differences and sums in float32.

    Memory traffic: 4 reads or writes an element (3 without an anchor; 2 and 1 without gradients),
    and 44 bytes a chunk. FLOPs: 5 an element.

    Args:
        table_ptr: int64 [chunks, 6]: addresses of param, anchor (0: zeros, not read) and grad,
            elements (at most BLOCK_SIZE), code, index; see ``launch.chunk_table``.
        partial_ptr: float32 [chunks]; written.
        weight_ptr: float32 [], or None.
        weight: float32; used where ``weight_ptr`` is None.
        HAS_GRADS: Write the gradients.
        BLOCK_SIZE: Elements a chunk.
    """
    chunk = tl.program_id(0)
    row_ptr = table_ptr + chunk.to(tl.int64) * 6
    param_address = tl.load(row_ptr)
    anchor_address = tl.load(row_ptr + 1)
    grad_address = tl.load(row_ptr + 2)
    count = tl.load(row_ptr + 3).to(tl.int32)
    code = tl.load(row_ptr + 4).to(tl.int32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr)
    factor = 2.0 * weight
    access = code >> 16
    square = 0.0
    if access == 2:
        square = _pull_chunk(
            param_address,
            anchor_address,
            grad_address,
            count,
            code,
            factor,
            HAS_GRADS,
            True,
            True,
            BLOCK_SIZE,
        )
    elif access == 1:
        square = _pull_chunk(
            param_address,
            anchor_address,
            grad_address,
            count,
            code,
            factor,
            HAS_GRADS,
            True,
            False,
            BLOCK_SIZE,
        )
    else:
        square = _pull_chunk(
            param_address,
            anchor_address,
            grad_address,
            count,
            code,
            factor,
            HAS_GRADS,
            False,
            False,
            BLOCK_SIZE,
        )
    tl.store(partial_ptr + chunk, square)


@triton.jit(do_not_specialize=["num_partials"])
def weighted_sum_kernel(
    partial_ptr,
    sum_ptr,
    weight_ptr,
    weight,
    num_partials,
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Write weight * the sum of the partials, in one program and so in one order.

    Memory traffic: 4 bytes a partial.

    Args:
        partial_ptr: float32 [num_partials].
        sum_ptr: float32 []; written.
        weight_ptr: float32 [], or None.
        weight: float32; used where ``weight_ptr`` is None.
        num_partials: int32.
        BLOCK_SIZE: Partials read at a time.
    """
    offsets = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_SIZE], tl.float32)
    start = 0
    while start < num_partials:
        mask = start + offsets < num_partials
        sums += tl.load(partial_ptr + start + offsets, mask=mask, other=0.0)
        start += BLOCK_SIZE
    if weight_ptr is not None:
        weight = tl.load(weight_ptr)
    tl.store(sum_ptr, weight * tl.sum(sums))
