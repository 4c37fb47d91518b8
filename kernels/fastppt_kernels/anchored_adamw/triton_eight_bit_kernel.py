"""The kernel that writes parameters, working copies and moments in 8 bits.

For rows of the table see ``tables``, for codes and scales ``eight_bit``. A chunk is worked on as
[blocks, elements of a block]: a block has one scale.
"""

import triton
import triton.language as tl

from fastppt_kernels.anchored_adamw.triton_kernel import load_gradient
from fastppt_kernels.anchored_adamw.triton_update_kernel import (
    advance_moments,
    advance_param,
    make_key_of,
    store_param,
)

ROW = tl.constexpr(11)
# Elements with one scale, and the smallest scale; eight_bit has both.
QUANTIZED = tl.constexpr(256)
TINY = tl.constexpr(1.1754943508222875e-38)
# Blocks of a whole chunk that are worked on at a time: what registers have room for.
BLOCKS_AT_ONCE = tl.constexpr(4)


@triton.jit
def _load_moment(
    code_address,
    scale_address,
    offsets,
    mask,
    blocks,
    block_mask,
    value_ptr,
    ALIGNED: tl.constexpr,  # noqa: N803
):
    """Return a moment, float32 [blocks, 256], and the pointers to its codes and scales.

    Args:
        code_address: int64 scalar, of the chunk's codes, uint8.
        scale_address: int64 scalar, of the chunk's scales, float32.
        offsets: [blocks, 256], in elements.
        mask: Of that shape.
        blocks: [blocks].
        block_mask: Of that shape.
        value_ptr: float32 [256], what the codes stand for.
        ALIGNED: The code's address is a multiple of 16 bytes.
    """
    code_ptr = code_address.to(tl.pointer_type(tl.uint8))
    scale_ptr = scale_address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        code_ptr = tl.multiple_of(code_ptr, 16)
    codes = tl.load(code_ptr + offsets, mask=mask, other=0)
    scales = tl.load(scale_ptr + blocks, mask=block_mask, other=0.0)
    moment = tl.load(value_ptr + codes.to(tl.int32)) * scales[:, None]
    return moment, code_ptr, scale_ptr


@triton.jit
def _store_moment(moment, code_ptr, scale_ptr, offsets, mask, blocks, block_mask, bound_ptr):
    """Store a moment: scale = max |moment| of its block, code = bounds that are not above it.

    Args:
        moment: float32 [blocks, 256]; finite.
        code_ptr: uint8, as the next four from :func:`_load_moment`.
        scale_ptr: float32.
        offsets: [blocks, 256], in elements.
        mask: Of that shape.
        blocks: [blocks].
        block_mask: Of that shape.
        bound_ptr: float32 [256], ascending, the last infinite.
    """
    scales = tl.max(tl.where(mask, tl.abs(moment), 0.0), axis=1)
    scales = tl.maximum(scales, TINY)
    # Off by two roundings at most, which matters to a value between two codes alone.
    scaled = moment / scales[:, None]
    codes = tl.zeros_like(offsets)
    for step in tl.static_range(8):
        half = 128 >> step
        codes += tl.where(scaled >= tl.load(bound_ptr + codes + (half - 1)), half, 0)
    tl.store(code_ptr + offsets, codes.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + blocks, scales, mask=block_mask)


@triton.jit
def _update_blocks(
    row_ptr,
    first_block,
    count,
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
    map_ptr,
    PULL: tl.constexpr,  # noqa: N803
    HAS_COPIES: tl.constexpr,  # noqa: N803
    ROUND_AT_RANDOM: tl.constexpr,  # noqa: N803
    WHOLE: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
):
    """Update the elements of NUM_BLOCKS blocks of a row of ``count``; a WHOLE row is aligned."""
    code = tl.load(row_ptr + 7).to(tl.int32)
    blocks = first_block + tl.arange(0, NUM_BLOCKS)
    offsets = blocks[:, None] * QUANTIZED + tl.arange(0, QUANTIZED)[None, :]
    mask = offsets < count
    block_mask = blocks * QUANTIZED < count
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
        WHOLE,
        False,
    )
    exp_avg, code1_ptr, scale1_ptr = _load_moment(
        tl.load(row_ptr + 3),
        tl.load(row_ptr + 9),
        offsets,
        mask,
        blocks,
        block_mask,
        map_ptr,
        WHOLE,
    )
    exp_avg_sq, code2_ptr, scale2_ptr = _load_moment(
        tl.load(row_ptr + 4),
        tl.load(row_ptr + 10),
        offsets,
        mask,
        blocks,
        block_mask,
        map_ptr + 2 * QUANTIZED,
        WHOLE,
    )
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
        False,
    )
    bound_ptr = map_ptr + QUANTIZED
    _store_moment(exp_avg, code1_ptr, scale1_ptr, offsets, mask, blocks, block_mask, bound_ptr)
    bound_ptr += 2 * QUANTIZED
    _store_moment(exp_avg_sq, code2_ptr, scale2_ptr, offsets, mask, blocks, block_mask, bound_ptr)
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
        WHOLE,
        False,
    )


@triton.jit(do_not_specialize=["first_row", "first_param", "seed"])
def anchored_adamw_eight_bit_kernel(
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
    map_ptr,
    PULL: tl.constexpr,  # noqa: N803
    HAS_COPIES: tl.constexpr,  # noqa: N803
    ROUND_AT_RANDOM: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Do ``anchored_adamw_update_kernel`` with moments that are read from codes and written so.

    The parameter is updated with the moments as they are in float32, before they are rounded.

    One program a row of the table.

    Memory traffic an element, of a bfloat16 parameter with gradient and anchor in bfloat16: 8 bytes
    read and 4 written (6 read without an anchor), 1/16 for scales, and 96 bytes a chunk. The maps
    are read from cache.

    Args:
        table_ptr: int64 [chunks of this group, 11]; see above. All but anchors and gradients is
            written.
        lr_ptr: As ``anchored_adamw_update_kernel``, as are all up to ``weight_decay``.
        weight_ptr: Likewise.
        correction_ptr: Likewise.
        result_ptr: Likewise.
        skipped_ptr: Likewise.
        step_table_ptr: Likewise.
        first_row: Likewise.
        first_param: Likewise.
        seed: Likewise.
        beta2: Likewise.
        one_minus_beta1: Likewise.
        one_minus_beta2: Likewise.
        eps: Likewise.
        weight_decay: Likewise.
        map_ptr: float32 [4, 256], ``eight_bit.make_map_table``.
        PULL: As there, as are the next two.
        HAS_COPIES: Likewise.
        ROUND_AT_RANDOM: Likewise.
        BLOCK_SIZE: Elements a chunk, a multiple of 256.
    """
    moves = tl.load(skipped_ptr) == 0 if skipped_ptr is not None else True
    if moves:
        row = first_row + tl.program_id(0)
        row_ptr = table_ptr + row.to(tl.int64) * ROW
        lr = tl.load(lr_ptr)
        weight = tl.load(weight_ptr)
        coefficient = tl.load(result_ptr + 2)
        param_index = first_param + tl.load(row_ptr + 8)
        correction1 = tl.load(correction_ptr + param_index * 2)
        correction2 = tl.load(correction_ptr + param_index * 2 + 1)
        counter = row * BLOCK_SIZE
        key = make_key_of(step_table_ptr, param_index, seed) if ROUND_AT_RANDOM else 0
        is_aligned = (tl.load(row_ptr + 7) >> 16) != 0
        if is_aligned & (tl.load(row_ptr + 6) == BLOCK_SIZE):
            # A bound that is known lets a thread's loads be wide ones.
            for first_block in range(0, BLOCK_SIZE // QUANTIZED, BLOCKS_AT_ONCE):
                _update_blocks(
                    row_ptr,
                    first_block,
                    BLOCK_SIZE,
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
                    map_ptr,
                    PULL,
                    HAS_COPIES,
                    ROUND_AT_RANDOM,
                    True,
                    BLOCKS_AT_ONCE,
                )
        else:
            # One at a time: masks of several take more registers than there are.
            count = tl.load(row_ptr + 6).to(tl.int32)
            first_block = 0
            while first_block * QUANTIZED < count:
                _update_blocks(
                    row_ptr,
                    first_block,
                    count,
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
                    map_ptr,
                    PULL,
                    HAS_COPIES,
                    ROUND_AT_RANDOM,
                    False,
                    1,
                )
                first_block += 1
