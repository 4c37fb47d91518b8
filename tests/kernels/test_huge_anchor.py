"""What an anchor of a huge weight leaves of AdamW: a distance that no number of steps enlarges."""

from itertools import count, islice

import pytest
import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.testing import draw_tensors

SIZE, NUM_STEPS, LR, BETAS, EPS = 100, 400, 1e-5, (0.9, 0.999), 1e-8
HUGE = {"raw": 1e8, "decoupled": 1 / LR}
# In learning rates. AdamW's largest step is that of the first gradient after many of zero:
# m = (1 - beta1) g and v = (1 - beta2) g^2.
LARGEST_STEP = (1 - BETAS[0]) / (1 - BETAS[1]) ** 0.5
# How far a first gradient carries alone, by its momentum. A coupled anchor is behind it where a
# clip makes its gradient small beside the first one.
CARRIED = sum(
    (1 - BETAS[0]) * BETAS[0] ** (t - 1) / (1 - BETAS[0] ** t)
    / ((1 - BETAS[1]) * BETAS[1] ** (t - 1) / (1 - BETAS[1] ** t)) ** 0.5
    for t in range(1, NUM_STEPS + 1)
)  # fmt: skip
MOST = {"raw": CARRIED, "decoupled": LARGEST_STEP}

same, one, *noise = draw_tensors([(SIZE,)] * (NUM_STEPS + 1), seed=1, dtype=torch.float64)
GRADIENTS = {
    "the same in every step": lambda step: same,
    "noise": lambda step: noise[step % len(noise)],
    "large for one at first": lambda step: one + 1e3 * (step == 0) * (one == one.max()),
    "a spike after many of zero": lambda step: same * (step == NUM_STEPS - 10),
}


def distances(gradient, form, weight, clip=None):
    """Yield after each step the optimizer's state, and how far from the start the parameter is."""
    param = torch.nn.Parameter(draw_tensors([(SIZE,)], dtype=torch.float64)[0])
    start = param.detach().clone()
    options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0, "max_grad_norm": clip}
    optimizer = AnchoredAdamW([param], form=form, anchor_weight=weight, **options)
    for step in count():
        param.grad = gradient(step).clone()
        optimizer.step()
        yield optimizer.state[param], (param.detach() - start) / LR


def largest_distances(gradient, form, weight, clip=None):
    """How far any element is from its start after each step, in learning rates."""
    steps = islice(distances(gradient, form, weight, clip), NUM_STEPS)
    return [float(distance.abs().max()) for _, distance in steps]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("form", ["raw", "decoupled"])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_a_huge_anchor_leaves_a_few_learning_rates_however_many_steps(gradient, form, clip):
    moved = largest_distances(gradient, form, HUGE[form], clip)
    assert 0.9 < max(moved) <= MOST[form]


def test_without_an_anchor_the_steps_add_up():
    moved = largest_distances(GRADIENTS["the same in every step"], "raw", 0.0)
    assert moved == pytest.approx(range(1, NUM_STEPS + 1), rel=1e-3)


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_a_decoupled_pull_of_one_leaves_the_last_step_alone(gradient):
    steps = islice(distances(gradient, "decoupled", HUGE["decoupled"]), NUM_STEPS)
    for step, (state, distance) in enumerate(steps, 1):
        first = state["exp_avg"] / (1 - BETAS[0] ** step)
        second = state["exp_avg_sq"] / (1 - BETAS[1] ** step)
        torch.testing.assert_close(distance, -first / (second.sqrt() + EPS), rtol=0, atol=1e-8)


def test_what_the_first_step_moves_a_huge_anchor_takes_back():
    moved = largest_distances(GRADIENTS["the same in every step"], "raw", HUGE["raw"])
    assert moved[0] == max(moved) == pytest.approx(1.0, rel=1e-3)
    assert max(moved[200:]) <= 0.01
