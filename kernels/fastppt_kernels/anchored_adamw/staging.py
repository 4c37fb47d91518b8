"""Anchors that lie in host memory, brought to the device in pieces while earlier pieces are used.

Two buffers take turns. A segment of the table of chunks is as many chunks as one buffer has the
anchors of; the rows name the places in the buffer, so that the kernels do not know the difference:
chunks, sums and results are those of anchors on the device, bit for bit.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppt_kernels.launch import ALIGNMENT

# Of a buffer. A copy of 16 MiB over PCIe takes half a millisecond, and a launch some microseconds.
BUFFER_BYTES = 16 << 20
NUM_BUFFERS = 2


@dataclass(frozen=True)
class Piece:
    """A stretch of one anchor in a buffer.

    Attributes:
        index: Of the parameter.
        start: First element.
        count: Elements.
        offset: Where in the buffer it begins, in bytes.
    """

    index: int
    start: int
    count: int
    offset: int


class Segment(NamedTuple):
    """Rows of the table of chunks that follow one another, and the anchors that they read."""

    first_row: int
    num_rows: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """How a batch's anchors come to the device.

    Attributes:
        segments: One after the other; the i-th is of buffer i modulo NUM_BUFFERS.
        num_bytes: That a buffer needs.
        buffers: Of each row of the table, its buffer; -1 for rows that read no anchor.
        offsets: Of each row, where its anchor begins in that, in bytes.
    """

    segments: tuple[Segment, ...]
    num_bytes: int
    buffers: Tensor
    offsets: Tensor


@lru_cache(maxsize=16)
def make_plan(
    sizes: Sequence[int], widths: Sequence[int], chunk_size: int, buffer_bytes: int
) -> Plan:
    """Cut a batch's anchors into pieces that fill buffers.

    Args:
        sizes: Elements of each parameter.
        widths: Bytes an element of its anchor; 0 where it has none.
        chunk_size: Elements of a row of the table; a piece is of whole chunks.
        buffer_bytes: At most; a buffer holds a chunk at least.
    """
    segments: list[Segment] = []
    buffers: list[Tensor] = []
    offsets: list[Tensor] = []
    pieces: list[Piece] = []
    first_row = row = filled = largest = 0
    for index, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        num_rows = -(-size // chunk_size)
        if not width:
            buffers.append(torch.full((num_rows,), -1))
            offsets.append(torch.zeros(num_rows, dtype=torch.int64))
            row += num_rows
            continue
        start = 0
        while start < size:
            if filled and filled + min(chunk_size, size - start) * width > buffer_bytes:
                segments.append(Segment(first_row, row - first_row, tuple(pieces)))
                first_row, filled, pieces = row, 0, []
            room = max(1, (buffer_bytes - filled) // (chunk_size * width)) * chunk_size
            count = min(room, size - start)
            rows = -(-count // chunk_size)
            pieces.append(Piece(index, start, count, filled))
            buffers.append(torch.full((rows,), len(segments) % NUM_BUFFERS))
            offsets.append(filled + torch.arange(rows) * (chunk_size * width))
            filled += -(-count * width // ALIGNMENT) * ALIGNMENT
            largest = max(largest, filled)
            start += count
            row += rows
    if row > first_row:
        segments.append(Segment(first_row, row - first_row, tuple(pieces)))
    return Plan(tuple(segments), largest, torch.cat(buffers), torch.cat(offsets))


class AnchorStream:
    """Two buffers on the device, and on a GPU the stream that fills them.

    Args:
        device: Of the kernels.
        num_bytes: Of a buffer.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.device = device
        self.buffers = [
            torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)
        ]
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[Any] = [None] * NUM_BUFFERS

    def begin(self) -> None:
        """Let the copies of this step wait for all that the device was given before it.

        In a capture this is what makes the other stream part of the graph.
        """
        if self._copies is not None:
            before = torch.cuda.current_stream(self.device).record_event()
            self._free = [before] * NUM_BUFFERS

    def run(
        self,
        plan: Plan,
        anchors: Sequence[Tensor | None],
        launch: Callable[[int, int], None],
    ) -> None:
        """Launch a kernel over the rows of each segment once its anchors are there.

        Args:
            plan: Of these anchors.
            anchors: In host memory, contiguous; pinned, where the device is a GPU.
            launch: Takes the first row of a segment and the number of its rows.
        """
        for number, segment in enumerate(plan.segments):
            turn = number % NUM_BUFFERS
            if segment.pieces:
                self._fill(turn, segment, anchors)
            launch(segment.first_row, segment.num_rows)
            if self._copies is not None:
                self._free[turn] = torch.cuda.current_stream(self.device).record_event()

    def _fill(self, turn: int, segment: Segment, anchors: Sequence[Tensor | None]) -> None:
        if self._copies is None:
            context: Any = nullcontext()
        else:
            self._copies.wait_event(self._free[turn])
            context = torch.cuda.stream(self._copies)
        with context:
            for piece in segment.pieces:
                anchor = anchors[piece.index]
                assert anchor is not None
                given = anchor.view(-1)[piece.start : piece.start + piece.count]
                place = self.buffers[turn][piece.offset : piece.offset + given.nbytes]
                place.view(given.dtype).copy_(given, non_blocking=True)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copies.record_event())
