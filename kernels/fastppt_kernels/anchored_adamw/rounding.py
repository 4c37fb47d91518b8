"""Rounding up or down at random, so that updates too small for 16 bits are not lost.

x is rounded to the neighbour above with the probability (x - below) / (above - below), else to the
one below: the mean is x. The random bits are a function of a seed, the step and the element:

key = mix(mix(seed) ^ step),   bits = mix(mix(counter) ^ key)

so that a resumed run rounds as the uninterrupted one, and a captured step anew at each replay. Of
them bfloat16 takes 16 and float16 takes 13, which is all that float32 has beyond either.

Source: stochastic rounding, Gupta et al. (arXiv 1502.02551), section 3. Our choice: ``mix`` is the
hash "lowbias32" of Wellons' hash prospector instead of a Philox generator, at a tenth of its
instructions; roundings ask for no more than unbiased bits that differ from step to step.
"""

import torch
from torch import Tensor

# Elements of a parameter count from the number of the chunk that it begins with times this: the
# size of the kernels' chunks, of which each has a row of the table.
COUNTER_CHUNK = 2048

_MASK = 0xFFFFFFFF
# 2^24: one over the distance of two float16 below 2^-14, the smallest that is normal.
_SUBNORMALS = 2.0**24
_SMALLEST_NORMAL = 2.0**-14


def mix(x: Tensor) -> Tensor:
    """Return the hash of 32-bit numbers, int64 of any shape."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def make_key(seed: int, step: Tensor) -> Tensor:
    """Return the key of a step, int64 0-dim, from its number (any dtype) on the device."""
    return mix(mix(torch.full_like(step, seed, dtype=torch.int64)) ^ step.to(torch.int64))


def random_bits(key: Tensor, first: int, count: int) -> Tensor:
    """Return the bits of ``count`` elements from counter ``first``, int64 [count] below 2^32."""
    counters = torch.arange(first, first + count, device=key.device) & _MASK
    return mix(mix(counters) ^ key)


def round_at_random(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 values rounded to bfloat16 or float16; what is not finite stays so.

    Args:
        values: float32 [n].
        bits: int64 [n], from :func:`random_bits`.
        dtype: torch.bfloat16 or torch.float16.
    """
    num_bits = 16 if dtype == torch.bfloat16 else 13
    low = (1 << num_bits) - 1
    drawn = (bits & low).to(torch.int32)
    rounded = ((values.view(torch.int32) + drawn) & ~low).view(torch.float32)
    if dtype == torch.float16:
        small = (values.abs() * _SUBNORMALS + drawn / (low + 1)).floor() / _SUBNORMALS
        rounded = torch.where(
            values.abs() < _SMALLEST_NORMAL, torch.copysign(small, values), rounded
        )
    return torch.where(values.isfinite(), rounded, values).to(dtype)
