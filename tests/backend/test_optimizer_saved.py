"""States that other optimizers, and other networks, have saved."""

import copy

import pytest
import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.testing import draw_tensors

SHAPES = [(3, 7), (5,)]


def make_optimizer(shapes=SHAPES, dtype=torch.float32, steps=1, **options):
    params = [torch.nn.Parameter(v.to(dtype)) for v in draw_tensors(shapes)]
    optimizer = AnchoredAdamW(params, anchor_weight=0.1, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer


def bitsandbytes_state():
    """What its 8-bit AdamW saves for two parameters, by its names."""
    state = {
        "step": 1,
        "state1": torch.zeros(21, dtype=torch.uint8),
        "state2": torch.zeros(21, dtype=torch.uint8),
        "qmap1": torch.zeros(256),
        "qmap2": torch.zeros(256),
        "absmax1": torch.zeros(1),
        "absmax2": torch.zeros(1),
    }
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    return {"state": {0: state, 1: state}, "param_groups": [group | {"params": [0, 1]}]}


def adamw_state():
    params = [torch.nn.Parameter(v) for v in draw_tensors(SHAPES)]
    optimizer = torch.optim.AdamW(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer.state_dict()


def check_refused(saved, match):
    optimizer = make_optimizer()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, state in before["state"].items():
        assert all(torch.equal(after["state"][number][name], t) for name, t in state.items())


@pytest.mark.parametrize(
    ("make", "names"), [(bitsandbytes_state, "absmax1.*qmap1.*state1"), (adamw_state, "exp_avg")]
)
def test_the_state_of_another_optimizer_is_refused_with_the_mend(make, names):
    check_refused(make(), f"not that of an AnchoredAdamW .*{names}.*resume without the optimizer's")


def test_another_optimizers_moments_under_our_groups_are_refused():
    saved = make_optimizer().state_dict()
    saved["state"] = bitsandbytes_state()["state"]
    check_refused(saved, "lacks .*exp_avg.*resume without the optimizer's state")


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ([(3, 7)], r"groups of \[1\] parameters, this optimizer of \[2\].*another network"),
        ([(3, 7), (6,)], r"exp_avg of parameter 1 has shape \(6,\), .*\(5,\); .*another network"),
    ],
)
def test_the_state_of_another_network_is_refused_with_the_mend(shapes, match):
    check_refused(make_optimizer(shapes).state_dict(), match)


def test_an_anchor_of_another_shape_is_refused():
    saved = make_optimizer().state_dict()
    saved["state"][1]["anchor"] = torch.zeros(6)
    check_refused(saved, r"anchor of parameter 1 has shape \(6,\)")


def test_moments_of_another_width_are_refused():
    check_refused(make_optimizer(dtype=torch.float64).state_dict(), "exp_avg of parameter 0 is")


def test_moments_in_8_bits_are_refused_by_an_optimizer_with_others():
    check_refused(make_optimizer(moments="8bit").state_dict(), 'make the optimizer with moments="8')


def test_a_state_of_the_same_network_in_bfloat16_is_taken():
    saved = make_optimizer(dtype=torch.bfloat16, steps=2).state_dict()
    optimizer = make_optimizer(steps=0)
    optimizer.load_state_dict(saved)
    first = optimizer.param_groups[0]["params"][0]
    assert torch.equal(optimizer.state[first]["exp_avg"], saved["state"][0]["exp_avg"])
