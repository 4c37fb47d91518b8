"""Loads and stores through addresses from a table, of a dtype known at run time only.

Codes of dtypes: 0 float32, 1 bfloat16, 2 float16 (``launch.DTYPE_CODES``).
"""

import triton
import triton.language as tl


@triton.jit
def load_foreign(address, offsets, mask, code, ALIGNED: tl.constexpr):  # noqa: N803
    """Return the elements at ``offsets`` from ``address``, widened to float32; 0 off the mask.

    Each width of dtype has its load, and one of the two is masked off whole: it costs an
    instruction and reads nothing. A branch would keep loads of several tensors from overlapping.

    Args:
        address: int64 scalar; at 0 the mask must be false.
        offsets: In elements, any shape.
        mask: Of the shape of ``offsets``.
        code: Scalar, the dtype at the address.
        ALIGNED: The address is a multiple of 16 bytes.
    """
    wide_ptr = address.to(tl.pointer_type(tl.float32))
    narrow_ptr = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        wide_ptr = tl.multiple_of(wide_ptr, 16)
        narrow_ptr = tl.multiple_of(narrow_ptr, 16)
    wide = tl.load(wide_ptr + offsets, mask=mask & (code == 0), other=0.0)
    bits = tl.load(narrow_ptr + offsets, mask=mask & (code != 0), other=0)
    bfloat16 = bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
    float16 = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(code == 0, wide, tl.where(code == 1, bfloat16, float16))


@triton.jit
def store_foreign(address, offsets, value, mask, code, ALIGNED: tl.constexpr):  # noqa: N803
    """Store float32 ``value`` at ``offsets`` from ``address``, rounded to the dtype there.

    Args:
        address: int64 scalar.
        offsets: In elements, of the shape of ``value``.
        value: float32.
        mask: Of the shape of ``value``.
        code: Scalar, the dtype at the address.
        ALIGNED: The address is a multiple of 16 bytes.
    """
    wide_ptr = address.to(tl.pointer_type(tl.float32))
    narrow_ptr = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        wide_ptr = tl.multiple_of(wide_ptr, 16)
        narrow_ptr = tl.multiple_of(narrow_ptr, 16)
    bfloat16 = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
    float16 = value.to(tl.float16).to(tl.int16, bitcast=True)
    tl.store(wide_ptr + offsets, value, mask=mask & (code == 0))
    tl.store(narrow_ptr + offsets, tl.where(code == 1, bfloat16, float16), mask=mask & (code != 0))


@triton.jit
def advance(address, elements, code):
    """Return the address ``elements`` further on, in the dtype of ``code``."""
    return address + elements.to(tl.int64) * tl.where(code == 0, 4, 2)
