"""The kernels before the update: penalty and norm.

A row of the table of chunks, int64 [9]: the addresses of param, anchor (0: zeros, not read),
gradient, exp_avg, exp_avg_sq and working copy (0: none), the number of elements, the code, the
index of the parameter; see ``launch.chunk_table``. With moments in 8 bits it has two columns more,
see ``tables``.
"""

import triton
import triton.language as tl

from fastppt_kernels.triton_foreign import load_foreign

# How a step pulls to the anchor; op.PULLS names them.
NO_PULL = tl.constexpr(0)
PULL_GRADIENT = tl.constexpr(1)
PULL_PARAMETER = tl.constexpr(2)


@triton.jit
def load_gradient(
    param_address,
    anchor_address,
    grad_address,
    offsets,
    mask,
    code,
    weight,
    PULL: tl.constexpr,  # noqa: N803
    READ_PARAM: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    FLOAT32: tl.constexpr,  # noqa: N803
):
    """Return param, param - anchor, and the gradient after the pull, [n] float32 each.

    Args:
        param_address: int64 scalar, as the next two.
        anchor_address: 0 for an anchor of zeros, which is not read.
        grad_address: Of the gradient of the loss.
        offsets: [n], in elements.
        mask: [n].
        code: The dtypes, two bits each: param, anchor, gradient, two moments, working copy.
        weight: float32 scalar, the anchor's.
        PULL: See above. Without a pull no anchor is read, and the difference is the param.
        READ_PARAM: Read the param even without a pull; else it is 0.
        ALIGNED: All addresses are multiples of 16 bytes.
        FLOAT32: Param, anchor and gradient are float32.
    """
    if FLOAT32:
        param_code, anchor_code, grad_code = 0, 0, 0
    else:
        param_code, anchor_code, grad_code = code & 3, (code >> 2) & 3, (code >> 4) & 3
    grad = load_foreign(grad_address, offsets, mask, grad_code, ALIGNED)
    param = tl.zeros_like(grad)
    if READ_PARAM or PULL != NO_PULL:
        param = load_foreign(param_address, offsets, mask, param_code, ALIGNED)
    difference = param
    if PULL != NO_PULL:
        anchored = mask & (anchor_address != 0)
        difference = param - load_foreign(anchor_address, offsets, anchored, anchor_code, ALIGNED)
    if PULL == PULL_GRADIENT:
        grad += 2.0 * weight * difference
    return param, difference, grad


@triton.jit
def _square_block(
    row_ptr,
    offsets,
    mask,
    code,
    weight,
    PULL: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    FLOAT32: tl.constexpr,  # noqa: N803
):
    """Return the sums of the squares of the pulled gradient and of param - anchor."""
    _, difference, grad = load_gradient(
        tl.load(row_ptr),
        tl.load(row_ptr + 1),
        tl.load(row_ptr + 2),
        offsets,
        mask,
        code,
        weight,
        PULL,
        False,
        ALIGNED,
        FLOAT32,
    )
    return tl.sum(grad * grad), tl.sum(difference * difference)


@triton.jit
def _square_chunk(
    row_ptr,
    weight,
    PULL: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    FLOAT32: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Do :func:`_square_block` for a row of the table."""
    count = tl.load(row_ptr + 6).to(tl.int32)
    code = tl.load(row_ptr + 7).to(tl.int32)
    offsets = tl.arange(0, BLOCK_SIZE)
    # A bound that is a multiple of 16 lets a thread's loads be wide ones; the rest follows.
    whole = count // 16 * 16 if ALIGNED else count
    square, distance = _square_block(
        row_ptr, offsets, offsets < whole, code, weight, PULL, ALIGNED, FLOAT32
    )
    if ALIGNED:  # noqa: SIM102 - decided at compile time
        if whole < count:
            rest = whole + tl.arange(0, 16)
            rest_square, rest_distance = _square_block(
                row_ptr, rest, rest < count, code, weight, PULL, ALIGNED, FLOAT32
            )
            square += rest_square
            distance += rest_distance
    return square, distance


@triton.jit(do_not_specialize=["first_row", "row_size", "first_chunk", "num_chunks"])
def anchored_adamw_square_kernel(
    table_ptr,
    weight_ptr,
    partial_ptr,
    first_row,
    row_size,
    first_chunk,
    num_chunks,
    PULL: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Write each chunk's ||g + 2 weight (param - anchor)||^2 and weight ||param - anchor||^2.

    One program a row of the table, from ``first_row``. In float32; the gradient is not written.

    Memory traffic: 3 reads an element (2 without anchors, 1 without a pull), and 80 bytes a chunk.

    Args:
        table_ptr: int64 [chunks of this group, row_size]; see above.
        weight_ptr: float32 [], the anchor's.
        partial_ptr: float32 [2, num_chunks], gradients then penalties; written.
        first_row: Of the table, the one of the first program.
        row_size: Columns of the table.
        first_chunk: Where the chunks of this group begin in ``partial_ptr``.
        num_chunks: Chunks of all groups.
        PULL: NO_PULL, PULL_GRADIENT, or PULL_PARAMETER (the penalty alone).
        BLOCK_SIZE: Elements a chunk.
    """
    chunk = first_row + tl.program_id(0)
    row_ptr = table_ptr + chunk.to(tl.int64) * row_size
    code = tl.load(row_ptr + 7).to(tl.int32)
    weight = tl.load(weight_ptr)
    square = 0.0
    distance = 0.0
    # Bits 0 to 5 are the dtypes of param, anchor and gradient; from bit 16 comes the access.
    if code >> 16 == 0:
        square, distance = _square_chunk(row_ptr, weight, PULL, False, False, BLOCK_SIZE)
    elif code & 63 == 0:
        square, distance = _square_chunk(row_ptr, weight, PULL, True, True, BLOCK_SIZE)
    else:
        square, distance = _square_chunk(row_ptr, weight, PULL, True, False, BLOCK_SIZE)
    tl.store(partial_ptr + first_chunk + chunk, square)
    penalty = 0.0
    if PULL != NO_PULL:
        penalty = weight * distance
    tl.store(partial_ptr + num_chunks + first_chunk + chunk, penalty)


@triton.jit(do_not_specialize=["num_chunks", "num_params"])
def anchored_adamw_reduce_kernel(
    partial_ptr,
    extra_penalty_ptr,
    skip_ptr,
    step_table_ptr,
    correction_ptr,
    result_ptr,
    skipped_ptr,
    max_grad_norm,
    num_chunks,
    num_params,
    HAS_CLIP: tl.constexpr,  # noqa: N803
    SKIP_NON_FINITE: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Write penalty, grad_norm and clip coefficient; say whether the step is skipped, or count it.

    coefficient = min(1, max_grad_norm / (grad_norm + 1e-6)), NaN where the norm is
    corrections = 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    skipped = skip != 0, or with SKIP_NON_FINITE not grad_norm < inf

    One program, so that every sum has one order. Sums of partials and corrections in float64.

    Memory traffic: 8 bytes a chunk, 40 a parameter.

    Args:
        partial_ptr: float32 [2, num_chunks], from the kernel above.
        extra_penalty_ptr: float32 [], added to the penalty; or None.
        skip_ptr: uint8 []: where it is not 0 the step is skipped; or None.
        step_table_ptr: int64 [num_params, 3]: the address of t, a float32 that is written; the
            bits of log(beta1) and of log(beta2) in float64. A skipped step is not counted.
        correction_ptr: float32 [num_params, 2]; written.
        result_ptr: float32 [3]; written.
        skipped_ptr: uint8 [], 0 or 1; written.
        max_grad_norm: float32.
        num_chunks: Of all groups.
        num_params: Of all groups.
        HAS_CLIP: False: the coefficient is 1.
        SKIP_NON_FINITE: Skip a step whose norm is NaN or infinite, as a float32.
        BLOCK_SIZE: Partials or parameters worked on at a time.
    """
    offsets = tl.arange(0, BLOCK_SIZE)
    squares = tl.zeros([BLOCK_SIZE], tl.float64)
    penalties = tl.zeros([BLOCK_SIZE], tl.float64)
    start = 0
    while start < num_chunks:
        mask = start + offsets < num_chunks
        squares += tl.load(partial_ptr + start + offsets, mask=mask, other=0.0).to(tl.float64)
        penalty_ptr = partial_ptr + num_chunks + start
        penalties += tl.load(penalty_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        start += BLOCK_SIZE
    penalty = tl.sum(penalties)
    if extra_penalty_ptr is not None:
        penalty += tl.load(extra_penalty_ptr).to(tl.float64)
    grad_norm = tl.sqrt(tl.sum(squares)).to(tl.float32)
    tl.store(result_ptr, penalty.to(tl.float32))
    tl.store(result_ptr + 1, grad_norm)
    coefficient = 1.0
    if HAS_CLIP:
        coefficient = max_grad_norm / (grad_norm + 1e-6)
        # Not a minimum, which would turn NaN into 1.
        coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)
    tl.store(result_ptr + 2, coefficient)

    skipped = 0
    if skip_ptr is not None:
        skipped = (tl.load(skip_ptr) != 0).to(tl.uint8)
    if SKIP_NON_FINITE:
        # Nor is NaN less.
        skipped = tl.where(grad_norm < float("inf"), skipped, 1)
    tl.store(skipped_ptr, skipped)
    counts = skipped == 0
    start = 0
    while start < num_params:
        mask = start + offsets < num_params
        row_ptr = step_table_ptr + (start + offsets) * 3
        step_ptr = tl.load(row_ptr, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        log_beta1 = tl.load(row_ptr + 1, mask=mask, other=0).to(tl.float64, bitcast=True)
        log_beta2 = tl.load(row_ptr + 2, mask=mask, other=0).to(tl.float64, bitcast=True)
        step = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
        tl.store(step_ptr, step, mask=mask & counts)
        # In float64, or 1 - beta2^t would lose four of its digits at t = 1.
        correction1 = 1.0 / (1.0 - tl.exp(step.to(tl.float64) * log_beta1))
        correction2 = 1.0 / tl.sqrt(1.0 - tl.exp(step.to(tl.float64) * log_beta2))
        out_ptr = correction_ptr + (start + offsets) * 2
        tl.store(out_ptr, correction1.to(tl.float32), mask=mask)
        tl.store(out_ptr + 1, correction2.to(tl.float32), mask=mask)
        start += BLOCK_SIZE
