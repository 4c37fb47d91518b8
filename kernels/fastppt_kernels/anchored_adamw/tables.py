"""Tables of chunks beyond ``launch.chunk_table``: anchors in buffers, moments in 8 bits.

A row is that of ``triton_kernel``; with moments in 8 bits two more columns hold the addresses of
the chunk's scales, and the fourth and fifth those of its codes.
"""

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fastppt_kernels.anchored_adamw.batch import Batch
from fastppt_kernels.anchored_adamw.eight_bit import BLOCK_SIZE
from fastppt_kernels.anchored_adamw.staging import AnchorStream, Plan
from fastppt_kernels.launch import (
    ALIGNMENT,
    BYTE_CODE,
    addresses_of,
    build_chunk_rows,
    cached_table,
    chunk_table,
    codes_of,
    split_into_chunks,
)

# The column of the anchors.
ANCHOR = 1
FLOAT32_BYTES = 4


def batch_table(
    batch: Batch, chunk_size: int, plan: Plan | None, stream: AnchorStream | None
) -> Tensor:
    """Return the table of chunks of the batch, int64 [chunks, 9], or 11 with moments in 8 bits.

    Args:
        batch: With gradients that are walked as its parameters are.
        chunk_size: Elements a chunk.
        plan: Of anchors that come from the host; None: they are on the device.
        stream: With the plan, the buffers that they come through.
    """
    anchors = batch.anchors if batch.form != "none" else [None] * len(batch.params)
    moments = (batch.exp_avgs, batch.exp_avg_sqs)
    lists: list[Sequence[Tensor | None]] = [
        batch.params,
        anchors,
        batch.grads,
        *moments,
        batch.copies,
    ]
    if plan is None and not batch.has_codes:
        return chunk_table(lists, chunk_size)

    addresses = [*map(addresses_of, lists)]
    codes = [*map(codes_of, [batch.params, anchors, batch.grads])]
    codes += [(BYTE_CODE if batch.has_codes else 0,) * len(batch.params)] * 2
    codes.append(codes_of(batch.copies))
    buffers: tuple[int, ...] = ()
    filled = 0
    if plan is not None and stream is not None:
        # A piece begins at a multiple of it.
        addresses[ANCHOR] = tuple(ALIGNMENT if a is not None else 0 for a in anchors)
        buffers, filled = addresses_of(stream.buffers), plan.num_bytes
    scales = [
        addresses_of(given)
        for given in (batch.exp_avg_scales, batch.exp_avg_sq_scales)
        if given is not None
    ]
    sizes = tuple(map(Tensor.numel, batch.params))

    def build() -> Tensor:
        rows = build_chunk_rows(addresses, codes, sizes, chunk_size)
        if plan is not None:
            rows[:, ANCHOR] = _places_of(plan, buffers)
        index, start = split_into_chunks(torch.tensor(sizes), chunk_size)
        more = [torch.tensor(each)[index] + start // BLOCK_SIZE * FLOAT32_BYTES for each in scales]
        return torch.cat([rows, *(column[:, None] for column in more)], dim=1)

    key = ("anchored_adamw", *addresses, *codes, sizes, chunk_size, *scales, buffers, filled)
    return cached_table(key, build, batch.params[0].device)


def _places_of(plan: Plan, buffers: Sequence[int]) -> Tensor:
    """Return the address that each row reads its anchor at; 0 for rows without one."""
    # The index -1 takes the last.
    begins = torch.tensor([*buffers, 0])[plan.buffers]
    return begins + plan.offsets


def step_table(batches: Sequence[Batch]) -> Tensor:
    """Return the table of step counts, int64 [parameters, 3], as the reduction reads it."""
    steps = tuple(step.data_ptr() for batch in batches for step in batch.steps)
    betas = tuple(batch.betas for batch in batches for _ in batch.steps)

    def build() -> Tensor:
        bits = [[_log_bits(beta1), _log_bits(beta2)] for beta1, beta2 in betas]
        return torch.cat([torch.tensor(steps)[:, None], torch.tensor(bits)], dim=1)

    return cached_table(("steps", steps, betas), build, batches[0].params[0].device)


def _log_bits(beta: float) -> int:
    """Return the bits of log(beta) in float64, as an integer."""
    log = math.log(beta) if beta > 0 else -math.inf
    bits: int = struct.unpack("<q", struct.pack("<d", log))[0]
    return bits
