"""The metric ring: a step writes its numbers on the device, the host reads many steps at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class MetricRing:
    """The last steps' metrics and samples at a fixed device address.

    A step calls `write`, which reads nothing back. The host calls `start_read` now and then, which
    queues a copy, and `finish_read`, which waits for that copy alone.

    Args:
        names: One column a metric, in all stages of a run.
        capacity: Steps that are kept.
        device: Where steps run.

    Attributes:
        names: As given.
        details: Names of the columns after those: the stage's own.
        rows: [capacity, metrics and details] float32.
        samples: [capacity, samples, 2] int64: number in the run of the photo of each sample of a
            step, in the order of the passes, and timestep.
        count: 0-dim int64, steps written so far.
    """

    def __init__(self, names: Sequence[str], capacity: int, device: torch.device) -> None:
        self.names = tuple(names)
        self._capacity = capacity
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._on_gpu = device.type == "cuda"
        self._copied = torch.cuda.Event() if self._on_gpu else None
        self._pending: tuple[int, int] | None = None
        self.lay_out((), num_samples=1)

    def lay_out(self, details: Sequence[str], num_samples: int) -> None:
        """Make the tables that a stage's steps fill; the rows of steps before are gone.

        Args:
            details: Names of the columns that this stage has beside the run's.
            num_samples: Samples of one step, over all its passes.
        """
        assert self._pending is None, "what a stage has written is read before the next begins"
        self.details = tuple(details)
        size, device, pinned = self._capacity, self.count.device, self._on_gpu
        self.rows = torch.zeros(size, len(self.names) + len(self.details), device=device)
        self.samples = torch.zeros(size, num_samples, 2, dtype=torch.int64, device=device)
        self._host_rows = torch.zeros(self.rows.shape, pin_memory=pinned)
        self._host_samples = torch.zeros(self.samples.shape, dtype=torch.int64, pin_memory=pinned)

    def write(self, values: Sequence[Tensor], details: Sequence[Tensor], samples: Tensor) -> None:
        """Append one step. No host read.

        Args:
            values: Its metrics, 0-dim tensors in the order of `names`.
            details: 1-dim tensors, which together fill the columns `details` in their order.
            samples: [samples, 2] int64.
        """
        dtype = self.rows.dtype
        row = torch.stack([value.detach().to(dtype) for value in values])
        if details:
            row = torch.cat([row, *details]).to(dtype)
        slot = (self.count % self.rows.shape[0])[None]
        self.rows.index_copy_(0, slot, row[None])
        self.samples.index_copy_(0, slot, samples[None])
        self.count += 1

    def start_read(self, first: int, last: int) -> None:
        """Queue a copy to the host of the rows of steps ``first`` to ``last - 1``."""
        assert self._pending is None and last - first <= self.rows.shape[0]
        self._host_rows.copy_(self.rows, non_blocking=True)
        self._host_samples.copy_(self.samples, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._pending = (first, last)

    def is_ready(self) -> bool:
        """Say whether a queued copy has arrived, without waiting for it."""
        return self._pending is not None and (self._copied is None or self._copied.query())

    def finish_read(self) -> list[dict[str, float]]:
        """Return the queued rows, one dictionary a step; empty when none is queued."""
        if self._pending is None:
            return []
        if self._copied is not None:
            self._copied.synchronize()
        first, last = self._pending
        self._pending = None
        rows = self._host_rows.tolist()
        columns = (*self.names, *self.details)
        return [
            {"step": step + 1, **dict(zip(columns, rows[step % len(rows)], strict=True))}
            for step in range(first, last)
        ]

    def samples_of(self, step: int) -> list[tuple[int, int]]:
        """Return photo number and timestep of each sample of a step.

        Args:
            step: Counted from 1, as in the rows; one of those that `finish_read` returned last.
        """
        rows = self._host_samples
        return [(photo, timestep) for photo, timestep in rows[(step - 1) % len(rows)].tolist()]
