"""Bytes are counted while they are alive, each storage once."""

from __future__ import annotations

import pytest
import torch

from fastppt.training.live_bytes import LiveBytes

CPU, META = torch.device("cpu"), torch.device("meta")
KIB = 1024


def floats(num_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(num_bytes // 4, device=device)


@pytest.fixture(params=[CPU, META], ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.param


def test_what_is_freed_no_longer_counts_but_for_the_peak(device: torch.device) -> None:
    with LiveBytes(device) as counter:
        first = floats(KIB, device)
        second = first + 1
        assert (counter.live, counter.peak) == (2 * KIB, 2 * KIB)
        del first
        assert (counter.live, counter.peak) == (KIB, 2 * KIB)
        third = floats(4 * KIB, device)
        assert (counter.live, counter.peak) == (5 * KIB, 5 * KIB)
    del second, third
    assert counter.live == 0


def test_views_and_writes_in_place_take_nothing(device: torch.device) -> None:
    with LiveBytes(device) as counter:
        tensor = floats(KIB, device)
        view = tensor.view(2, -1).t()[3:]
        view += 1
        del tensor
        assert counter.live == counter.peak == KIB


def test_what_was_there_before_does_not_count(device: torch.device) -> None:
    old = floats(KIB, device)
    with LiveBytes(device) as counter:
        view = old.view(2, -1)
        view.t().add_(1)
        assert counter.live == 0


def test_other_devices_do_not_count() -> None:
    with LiveBytes(META) as counter:
        here = floats(KIB, CPU)
        there = floats(2 * KIB, META)
    assert counter.live == 2 * KIB == 2 * here.nbytes == there.nbytes


def test_kept_is_what_autograd_keeps_of_what_is_made_inside(device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 16, device=device))
    inputs = torch.zeros(8, 16, device=device)
    with LiveBytes(device) as counter, counter.kept_for_backward():
        hidden = inputs @ weight  # Keeps what was there before.
        assert counter.kept == 0
        activated = hidden.sigmoid()  # Keeps its output.
        output = activated.view(4, 32).relu()  # Likewise.
        doubled = (activated * activated).sum() + output.sum()  # Keeps its input, already kept.
        assert counter.kept == activated.nbytes + output.nbytes
        doubled.backward()
        assert counter.kept == activated.nbytes + output.nbytes


def test_what_autograd_gives_up_is_not_kept(device: torch.device) -> None:
    leaf = torch.zeros(KIB // 4, device=device, requires_grad=True)
    with LiveBytes(device) as counter, counter.kept_for_backward():
        for _ in range(3):
            leaf.sigmoid().sigmoid()
    assert counter.kept == 2 * KIB


def test_the_backward_pass_counts(device: torch.device) -> None:
    leaf = torch.zeros(KIB // 4, device=device, requires_grad=True)
    with LiveBytes(device) as counter:
        output = leaf.sigmoid().sum()
        before = counter.peak = counter.live
        output.backward()
        assert counter.peak >= before + KIB
        del output
        assert counter.live == KIB == leaf.grad.nbytes
