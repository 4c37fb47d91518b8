"""What makes an optimizer smaller: moments in 8 bits, random rounding, anchors elsewhere."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.anchored_adamw import Batch, anchored_adamw_, eight_bit, op, plain, rounding
from fastppt_kernels.anchored_adamw.reference import anchored_adamw_reference
from fastppt_kernels.testing import ForbidHostReads, check_stored, draw_tensors, load_mutant

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [1, 7, 63, 257, 1000]
LR, WEIGHT = 1e-2, 0.3


# Moments in 8 bits.


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


SMALL = {
    "8bit": (F32, {"moments": "8bit"}),
    "stochastic": (BF16, {"rounding": "stochastic", "seed": 7}),
    "both": (BF16, {"moments": "8bit", "rounding": "stochastic"}),
    "float16": (F16, {"rounding": "stochastic"}),
}


@pytest.mark.parametrize(("dtype", "options"), SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("form", ["raw", "decoupled"])
def test_a_skipped_step_leaves_every_bit_as_it_was(form, dtype, options):
    param = make_param(dtype=dtype)
    optimizer = make_small(param, form=form, **options)
    take_steps(param, optimizer, range(3))
    before = bits_of(param, optimizer)
    for bad, flag in ((math.nan, None), (0.0, torch.tensor(True))):
        write_gradient(param, 3)
        param.grad[5] += bad
        with ForbidHostReads():
            optimizer.step(skip=flag, skip_non_finite=True)
        assert optimizer.skipped
        assert all(map(torch.equal, bits_of(param, optimizer), before))


@pytest.mark.parametrize(("dtype", "options"), SMALL.values(), ids=SMALL.keys())
def test_a_resumed_run_equals_an_uninterrupted_one(dtype, options, tmp_path):
    param = make_param(dtype=dtype)
    optimizer = make_small(param, **options)
    take_steps(param, optimizer, range(4))
    torch.save((param.detach(), optimizer.state_dict()), tmp_path / "state.pt")
    take_steps(param, optimizer, range(4, 8))
    value, saved = torch.load(tmp_path / "state.pt")
    resumed = torch.nn.Parameter(value)
    other = make_small(resumed, **options)
    other.load_state_dict(saved)
    take_steps(resumed, other, range(4, 8))
    assert all(map(torch.equal, bits_of(param, optimizer), bits_of(resumed, other)))


def test_a_state_of_other_moments_is_refused():
    param = make_param()
    saved = make_small(param).state_dict()
    with pytest.raises(ValueError, match="the saved moments are fp32 and those of this group 8bit"):
        make_small(make_param(), moments="8bit").load_state_dict(saved)


# Rounding up or down at random.


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


# Gradients of another dtype.


@pytest.mark.parametrize("form", ["raw", "effective", "decoupled"])
def test_a_gradient_may_be_narrower_than_its_parameter(form):
    ends = []
    for narrow in (False, True):
        params = [torch.nn.Parameter(t) for t in draw_tensors([(3, 7), (5, 3)], dtype=F32)]
        group = {"params": params}
        if form == "effective":
            group["lora_pairs"] = [(params[0], params[1], 0.7)]
        optimizer = AnchoredAdamW([group], anchor_weight=WEIGHT, form=form, max_grad_norm=1.0)
        for number in range(3):
            for param in params:
                grad = torch.sin(param.detach() * (1 + number)).bfloat16()
                param.grad = None
                param.grad_dtype = BF16 if narrow else F32
                param.grad = grad if narrow else grad.float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        ends.append([*params, optimizer.grad_norm])
    assert all(map(torch.equal, *ends))


# Anchors in host memory, and those of others.


@pytest.mark.parametrize("form", ["raw", "decoupled"])
@pytest.mark.parametrize("anchor", ["start", "list", "shared"])
def test_anchors_in_host_memory_give_the_same_bits(form, anchor):
    ends = []
    for storage in ("device", "host"):
        param = make_param()
        options = {"params": [param], "anchor_storage": storage}
        if anchor != "start":
            options |= {"anchor": [make_param(seed=1).detach().bfloat16()]}
            options |= {"share_anchor": anchor == "shared"}
        optimizer = AnchoredAdamW([options], anchor_weight=WEIGHT, form=form, max_grad_norm=1.0)
        take_steps(param, optimizer, range(5))
        ends.append([*bits_of(param, optimizer), optimizer.penalty])
    assert all(map(torch.equal, *ends))


def test_a_shared_anchor_is_read_where_it_is_and_written_there_by_loading():
    params = [make_param(), make_param(seed=1)]
    anchors = [torch.zeros(1000, dtype=BF16), None]
    group = {"params": params, "anchor": anchors, "share_anchor": True}
    optimizer = AnchoredAdamW([group], anchor_weight=WEIGHT)
    assert optimizer.state[params[0]]["anchor"].data_ptr() == anchors[0].data_ptr()
    assert "anchor" not in optimizer.state[params[1]]
    assert "share_anchor" not in optimizer.param_groups[0]
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["anchor"] += 1
    optimizer.load_state_dict(saved)
    assert (anchors[0] == 1).all()


def test_a_state_goes_between_device_and_host():
    param = make_param()
    optimizer = make_small(param)
    take_steps(param, optimizer, range(3))
    other_param = torch.nn.Parameter(param.detach().clone())
    other = make_small(other_param, anchor_storage="host")
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["anchor_storage"] == "host"
    take_steps(param, optimizer, range(3, 6))
    take_steps(other_param, other, range(3, 6))
    assert all(map(torch.equal, bits_of(param, optimizer), bits_of(other_param, other)))


def test_loading_makes_no_other_copy_of_the_state(monkeypatch):
    param = make_param()
    optimizer = make_small(param, moments="8bit")
    saved = optimizer.state_dict()
    monkeypatch.setattr(
        torch.optim.Optimizer, "_process_value_according_to_param_policy", lambda *a, **k: 1 / 0
    )
    optimizer.load_state_dict(saved)


WRONG = {
    "storage": ({"anchor_storage": "disk"}, 'anchor_storage: got "disk", want one of device, host'),
    "moments": ({"moments": "4bit"}, 'moments: got "4bit", want one of fp32, 8bit'),
    "rounding": ({"rounding": "up"}, 'rounding: got "up", want one of nearest, stochastic'),
    "seed": ({"seed": -1}, "seed: got -1, want an integer"),
    "wide": ({"rounding": "stochastic"}, r"params\[0\]: got dtype torch.float32 .*stochastic"),
    "shared start": ({"share_anchor": True}, 'share_anchor: got anchor "start"'),
    "shared strides": (
        {"share_anchor": True, "anchor": [torch.zeros(2000)[::2]]},
        r"anchor\[0\]: is on cpu, with strides \(2,\)",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AnchoredAdamW([{"params": [make_param()]} | options], anchor_weight=WEIGHT)


def test_wrong_parameters_are_refused():
    with pytest.raises(ValueError, match=r"got dtype torch.float64 .*8bit"):
        AnchoredAdamW([make_param(dtype=torch.float64)], moments="8bit")
    param = make_param(dtype=BF16)
    group = {"params": [param], "working_copy": param.detach().clone(), "rounding": "stochastic"}
    with pytest.raises(ValueError, match="working_copy: the parameters are rounded at random"):
        AnchoredAdamW([group])
    params = [torch.nn.Parameter(t) for t in draw_tensors([(3, 7), (5, 3)])]
    group = {"params": params, "lora_pairs": [(params[0], params[1], 1.0)], "form": "effective"}
    with pytest.raises(ValueError, match='anchor_storage "host" is for the forms raw and'):
        AnchoredAdamW([group], anchor_weight=WEIGHT, anchor_storage="host")
