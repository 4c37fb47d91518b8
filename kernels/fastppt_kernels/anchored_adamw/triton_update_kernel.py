"""The kernel that writes parameters, moments and working copies.

For rows of the table see ``triton_kernel``. Moments are float32.
"""

import triton
import triton.language as tl

from fastppt_kernels.anchored_adamw.triton_kernel import PULL_PARAMETER, load_gradient
from fastppt_kernels.anchored_adamw.triton_rounding import make_key, round_at_random
from fastppt_kernels.triton_foreign import store_foreign

ROW = tl.constexpr(9)


@triton.jit
def advance_moments(exp_avg, exp_avg_sq, grad, beta2, one_minus_beta1, one_minus_beta2):
    """Return both moments after a gradient, float32 of its shape."""
    exp_avg += one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    return exp_avg, exp_avg_sq


@triton.jit
def advance_param(
    param,
    difference,
    exp_avg,
    exp_avg_sq,
    lr,
    weight,
    correction1,
    correction2,
    eps,
    weight_decay,
    PULL: tl.constexpr,  # noqa: N803
    IS_EXACT: tl.constexpr,  # noqa: N803
):
    """Return the new parameter in float32, from the moments after the gradient.

    Root and quotient are rounded to nearest if IS_EXACT; else they are the GPU's own, off by a few
    roundings, beside which moments of 8 bits are coarse, and take no calls that spill registers.
    """
    if IS_EXACT:
        denominator = tl.sqrt_rn(exp_avg_sq) * correction2 + eps
        quotient = tl.div_rn(exp_avg, denominator)
    else:
        denominator = tl.sqrt(exp_avg_sq) * correction2 + eps
        quotient = exp_avg / denominator
    change = weight_decay * param + correction1 * quotient
    if PULL == PULL_PARAMETER:
        change += weight * difference
    return param - lr * change


@triton.jit
def store_param(
    row_ptr,
    offsets,
    param,
    mask,
    code,
    counter,
    key,
    HAS_COPIES: tl.constexpr,  # noqa: N803
    ROUND_AT_RANDOM: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    FLOAT32: tl.constexpr,  # noqa: N803
):
    """Store the new parameter, and its working copy, each rounded from float32.

    Args:
        row_ptr: The row of the table.
        offsets: In elements from the chunk's first, of any shape.
        param: float32, of that shape.
        mask: Of that shape.
        code: The dtypes of the row.
        counter: int32 scalar, of the chunk's first element; see ``rounding``.
        key: uint32 scalar, of the step.
        HAS_COPIES: Some row has a working copy.
        ROUND_AT_RANDOM: Round a float16 or bfloat16 parameter up or down at random.
        ALIGNED: All addresses are multiples of 16 bytes.
        FLOAT32: The parameter is float32.
    """
    param_code = 0 if FLOAT32 else code & 3
    if ROUND_AT_RANDOM:
        param = round_at_random(param, counter + offsets, key, param_code)
    store_foreign(tl.load(row_ptr), offsets, param, mask, param_code, ALIGNED)
    if HAS_COPIES:
        copy_address = tl.load(row_ptr + 5)
        copied = mask & (copy_address != 0)
        store_foreign(copy_address, offsets, param, copied, (code >> 10) & 3, ALIGNED)


@triton.jit
def make_key_of(step_table_ptr, param_index, seed):
    """Return the key of the step that a parameter is at, which the reduction has counted."""
    step_ptr = tl.load(step_table_ptr + param_index * 3).to(tl.pointer_type(tl.float32))
    return make_key(seed, tl.load(step_ptr))


@triton.jit
def _update_block(
    row_ptr,
    offsets,
    mask,
    code,
    lr,
    weight,
    coefficient,
    correction1,
    correction2,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    weight_decay,
    counter,
    key,
    PULL: tl.constexpr,  # noqa: N803
    HAS_COPIES: tl.constexpr,  # noqa: N803
    ROUND_AT_RANDOM: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    FLOAT32: tl.constexpr,  # noqa: N803
):
    """Update the elements at ``offsets`` of the row's tensors."""
    param, difference, grad = load_gradient(
        tl.load(row_ptr),
        tl.load(row_ptr + 1),
        tl.load(row_ptr + 2),
        offsets,
        mask,
        code,
        weight,
        PULL,
        True,
        ALIGNED,
        FLOAT32,
    )
    exp_avg_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        exp_avg_ptr = tl.multiple_of(exp_avg_ptr, 16)
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_ptr, 16)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0)

    exp_avg, exp_avg_sq = advance_moments(
        exp_avg, exp_avg_sq, grad * coefficient, beta2, one_minus_beta1, one_minus_beta2
    )
    param = advance_param(
        param,
        difference,
        exp_avg,
        exp_avg_sq,
        lr,
        weight,
        correction1,
        correction2,
        eps,
        weight_decay,
        PULL,
        True,
    )
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
    store_param(
        row_ptr,
        offsets,
        param,
        mask,
        code,
        counter,
        key,
        HAS_COPIES,
        ROUND_AT_RANDOM,
        ALIGNED,
        FLOAT32,
    )


@triton.jit
def _update_chunk(
    row_ptr,
    lr,
    weight,
    coefficient,
    correction1,
    correction2,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    weight_decay,
    counter,
    key,
    PULL: tl.constexpr,  # noqa: N803
    HAS_COPIES: tl.constexpr,  # noqa: N803
    ROUND_AT_RANDOM: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    FLOAT32: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Do :func:`_update_block` for a row of the table."""
    count = tl.load(row_ptr + 6).to(tl.int32)
    code = tl.load(row_ptr + 7).to(tl.int32)
    offsets = tl.arange(0, BLOCK_SIZE)
    whole = count // 16 * 16 if ALIGNED else count
    _update_block(
        row_ptr,
        offsets,
        offsets < whole,
        code,
        lr,
        weight,
        coefficient,
        correction1,
        correction2,
        beta2,
        one_minus_beta1,
        one_minus_beta2,
        eps,
        weight_decay,
        counter,
        key,
        PULL,
        HAS_COPIES,
        ROUND_AT_RANDOM,
        ALIGNED,
        FLOAT32,
    )
    if ALIGNED:  # noqa: SIM102 - decided at compile time
        if whole < count:
            rest = whole + tl.arange(0, 16)
            _update_block(
                row_ptr,
                rest,
                rest < count,
                code,
                lr,
                weight,
                coefficient,
                correction1,
                correction2,
                beta2,
                one_minus_beta1,
                one_minus_beta2,
                eps,
                weight_decay,
                counter,
                key,
                PULL,
                HAS_COPIES,
                ROUND_AT_RANDOM,
                ALIGNED,
                FLOAT32,
            )


@triton.jit(do_not_specialize=["first_row", "first_param", "seed"])
def anchored_adamw_update_kernel(
    table_ptr,
    lr_ptr,
    weight_ptr,
    correction_ptr,
    result_ptr,
    skipped_ptr,
    step_table_ptr,
    first_row,
    first_param,
    seed,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    weight_decay,
    PULL: tl.constexpr,  # noqa: N803
    HAS_COPIES: tl.constexpr,  # noqa: N803
    ROUND_AT_RANDOM: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Write parameters, moments and working copies of a group.

    g = coefficient (grad + 2 weight (param - anchor)),   m += (1 - beta1)(g - m)
    v = beta2 v + (1 - beta2) g^2,   param -= lr (weight_decay param + m^ / (sqrt(v^) + eps))
    with PULL_PARAMETER:  g = coefficient grad,  param -= lr weight (param - anchor) as well

    One program a row of the table, in float32; each stored value is rounded once.

    Memory traffic: 8 reads or writes an element (7 without an anchor), 2 bytes for a bfloat16
    copy, and 80 bytes a chunk. FLOPs: 20 an element.

    Args:
        table_ptr: int64 [chunks of this group, 9]; see above. All but anchors and gradients is
            written.
        lr_ptr: float32 [].
        weight_ptr: float32 [], the anchor's.
        correction_ptr: float32 [parameters of all groups, 2], from the kernel above.
        result_ptr: float32 [3], likewise; the third is the clip coefficient.
        skipped_ptr: uint8 [], likewise: where it is not 0 nothing is written; or None.
        step_table_ptr: int64 [parameters of all groups, 3], the addresses of the step counts first.
        first_row: Of the table, the one of the first program.
        first_param: Where the parameters of this group begin in ``correction_ptr``.
        seed: int32, of the random bits.
        beta2: float32, as are the four after it.
        one_minus_beta1: Rounded from float64, as beta1 is not needed itself.
        one_minus_beta2: Likewise.
        eps: Added to the root.
        weight_decay: AdamW's.
        PULL: As above.
        HAS_COPIES: Some row has a working copy.
        ROUND_AT_RANDOM: Round float16 and bfloat16 parameters up or down at random.
        BLOCK_SIZE: Elements a chunk.
    """
    moves = tl.load(skipped_ptr) == 0 if skipped_ptr is not None else True
    if moves:
        row = first_row + tl.program_id(0)
        row_ptr = table_ptr + row.to(tl.int64) * ROW
        code = tl.load(row_ptr + 7).to(tl.int32)
        lr = tl.load(lr_ptr)
        weight = tl.load(weight_ptr)
        coefficient = tl.load(result_ptr + 2)
        param_index = first_param + tl.load(row_ptr + 8)
        correction1 = tl.load(correction_ptr + param_index * 2)
        correction2 = tl.load(correction_ptr + param_index * 2 + 1)
        counter = row * BLOCK_SIZE
        key = make_key_of(step_table_ptr, param_index, seed) if ROUND_AT_RANDOM else 0
        if code >> 16 == 0:
            _update_chunk(
                row_ptr,
                lr,
                weight,
                coefficient,
                correction1,
                correction2,
                beta2,
                one_minus_beta1,
                one_minus_beta2,
                eps,
                weight_decay,
                counter,
                key,
                PULL,
                HAS_COPIES,
                ROUND_AT_RANDOM,
                False,
                False,
                BLOCK_SIZE,
            )
        elif code & 63 == 0:
            _update_chunk(
                row_ptr,
                lr,
                weight,
                coefficient,
                correction1,
                correction2,
                beta2,
                one_minus_beta1,
                one_minus_beta2,
                eps,
                weight_decay,
                counter,
                key,
                PULL,
                HAS_COPIES,
                ROUND_AT_RANDOM,
                True,
                True,
                BLOCK_SIZE,
            )
        else:
            _update_chunk(
                row_ptr,
                lr,
                weight,
                coefficient,
                correction1,
                correction2,
                beta2,
                one_minus_beta1,
                one_minus_beta2,
                eps,
                weight_decay,
                counter,
                key,
                PULL,
                HAS_COPIES,
                ROUND_AT_RANDOM,
                True,
                False,
                BLOCK_SIZE,
            )
