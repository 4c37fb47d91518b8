"""Rounding up or down at random on the CPU."""

import math
from dataclasses import replace

import pytest
import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.anchored_adamw import anchored_adamw_, plain, rounding
from tests.kernels.small_optimizers import BF16, F16, F32, encode, make_batch


def neighbours(values, dtype):
    """The values of ``dtype`` that are not above and not below each, in float64."""
    near = values.to(dtype)
    wide = near.double()
    towards_zero = torch.where(wide.abs() <= values.double().abs(), near, step_to_zero(near))
    away = torch.where(
        towards_zero.double() == values.double(), towards_zero, step_from_zero(towards_zero)
    )
    return towards_zero.double(), torch.copysign(away.double(), values.double())


def step_to_zero(values):
    return (values.view(torch.int16) - 1).view(values.dtype)


def step_from_zero(values):
    return (values.view(torch.int16) + 1).view(values.dtype)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_random_rounding_has_the_value_as_its_mean(dtype):
    # Of float16 also those below the smallest normal one.
    values = torch.tensor([1.2367, -0.7071, 3e-5, -4.3e-7, 1e-8, 0.0, -0.0, 1000.3, 2.0])
    low, high = neighbours(values, dtype)
    counts = 1024
    bits = torch.stack([rounding.random_bits(k, 0, 9) for k in keys(counts)])
    rounded = rounding.round_at_random(values.expand(counts, -1).contiguous(), bits, dtype).double()
    assert ((rounded == low) | (rounded == high)).all()
    assert (rounded.signbit() == values.signbit()).all()
    chance = torch.where(high == low, 0, (values.double() - low) / (high - low))
    share = torch.where(high == low, 0, (rounded == high).double().mean(0))
    # Four standard deviations.
    assert ((share - chance).abs() <= 4 * (chance * (1 - chance) / counts).sqrt()).all()
    assert 0.05 < chance[0] < 0.95


def keys(count, seed=0):
    return [rounding.make_key(seed, torch.tensor(float(step))) for step in range(count)]


def test_random_bits_are_even_and_differ_between_elements_steps_and_seeds():
    bits = torch.stack([rounding.random_bits(key, 0, 4096) for key in keys(16)])
    ones = torch.stack([(bits >> i & 1).double().mean() for i in range(32)])
    assert (ones - 0.5).abs().max() <= 4 * 0.5 / 256
    centred = (bits & 0xFFFF).double() - 32767.5
    wanted = 1 / 256
    for other in (
        centred.roll(1, 0),
        centred.roll(1, 1),
        centred.roll((1, 1), (0, 1)),
        (torch.stack([rounding.random_bits(k, 0, 4096) for k in keys(16, 1)]) & 0xFFFF) - 32767.5,
    ):
        assert ((centred * other).mean() / centred.var()).abs() <= 4 * wanted
    assert torch.equal(bits[3][100:200], rounding.random_bits(keys(4)[3], 100, 100))


def test_what_is_not_finite_stays_so():
    values = torch.tensor([math.inf, -math.inf, math.nan])
    for dtype in (BF16, F16):
        bits = torch.full((3,), 0xFFFFFFFF)
        torch.testing.assert_close(
            rounding.round_at_random(values, bits, dtype), values.to(dtype), equal_nan=True
        )


@pytest.mark.parametrize("form", ["raw", "none"])
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_step_rounds_its_float32_values_by_the_bits_of_seed_step_and_element(form, moments):
    sizes = [7, 3000, 63]
    wide, narrow = (make_batch(sizes, dtype, BF16, form=form) for dtype in (F32, BF16))
    wide = replace(wide, params=[p.float() for p in narrow.params], anchors=narrow.anchors)
    if moments == "8bit":
        wide, narrow = encode(wide)[0], encode(narrow)[0]
    anchored_adamw_([wide])
    anchored_adamw_([replace(narrow, rounding_seed=5)])
    first = 0
    for value, given, step in zip(wide.params, narrow.params, narrow.steps, strict=True):
        bits = rounding.random_bits(rounding.make_key(5, step), first, len(value))
        assert torch.equal(given, rounding.round_at_random(value, bits, BF16))
        first += -(-len(value) // 2048) * 2048


def test_updates_below_half_an_ulp_add_up():
    ends = []
    for options in ({}, {"rounding": "stochastic"}):
        param = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = AnchoredAdamW([param], lr=1e-4, weight_decay=0.0, **options)
        for _ in range(40):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends.append(param.detach().double().mean())
    assert ends[0] == 1
    # 40 steps of the learning rate; an ulp below 1 is 1 / 256.
    assert abs(ends[1] - (1 - 40e-4)) <= 4 * math.sqrt(40e-4 / 256 / 4096)


def test_chunks_do_not_change_the_random_bits(monkeypatch):
    ends = []
    for size in (1 << 16, 256):
        monkeypatch.setattr(plain, "CPU_CHUNK", size)
        batch = replace(make_batch([3000], BF16, form="none"), rounding_seed=1)
        anchored_adamw_([batch])
        ends.append(batch.params[0])
    assert torch.equal(*ends)
