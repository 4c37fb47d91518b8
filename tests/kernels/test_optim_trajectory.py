"""Two hundred steps of a small network, whatever its shapes, dtypes and groups."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.testing import draw_tensors, overall_error

STEPS = 200
BATCH = 4


@st.composite
def networks(draw):
    """Widths of a small network with LoRA pairs, the options of its groups, and a clip."""
    widths = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    num_layers = len(widths) - 1
    forms = st.sampled_from(["raw", "effective", "decoupled", "none"])
    return {
        "widths": widths,
        "ranks": [draw(st.integers(1, 4)) for _ in range(num_layers)],
        "groups": [
            {
                "form": draw(forms),
                "lr": draw(st.floats(1e-4, 1e-2)),
                "weight_decay": draw(st.sampled_from([0.0, 1e-2, 0.3])),
                "anchor_weight": draw(st.floats(1e-3, 1.0)),
                "betas": (draw(st.sampled_from([0.0, 0.9])), draw(st.sampled_from([0.9, 0.999]))),
            }
            for _ in range(num_layers)
        ],
        "max_grad_norm": draw(st.sampled_from([None, 0.05, 1.0])),
        "seed": draw(st.integers(0, 1000)),
    }


def make_layers(network, dtype):
    """Return [down, up, frozen] for each layer; downs and ups are not zero."""
    shapes = [
        shape
        for (in_width, out_width), rank in zip(
            pairwise(network["widths"]), network["ranks"], strict=True
        )
        for shape in ((rank, in_width), (out_width, rank), (out_width, in_width))
    ]
    drawn = draw_tensors(shapes, seed=network["seed"], dtype=torch.float32)
    downs, ups, frozen = ([t.to(dtype) for t in drawn[i::3]] for i in range(3))
    trained = (map(torch.nn.Parameter, tensors) for tensors in (downs, ups))
    return list(zip(*trained, frozen, strict=True))


def loss_of(network, layers, step):
    shapes = [(BATCH, network["widths"][0]), (BATCH, network["widths"][-1])]
    drawn = draw_tensors(shapes, seed=1000 * network["seed"] + step, dtype=torch.float32)
    x, target = (t.to(layers[0][0].dtype) for t in drawn)
    for down, up, frozen in layers:
        x = torch.tanh(x @ (frozen + up @ down).T)
    return (x - target).square().mean()


def penalty_of(group, params, anchors):
    weight = group["anchor_weight"]
    if group["form"] == "effective":
        return weight * (params[1] @ params[0] - anchors[1] @ anchors[0]).square().sum()
    return weight * sum((p - a).square().sum() for p, a in zip(params, anchors, strict=True))


def train(network, dtype):
    """Return how far AnchoredAdamW moves the network."""
    layers = make_layers(network, dtype)
    starts = [p.detach().clone() for layer in layers for p in layer[:2]]
    groups = []
    for (down, up, _), options in zip(layers, network["groups"], strict=True):
        group = dict(options, params=[down, up])
        if group["form"] == "effective":
            group["lora_pairs"] = [(down, up, 1.0)]
        if group["form"] == "none":
            group |= {"form": "raw", "anchor_weight": 0.0}
        groups.append(group)
    optimizer = AnchoredAdamW(groups, max_grad_norm=network["max_grad_norm"])
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss_of(network, layers, step).backward()
        optimizer.step()
    params = [p.detach() for layer in layers for p in layer[:2]]
    return [(p - s).double() for p, s in zip(params, starts, strict=True)]


def train_reference(network, dtype, backwards=False):
    """Return how far autograd's penalty, clip_grad_norm_ and AdamW move it.

    Args:
        backwards: Every sum over elements or tensors that is not the network's own runs the other
            way round: the same mathematics, rounded otherwise.
    """
    layers = make_layers(network, dtype)
    params = [p for layer in layers for p in layer[:2]]
    starts = [p.detach().clone() for p in params]
    own = network["groups"]
    adamw = torch.optim.AdamW(
        [
            {"params": [*layer[:2]], **{k: g[k] for k in ("lr", "weight_decay", "betas")}}
            for layer, g in zip(layers, own, strict=True)
        ],
        foreach=not backwards,
        fused=backwards,
    )
    for step in range(STEPS):
        adamw.zero_grad()
        loss = loss_of(network, layers, step)
        for index, group in enumerate(own):
            if group["form"] in ("raw", "effective"):
                pair, anchors = layers[index][:2], starts[2 * index : 2 * index + 2]
                loss = loss + penalty_of(group, pair, anchors)
        loss.backward()
        if network["max_grad_norm"] is not None:
            clipped = [*reversed(params)] if backwards else params
            torch.nn.utils.clip_grad_norm_(clipped, network["max_grad_norm"])
        pulls = [p.detach() - s for p, s in zip(params, starts, strict=True)]
        adamw.step()
        with torch.no_grad():
            for index, pull in enumerate(pulls):
                group = own[index // 2]
                if group["form"] == "decoupled":
                    params[index] -= group["lr"] * group["anchor_weight"] * pull
    return [(p.detach() - s).double() for p, s in zip(params, starts, strict=True)]


no_deadline = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@no_deadline
@given(networks())
def test_two_hundred_float64_steps_are_adamw_clip_and_autograd_penalty(network):
    given, wanted = train(network, torch.float64), train_reference(network, torch.float64)
    assert overall_error(given, wanted) <= 1e-9


@pytest.mark.slow
@no_deadline
@given(networks())
def test_two_hundred_float32_steps_differ_by_what_an_order_of_summation_does(network):
    exact = train_reference(network, torch.float64)
    # Both are right float32 programs; how far they stray is what float32 leaves open. A third may
    # be on the far side of either: 1.4 times at most over sixty networks drawn at random, 6 times
    # in the worst that was seen (where tensors lie in memory changes it too). Hence the factor 12.
    strays = [
        overall_error(train_reference(network, torch.float32, backwards), exact)
        for backwards in (False, True)
    ]
    assert overall_error(train(network, torch.float32), exact) <= 12 * max(strays) + 1e-7


def test_the_comparison_sees_a_weight_that_is_wrong_by_a_thousandth():
    network = {
        "widths": [3, 5],
        "ranks": [2],
        "groups": [
            {
                "form": "raw",
                "lr": 1e-2,
                "weight_decay": 1e-2,
                "anchor_weight": 0.1,
                "betas": (0.9, 0.999),
            }
        ],
        "max_grad_norm": 1.0,
        "seed": 0,
    }
    wanted = train_reference(network, torch.float64)
    assert overall_error(train(network, torch.float64), wanted) <= 1e-9
    network["groups"][0]["anchor_weight"] *= 1.001
    assert overall_error(train(network, torch.float64), wanted) > 1e-6
