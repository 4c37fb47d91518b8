"""Moments in 8 bits: codes, scales, and steps on the CPU."""

import pytest
import torch

from fastppt_kernels.anchored_adamw import anchored_adamw_, eight_bit, op, plain
from fastppt_kernels.anchored_adamw.reference import anchored_adamw_reference
from fastppt_kernels.testing import ForbidHostReads, check_stored, draw_tensors, load_mutant
from tests.kernels.small_optimizers import (
    BF16,
    F32,
    SIZES,
    encode,
    make_batch,
    make_param,
    make_small,
)

CPU = torch.device("cpu")


def draw_moments(signed, sizes=SIZES, seed=0):
    """Values over ten decades: far more than a map holds."""
    values = draw_tensors([(size,) for size in sizes], seed=seed, dtype=F32)
    drawn = [v * 10 ** (5 * v.roll(1) - 12) for v in values]
    return drawn if signed else [v.abs() for v in drawn]


def check_nearest(values, codes, scales, maps, signed):
    for start in range(0, len(values), eight_bit.BLOCK_SIZE):
        block = values[start : start + eight_bit.BLOCK_SIZE].double()
        scale = scales[start // eight_bit.BLOCK_SIZE].double()
        assert scale == block.abs().max()
        distance = (block[:, None] / scale - maps.values.double()).abs()
        if not signed:
            distance[:, 0] = torch.where(block > 0, torch.inf, 0)
        chosen = codes[start : start + eight_bit.BLOCK_SIZE].long()[:, None]
        assert (distance.gather(1, chosen)[:, 0] <= distance.min(dim=1).values + 1e-7).all()


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_the_nearest_of_the_map_and_never_zero_for_a_second_moment(signed):
    maps = eight_bit.make_maps(CPU)[0 if signed else 1]
    assert len(maps.values.unique()) == 256 and maps.values.diff().min() > 0
    for values in draw_moments(signed):
        codes, scales = eight_bit.quantize(values, maps.bounds)
        assert codes.dtype == torch.uint8 and len(scales) == -(-len(values) // 256)
        check_nearest(values, codes, scales, maps, signed)
        decoded = eight_bit.dequantize(codes, scales, maps.values)
        assert decoded.shape == values.shape
        if not signed:
            assert (decoded[values > 0] > 0).all()


def test_a_moment_of_zeros_is_zero_and_a_tiny_one_is_kept():
    for signed, maps in zip((True, False), eight_bit.make_maps(CPU), strict=True):
        codes, scales = eight_bit.make_codes(torch.ones(300), torch.contiguous_format)
        assert (eight_bit.dequantize(codes, scales, maps.values) == 0).all()
        zeros = eight_bit.quantize(torch.zeros(300), maps.bounds)
        assert (eight_bit.dequantize(*zeros, maps.values) == 0).all()
        tiny = torch.linspace(-1 if signed else 0.1, 1, 300) * 1e-30
        decoded = eight_bit.dequantize(*eight_bit.quantize(tiny, maps.bounds), maps.values)
        torch.testing.assert_close(decoded, tiny, rtol=0, atol=1e-32)


def test_the_map_has_seven_decades_each_with_twice_the_values_of_the_one_below():
    for signed, maps in zip((True, False), eight_bit.make_maps(CPU), strict=True):
        wanted = [0.0, 1.0]
        for decade in range(7):
            count = 2 ** (decade + (not signed))
            middles = [10 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / count) for i in range(count)]
            wanted += [*middles, *(-m for m in middles if signed)]
        torch.testing.assert_close(maps.values, torch.tensor(sorted(wanted)), rtol=1e-6, atol=0)


def check_codes(batch, wanted):
    """Compare codes and scales with those of the reference's moments: a tie may fall elsewhere."""
    kinds = zip(
        (batch.exp_avgs, batch.exp_avg_sqs),
        (batch.exp_avg_scales, batch.exp_avg_sq_scales),
        (wanted.exp_avgs, wanted.exp_avg_sqs),
        eight_bit.make_maps(batch.params[0].device),
        strict=True,
    )
    for codes, scales, moments, maps in kinds:
        for code, scale, moment in zip(codes, scales, moments, strict=True):
            exact, exact_scale = eight_bit.quantize(moment.float().flatten(), maps.bounds)
            torch.testing.assert_close(scale, exact_scale, rtol=1e-5, atol=0)
            difference = (code.flatten().int() - exact.int()).abs()
            assert difference.max() <= 1 and (difference > 0).sum() <= 1 + 0.002 * len(exact)


def check_eight_bit_step(form="raw", dtype=F32, sizes=SIZES, **options):
    encoded, decoded = encode(make_batch(sizes, dtype, form=form, **options))
    (wanted,), wanted_penalty, wanted_norm = anchored_adamw_reference([decoded], 1.0)
    starts = [p.clone() for p in encoded.params]
    with ForbidHostReads():
        penalty, norm, _ = anchored_adamw_([encoded], 1.0)
    torch.testing.assert_close(penalty.double(), wanted_penalty, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.double(), wanted_norm, rtol=1e-6, atol=0)
    check_stored(encoded.params, starts, wanted.params)
    check_codes(encoded, wanted)


@pytest.mark.parametrize("form", ["raw", "decoupled", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_step_with_8_bit_moments_is_the_reference_of_what_they_stand_for(form, dtype):
    check_eight_bit_step(form, dtype)


def test_8_bit_moments_of_a_long_parameter_are_worked_on_in_pieces():
    check_eight_bit_step(sizes=[2 * plain.CPU_CHUNK + 300])


EIGHT_BIT_FAULTS = {
    "moments not advanced": ("code.copy_(new_code)", "code.copy_(code)"),
    "scales not kept": ("scale_of_code.copy_(new_scale)", "pass"),
    "maps mixed up": (
        "maps = eight_bit.make_maps(device)",
        "maps = eight_bit.make_maps(device)[::-1]",
    ),
    "clip forgotten": ("grad_scale=None if is_wide or scale is None else", "grad_scale=None and"),
}


@pytest.mark.parametrize("fault", EIGHT_BIT_FAULTS.values(), ids=EIGHT_BIT_FAULTS.keys())
def test_a_planted_fault_turns_the_8_bit_step_red(monkeypatch, tmp_path, fault):
    mutant = load_mutant(plain.__file__, [fault], tmp_path)
    monkeypatch.setattr(op, "plain_step_", mutant.plain_step_)
    with pytest.raises(AssertionError):
        check_eight_bit_step()


def test_8_bit_moments_take_a_quarter_of_the_bytes():
    param = make_param(1000)
    state = make_small(param, moments="8bit").state[param]
    assert {name: t.nbytes for name, t in state.items()} == {
        "step": 4,
        "exp_avg": 1000,
        "exp_avg_scale": 16,
        "exp_avg_sq": 1000,
        "exp_avg_sq_scale": 16,
        "anchor": 4000,
    }


def test_a_run_with_8_bit_moments_stays_near_one_with_float32_moments():
    ends = []
    for moments in ("fp32", "8bit"):
        param = make_param()
        optimizer = make_small(param, moments=moments)
        noise = torch.Generator().manual_seed(0)
        for _ in range(50):
            param.grad = param.detach() * 1e-3 + 1e-3 * torch.randn(1000, generator=noise)
            optimizer.step()
        ends.append(param.detach() - make_param().detach())
    # It was 0.039; a moment is off by up to 0.007 of its block's largest at each step.
    assert (ends[1] - ends[0]).norm() <= 0.06 * ends[0].norm()
