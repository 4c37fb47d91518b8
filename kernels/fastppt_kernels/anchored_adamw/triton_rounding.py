"""Random bits, and rounding by them: ``rounding`` in Triton, the same to the bit."""

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """Return the hash of uint32 numbers, of any shape."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def make_key(seed, step):
    """Return the key of a step, uint32, from the seed and the number of the step, float32."""
    return mix(mix(seed.to(tl.uint32)) ^ step.to(tl.int32).to(tl.uint32))


@triton.jit
def round_at_random(value, counters, key, code):
    """Return float32 values that the dtype of ``code`` has, up or down at random.

    Args:
        value: float32, of any shape.
        counters: int32 of that shape, the elements' own.
        key: uint32 scalar, the step's.
        code: Scalar, 1 bfloat16, 2 float16.
    """
    bits = mix(mix(counters.to(tl.uint32)) ^ key)
    raw = value.to(tl.uint32, bitcast=True)
    bfloat16 = (raw + (bits & 0xFFFF)) & tl.full((), 0xFFFF0000, tl.uint32)
    bfloat16 = bfloat16.to(tl.float32, bitcast=True)
    drawn = bits & 0x1FFF
    float16 = (raw + drawn) & tl.full((), 0xFFFFE000, tl.uint32)
    float16 = float16.to(tl.float32, bitcast=True)
    # Below 2^-14 float16 lie 2^-24 apart.
    magnitude = tl.abs(value)
    small = tl.floor(magnitude * 16777216.0 + drawn.to(tl.float32) * (1.0 / 8192.0))
    small = (small * (1.0 / 16777216.0)).to(tl.uint32, bitcast=True)
    small = (small | (raw & tl.full((), 0x80000000, tl.uint32))).to(tl.float32, bitcast=True)
    float16 = tl.where(magnitude < 6.103515625e-05, small, float16)
    rounded = tl.where(code == 1, bfloat16, float16)
    # Infinity, and NaN, which is not less, stay.
    return tl.where(magnitude < float("inf"), rounded, value)
