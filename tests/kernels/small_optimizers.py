"""Batches and optimizers with what makes them smaller, for tests on the CPU."""

from dataclasses import replace

import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.anchored_adamw import Batch, eight_bit
from fastppt_kernels.testing import draw_tensors

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [1, 7, 63, 257, 1000]
LR, WEIGHT = 1e-2, 0.3


def make_batch(sizes=SIZES, dtype=F32, grad_dtype=None, form="raw", **options):
    def tensors(seed, dtype=dtype):
        return [t.to(dtype) for t in draw_tensors([(s,) for s in sizes], seed=seed)]

    moments = [draw_tensors([(s,) for s in sizes], seed=seed, dtype=F32) for seed in (3, 4)]
    options = {
        "lr": LR,
        "anchor_weight": WEIGHT,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
    } | options
    return Batch(
        params=tensors(0),
        grads=tensors(1, grad_dtype or dtype),
        anchors=[None if i == 1 else t for i, t in enumerate(tensors(2))],
        exp_avgs=moments[0],
        exp_avg_sqs=[m.square() for m in moments[1]],
        steps=[torch.tensor(float(i)) for i in range(len(sizes))],
        copies=[None] * len(sizes),
        form=form,
        **options,
    )


def encode(batch):
    """Return the batch with moments in 8 bits, and the one with what these stand for."""
    first, second = eight_bit.make_maps(batch.params[0].device)
    firsts = [eight_bit.quantize(m, first.bounds) for m in batch.exp_avgs]
    seconds = [eight_bit.quantize(m, second.bounds) for m in batch.exp_avg_sqs]
    encoded = replace(
        batch,
        exp_avgs=[codes for codes, _ in firsts],
        exp_avg_sqs=[codes for codes, _ in seconds],
        exp_avg_scales=[scales for _, scales in firsts],
        exp_avg_sq_scales=[scales for _, scales in seconds],
    )
    return encoded, decode(encoded)


def decode(batch):
    maps = eight_bit.make_maps(batch.params[0].device)
    moments = [
        [
            eight_bit.dequantize(c, s, each.values).view(c.shape)
            for c, s in zip(codes, scales, strict=True)
        ]
        for codes, scales, each in zip(
            (batch.exp_avgs, batch.exp_avg_sqs),
            (batch.exp_avg_scales, batch.exp_avg_sq_scales),
            maps,
            strict=True,
        )
    ]
    return replace(
        batch,
        exp_avgs=moments[0],
        exp_avg_sqs=moments[1],
        exp_avg_scales=None,
        exp_avg_sq_scales=None,
    )


def make_param(size=1000, dtype=F32, seed=0):
    return torch.nn.Parameter(draw_tensors([(size,)], seed=seed)[0].to(dtype))


def write_gradient(param, step):
    param.grad = torch.sin(param.detach().float() * (1 + step)).to(param.dtype)


def take_steps(param, optimizer, numbers, **options):
    for number in numbers:
        write_gradient(param, number)
        optimizer.step(**options)


def bits_of(param, optimizer):
    tensors = [param, *optimizer.state[param].values()]
    return [t.detach().reshape(-1).view(torch.uint8).clone() for t in tensors]


def make_small(param, **options):
    options = {"lr": LR, "anchor_weight": WEIGHT, "max_grad_norm": 1.0} | options
    return AnchoredAdamW([param], **options)
