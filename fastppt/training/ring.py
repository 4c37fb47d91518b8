"""The metric ring: a step writes its numbers on the device, the host reads many steps at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class MetricRing:
    """The last steps' metrics at a fixed device address.

    A step calls `write`, which reads nothing back. The host calls `start_read` now and then, which
    queues a copy, and `finish_read`, which waits for that copy alone.

    Args:
        names: One column a metric.
        capacity: Steps that are kept.
        device: Where steps run.

    Attributes:
        rows: [capacity, metrics] float32.
        count: 0-dim int64, steps written so far.
    """

    def __init__(self, names: Sequence[str], capacity: int, device: torch.device) -> None:
        self.names = tuple(names)
        self.rows = torch.zeros(capacity, len(names), device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._on_gpu = device.type == "cuda"
        self._host_rows = torch.zeros(capacity, len(names), pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None
        self._pending: tuple[int, int] | None = None

    def write(self, values: Sequence[Tensor]) -> None:
        """Append one step's metrics, 0-dim tensors in the order of the names. No host read."""
        row = torch.stack([value.detach().to(self.rows.dtype) for value in values])
        slot = (self.count % self.rows.shape[0])[None]
        self.rows.index_copy_(0, slot, row[None])
        self.count += 1

    def start_read(self, first: int, last: int) -> None:
        """Queue a copy to the host of the rows of steps ``first`` to ``last - 1``."""
        assert self._pending is None and last - first <= self.rows.shape[0]
        self._host_rows.copy_(self.rows, non_blocking=True)
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
        return [
            {"step": step + 1, **dict(zip(self.names, rows[step % len(rows)], strict=True))}
            for step in range(first, last)
        ]
