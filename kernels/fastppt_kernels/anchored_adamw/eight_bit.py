"""Moments in 8 bits: a code for each element, a scale for each block of them.

value = map[code] * scale,   scale = max |value| over the block

The map is dynamic: each of seven decades, down to 1e-6 of the scale, has twice the codes of the one
below it. Blocks are of 256 elements of a parameter's memory; the last may be of fewer.

Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), sections 2.1 and 2.2. The
map is that of bitsandbytes and torchao (``create_dynamic_map``). Our choice: a scale is not held
above 1e-12, which second moments of large networks lie below; and a second moment that is not zero
is never stored as zero, or a step would divide by ``eps`` alone where it is small beside its
block's largest.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_SIZE = 256
# Smallest normal float32: a block of less, or of zeros, is scaled by it.
TINY = torch.finfo(torch.float32).tiny
NUM_DECADES = 7


class Maps(NamedTuple):
    """What codes of one kind of moment stand for.

    Attributes:
        values: float32 [256], ascending.
        bounds: float32 [256]: a value's code is the number of bounds that are not above it. The
            last is infinite.
    """

    values: Tensor
    bounds: Tensor


@cache
def make_map_table(device: torch.device) -> Tensor:
    """Return values and bounds of the first map, then of the second, float32 [4, 256]."""
    rows = []
    for signed in (True, False):
        values = torch.tensor(_dynamic_map(signed))
        bounds = torch.cat([(values[:-1] + values[1:]) / 2, torch.tensor([torch.inf])])
        if not signed:
            bounds[0] = TINY
        rows += [values, bounds]
    return torch.stack(rows).to(device)


def make_maps(device: torch.device) -> tuple[Maps, Maps]:
    """Return the maps of the first and of the second moment, on the device."""
    values1, bounds1, values2, bounds2 = make_map_table(device)
    return Maps(values1, bounds1), Maps(values2, bounds2)


def _dynamic_map(signed: bool) -> list[float]:
    values = [0.0, 1.0]
    for decade in range(NUM_DECADES):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        # A float32 product, as the libraries have it.
        means = 10.0 ** (decade + 1 - NUM_DECADES) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return sorted(values)


def make_codes(param: Tensor, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Return codes (uint8, as ``param``) and scales (float32 [blocks]) of a moment that is zero."""
    codes = torch.zeros_like(
        param, dtype=torch.uint8, requires_grad=False, memory_format=memory_format
    )
    # Not to be made within a step, which may be captured.
    make_map_table(param.device)
    num_blocks = -(-param.numel() // BLOCK_SIZE)
    return codes, torch.zeros(num_blocks, dtype=torch.float32, device=param.device)


def quantize(values: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 [n], and scales, float32 [blocks].

    Args:
        values: float32 [n].
        bounds: Of the moment's `Maps`.
    """
    blocks = _as_blocks(values)
    scales = blocks.abs().amax(dim=1).clamp(min=TINY)
    codes = torch.bucketize(blocks / scales[:, None], bounds[:-1], right=True, out_int32=True)
    return codes.to(torch.uint8).flatten()[: values.numel()], scales


def dequantize(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """Return what the codes stand for, float32 [n].

    Args:
        codes: uint8 [n].
        scales: float32 [blocks].
        values: Of the moment's `Maps`.
    """
    blocks = _as_blocks(values[codes.int()])
    return (blocks * scales[:, None]).flatten()[: codes.numel()]


def _as_blocks(values: Tensor) -> Tensor:
    missing = -values.numel() % BLOCK_SIZE
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.view(-1, BLOCK_SIZE)
