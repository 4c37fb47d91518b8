"""What a step recalls of the one before: the views of LoRA pairs, where they still hold."""

import weakref

import numpy as np
import pytest
import torch

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.lora_anchor_penalty.op import LoraAnchor

RANK, WIDTH, SCALE, WEIGHT = 2, 5, 0.5, 0.3


def make_pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((RANK, WIDTH), (WIDTH, RANK))
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in shapes
    ]


def make_optimizer(pair):
    group = {"params": pair, "lora_pairs": [(*pair, SCALE)]}
    return AnchoredAdamW([group], lr=1e-2, anchor_weight=WEIGHT, anchor="zero", form="effective")


def penalty_of(pair):
    down, up = pair
    return WEIGHT * (SCALE * up.detach() @ down.detach()).square().sum()


@pytest.fixture
def made(monkeypatch):
    """How many times pairs were put together."""
    counts = []
    begin = LoraAnchor.__init__

    def counting(self, *args, **kwargs):
        counts.append(1)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(LoraAnchor, "__init__", counting)
    return counts


def test_pairs_are_put_together_once_where_their_tensors_stay(made):
    pair = make_pair()
    optimizer = make_optimizer(pair)
    for param in pair:
        param.grad = torch.ones_like(param)
    for _ in range(5):
        wanted = penalty_of(pair)
        optimizer.step()
        assert float(optimizer.penalty) == pytest.approx(float(wanted), rel=1e-12)
        optimizer.zero_grad(set_to_none=False)
    assert len(made) == 2


def test_values_that_were_moved_elsewhere_are_the_ones_that_are_pulled(made):
    pair = make_pair()
    optimizer = make_optimizer(pair)
    for param in pair:
        param.grad = torch.ones_like(param)
    for step in range(6):
        if step == 3:
            held = [param.data for param in pair]
            for param in pair:
                param.data = 2 * param.data
        wanted = penalty_of(pair)
        optimizer.step()
        assert float(optimizer.penalty) == pytest.approx(float(wanted), rel=1e-12)
    assert len(held) == 2 and len(made) == 4


def test_gradients_that_are_made_anew_are_not_held():
    pair = make_pair()
    optimizer = make_optimizer(pair)
    memory = [np.ones(param.shape) for param in pair]
    for _ in range(4):
        # New tensors at the old addresses, of arrays that say when nobody holds them any more.
        arrays = [each[:] for each in memory]
        for param, array in zip(pair, arrays, strict=True):
            param.grad = torch.from_numpy(array)
        alive = [weakref.ref(array) for array in arrays]
        del arrays, array
        optimizer.step()
        optimizer.zero_grad()
        assert [each() for each in alive] == [None, None]


def test_gradients_that_were_kept_are_let_go_with_the_others():
    pair = make_pair()
    optimizer = make_optimizer(pair)
    arrays = [np.zeros(param.shape) for param in pair]
    for param, array in zip(pair, arrays, strict=True):
        param.grad = torch.from_numpy(array)
    alive = [weakref.ref(array) for array in arrays]
    del arrays, array
    for _ in range(3):
        optimizer.step()
    assert all(each() is not None for each in alive)
    optimizer.zero_grad()
    assert [each() for each in alive] == [None, None]


def test_a_step_that_recalls_is_the_step_that_does_not():
    kept, anew = make_pair(), make_pair()
    first, second = make_optimizer(kept), make_optimizer(anew)
    for param in kept:
        param.grad = torch.zeros_like(param)
    for step in range(5):
        for one, other in zip(kept, anew, strict=True):
            one.grad.fill_(0.1 * step)
            other.grad = torch.full_like(other, 0.1 * step)
        first.step()
        second.step()
        second.zero_grad()
        assert all(map(torch.equal, kept, anew))
