"""The ring keeps the last steps and gives them to the host in order."""

from __future__ import annotations

from math import isnan

import pytest
import torch

from fastppt.training.ring import MetricRing


def written(num_steps: int, capacity: int = 4) -> MetricRing:
    ring = MetricRing(["a", "b"], capacity, torch.device("cpu"))
    for step in range(num_steps):
        values = [torch.tensor(float(step)), torch.tensor(10.0 * step, dtype=torch.float64)]
        ring.write(values, [], torch.tensor([[step % 3, 100 + step]]))
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
    ring.write([torch.tensor(99.0), torch.tensor(99.0)], [], torch.tensor([[99, 99]]))
    assert ring.finish_read()[0]["a"] == 0.0
    assert ring.samples_of(1) == [(0, 100)]


def test_samples_belong_to_their_rows_across_the_seam() -> None:
    ring = written(6)
    ring.start_read(2, 6)
    steps = [int(row["step"]) for row in ring.finish_read()]
    assert [ring.samples_of(step) for step in steps] == [
        [(step % 3, 100 + step)] for step in range(2, 6)
    ]


def test_each_stage_has_its_own_details_and_samples() -> None:
    ring = written(2)
    ring.lay_out(["term/layer", "gamma/bin_0"], num_samples=3)
    samples = torch.tensor([[4, 17], [0, 999], [2, 5]])
    details = [torch.tensor([0.5], dtype=torch.float64), torch.tensor([torch.nan])]
    ring.write([torch.tensor(1.0), torch.tensor(True)], details, samples)
    ring.start_read(2, 3)
    (row,) = ring.finish_read()
    assert isnan(row.pop("gamma/bin_0"))
    assert row == {"step": 3, "a": 1.0, "b": 1.0, "term/layer": 0.5}
    assert ring.samples_of(3) == [(4, 17), (0, 999), (2, 5)]


def test_rows_that_nobody_has_read_are_not_laid_out_anew() -> None:
    ring = written(2)
    ring.start_read(0, 2)
    with pytest.raises(AssertionError, match="read before the next"):
        ring.lay_out([], num_samples=1)


def test_nothing_queued_gives_nothing() -> None:
    ring = written(2)
    assert not ring.is_ready()
    assert ring.finish_read() == []


def test_more_rows_than_the_ring_holds_are_refused() -> None:
    with pytest.raises(AssertionError):
        written(6).start_read(0, 6)
