"""The ring keeps the last steps and gives them to the host in order."""

from __future__ import annotations

import pytest
import torch

from fastppt.training.ring import MetricRing


def written(num_steps: int, capacity: int = 4) -> MetricRing:
    ring = MetricRing(["a", "b"], capacity, torch.device("cpu"))
    for step in range(num_steps):
        ring.write([torch.tensor(float(step)), torch.tensor(10.0 * step, dtype=torch.float64)])
    return ring


def test_rows_come_back_in_order_across_the_seam() -> None:
    ring = written(6)
    ring.start_read(2, 6)
    assert ring.is_ready()
    assert ring.finish_read() == [
        {"step": step + 1, "a": float(step), "b": 10.0 * step} for step in range(2, 6)
    ]


def test_rows_are_those_of_the_moment_of_the_read() -> None:
    ring = written(4)
    ring.start_read(0, 4)
    ring.write([torch.tensor(99.0), torch.tensor(99.0)])
    assert ring.finish_read()[0]["a"] == 0.0


def test_nothing_queued_gives_nothing() -> None:
    ring = written(2)
    assert not ring.is_ready()
    assert ring.finish_read() == []


def test_more_rows_than_the_ring_holds_are_refused() -> None:
    with pytest.raises(AssertionError):
        written(6).start_read(0, 6)
