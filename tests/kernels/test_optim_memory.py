"""Optimizers that are smaller: skipped and resumed, anchors elsewhere, options refused."""

import copy
import math

import pytest
import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.testing import ForbidHostReads, draw_tensors
from tests.kernels.small_optimizers import (
    BF16,
    F16,
    F32,
    WEIGHT,
    bits_of,
    make_param,
    make_small,
    take_steps,
    write_gradient,
)

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
