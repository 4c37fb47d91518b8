"""A training that was stopped and taken up again is the uninterrupted one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastppt.mini.pretrain.training import Deadline, OutOfTimeError, Schedule, train

SCHEDULE = Schedule(num_steps=12, learning_rate=0.05, warmup=3, average=0.6, weight_decay=0.1)


class DeadlineAfter(Deadline):
    """Passes when it has been asked so many times, that is after so many steps."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(None)
        self.left = num_steps

    def passed(self) -> bool:
        self.left -= 1
        return self.left <= 0


def build() -> nn.Sequential:
    """A network with weights, a frozen weight, and running statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    network[3].bias.requires_grad_(False)
    return network


def run(network: nn.Sequential, work: Path, deadline: Deadline, seed: int = 1) -> list[Tensor]:
    """Train; return what the first layer's weights were before each step."""
    before = []

    def loss_of(generator: torch.Generator) -> Tensor:
        before.append(network[0].weight.detach().clone())
        inputs = torch.randn(5, 3, generator=generator)
        return (network(inputs) - inputs[:, :2].sin()).square().mean()

    train("small", {"network": network}, loss_of, SCHEDULE, work, deadline, seed)
    return before


def is_equal(one: object, other: object) -> bool:
    """Whether two saved states are the same, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return one == other


@pytest.mark.parametrize("stops", [[1], [5], [11], [4, 3, 2]])
def test_resumed_training_equals_uninterrupted_training(tmp_path: Path, stops: list[int]) -> None:
    whole, pieces = build(), build()
    (tmp_path / "whole").mkdir()
    (tmp_path / "pieces").mkdir()
    run(whole, tmp_path / "whole", Deadline(None))
    done = 0
    for stop in stops:
        done += stop
        with pytest.raises(OutOfTimeError, match=f"small: stopped at step {done} of 12"):
            run(build(), tmp_path / "pieces", DeadlineAfter(stop))
    run(pieces, tmp_path / "pieces", Deadline(None))
    assert is_equal(whole.state_dict(), pieces.state_dict())
    states = [load_file(tmp_path / name / "small.safetensors") for name in ("whole", "pieces")]
    assert is_equal(*states)


def test_other_seed_is_another_training(tmp_path: Path) -> None:
    networks = [build(), build()]
    for seed, network in enumerate(networks):
        (tmp_path / str(seed)).mkdir()
        run(network, tmp_path / str(seed), Deadline(None), seed)
    assert not torch.equal(networks[0][0].weight, networks[1][0].weight)


def test_finished_training_is_read_and_not_gone_on_with(tmp_path: Path) -> None:
    first, second = build(), build()
    run(first, tmp_path, Deadline(None))
    assert run(second, tmp_path, Deadline(None)) == []
    assert is_equal(first.state_dict(), second.state_dict())
    assert not second.training


def test_weights_at_the_end_are_the_moving_averages(tmp_path: Path) -> None:
    network = build()
    weights = run(network, tmp_path, Deadline(None))
    last = load_file(tmp_path / "small.safetensors")["networks.network.0.weight"]
    average = weights[0].double()
    for step, weight in enumerate([*weights[1:], last]):
        keep = min(SCHEDULE.average, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * weight.double()
    torch.testing.assert_close(network[0].weight.double(), average, rtol=0, atol=1e-6)
    assert (last - network[0].weight).abs().max() > 1e-3


def test_weight_that_needs_no_gradient_stays(tmp_path: Path) -> None:
    network = build()
    bias = network[3].bias.clone()
    run(network, tmp_path, Deadline(None))
    assert torch.equal(network[3].bias, bias)
    assert not torch.equal(network[3].weight, build()[3].weight)


def test_rate_rises_holds_and_falls_along_a_cosine() -> None:
    schedule = Schedule(num_steps=1000, learning_rate=0.2, warmup=100, decay=0.4)
    assert schedule.rate(0) == pytest.approx(0.2 / 100)
    assert schedule.rate(49) == pytest.approx(0.1)
    assert schedule.rate(99) == schedule.rate(600) == pytest.approx(0.2)
    for step in (700, 800, 900, 999):
        fall = 0.5 + 0.5 * math.cos(math.pi * (step - 600) / 400)
        assert schedule.rate(step) == pytest.approx(0.2 * fall, abs=1e-7)


def test_deadline_passes_when_its_minutes_are_over() -> None:
    assert not Deadline(None).passed()
    assert not Deadline(1).passed()
    assert Deadline(-1).passed()
