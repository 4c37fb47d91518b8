"""Batches with moments in 8 bits between guards, for tests of the kernels."""

import math
from dataclasses import replace

import torch

from fastppt_kernels.anchored_adamw import Batch, eight_bit, op
from fastppt_kernels.testing import GuardedTensors, draw_tensors

BLOCK = op.CHUNK_SIZE
F32 = torch.float32
SIZES = [1, 7, 300, BLOCK + 17]
GUARD = 16


class Moments:
    """Codes and scales between guards, as the arenas of two moments."""

    def __init__(self, sizes, device, seed):
        self.guards = []
        self.codes, self.scales = [], []
        drawn = draw_tensors([(size,) for size in sizes], seed=seed, dtype=F32)
        for maps, power in zip(eight_bit.make_maps(torch.device(device)), (1, 2), strict=True):
            made = [eight_bit.quantize((t**power).to(device), maps.bounds) for t in drawn]
            self.codes.append([self._guard(codes, 77) for codes, _ in made])
            self.scales.append([self._guard(scales, math.nan) for _, scales in made])

    def _guard(self, values, filler):
        buffer = torch.full((len(values) + 2 * GUARD,), filler, device=values.device)
        buffer = buffer.to(values.dtype)
        self.guards += [(buffer[:GUARD], filler), (buffer[-GUARD:], filler)]
        return buffer[GUARD : GUARD + len(values)].copy_(values)

    def check(self):
        for guard, filler in self.guards:
            assert guard.isnan().all() if math.isnan(filler) else (guard == filler).all()

    def decode(self):
        maps = eight_bit.make_maps(self.codes[0][0].device)
        return [
            [
                eight_bit.dequantize(codes, scales, each.values)
                for codes, scales in zip(self.codes[i], self.scales[i], strict=True)
            ]
            for i, each in enumerate(maps)
        ]


def make_batch(device, sizes=SIZES, dtype=F32, copy_dtype=None, form="raw", seed=0, **options):
    """A batch with moments in 8 bits, all between guards."""
    guarded, moments = GuardedTensors(device, seed), Moments(sizes, device, seed + 1)

    def tensors(dtype):
        return [guarded.draw(size, dtype) for size in sizes]

    options = {"lr": 1e-2, "anchor_weight": 0.3, "eps": 1e-8, "weight_decay": 0.1} | options
    batch = Batch(
        params=tensors(dtype),
        grads=tensors(dtype),
        anchors=[None if i == 1 else t for i, t in enumerate(tensors(dtype))],
        exp_avgs=moments.codes[0],
        exp_avg_sqs=moments.codes[1],
        exp_avg_scales=moments.scales[0],
        exp_avg_sq_scales=moments.scales[1],
        steps=[torch.tensor(float(i), device=device) for i in range(len(sizes))],
        copies=tensors(copy_dtype) if copy_dtype else [None] * len(sizes),
        form=form,
        betas=(0.9, 0.999),
        **options,
    )
    return batch, guarded, moments


def plain_moments(batch, guarded, moments):
    """The batch with moments in float32."""
    first, second = moments.decode()
    batch = replace(batch, exp_avg_scales=None, exp_avg_sq_scales=None)
    return replace(batch, exp_avgs=first, exp_avg_sqs=second)


def written_of(batch):
    """What a step writes."""
    scales = [*(batch.exp_avg_scales or ()), *(batch.exp_avg_sq_scales or ())]
    copies = [copy for copy in batch.copies if copy is not None]
    moments = [*batch.exp_avgs, *batch.exp_avg_sqs]
    return [*batch.params, *moments, *scales, *batch.steps, *copies]
