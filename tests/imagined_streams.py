"""Streams and events in thought: which work comes before which, and what is touched out of order.

Each stream counts what it was given, and knows up to where it has waited for the others; so does
the host. A touch of memory must come after the last write to it, and a write after the last reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

Clock = dict[int, int]


def merge(clock: Clock, other: Clock) -> None:
    for number, ticks in other.items():
        clock[number] = max(ticks, clock.get(number, 0))


class Timeline:
    """A stream, or the host."""

    numbers = count()

    def __init__(self) -> None:
        self.number = next(self.numbers)
        self.clock: Clock = {}

    def tick(self) -> int:
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return self.clock[self.number]


class Order:
    """Which touch of which memory came when.

    Attributes:
        host: What the host itself does.
        current: The stream that work goes to.
        refuse_wait: Called with what makes the host wait.
    """

    def __init__(self, refuse_wait: Callable[[str], None]) -> None:
        self.host = Timeline()
        self.current: Timeline = Timeline()
        self.refuse_wait = refuse_wait
        self._written: dict[int, tuple[int, int]] = {}
        self._read: defaultdict[int, Clock] = defaultdict(dict)

    def touch(self, reads: set[int], writes: set[int], *, by_host: bool) -> bool:
        """Note what comes next; returns whether it came after all that it had to come after.

        Args:
            reads: Memory, by its numbers.
            writes: Likewise.
            by_host: The host itself does it; else the current stream, after all that the host
                has waited for.
        """
        line = self.host if by_host else self.current
        merge(line.clock, self.host.clock)
        in_order = True
        for key in reads | writes:
            number, ticks = self._written.get(key, (line.number, 0))
            in_order &= line.clock.get(number, 0) >= ticks
        for key in writes:
            in_order &= all(line.clock.get(n, 0) >= ticks for n, ticks in self._read[key].items())
        now = line.tick()
        for key in reads - writes:
            self._read[key][line.number] = now
        for key in writes:
            self._written[key], self._read[key] = (line.number, now), {}
        return in_order

    def forget(self, key: int) -> None:
        """The memory is new, whatever had its number before."""
        self._written.pop(key, None)
        self._read.pop(key, None)

    def host_waits(self, clock: Clock | None = None) -> None:
        """Let the host wait: for what the current stream was given, or up to a clock."""
        merge(self.host.clock, self.current.clock if clock is None else clock)

    @contextmanager
    def on(self, stream: Timeline | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def names(self) -> dict[str, Any]:
        """What torch.cuda is to call these by."""
        order = self

        class Event:
            def __init__(self, *_: Any, **__: Any) -> None:
                self.clock: Clock = {}

            def record(self, stream: Timeline | None = None) -> None:
                self.clock = dict((stream or order.current).clock)

            def wait(self, stream: Timeline | None = None) -> None:
                merge((stream or order.current).clock, self.clock)

            def query(self) -> bool:
                order.refuse_wait("Event.query")
                order.host_waits(self.clock)
                return True

            def synchronize(self) -> None:
                order.refuse_wait("Event.synchronize")
                order.host_waits(self.clock)

        class Stream(Timeline):
            def __init__(self, *_: Any, **__: Any) -> None:
                super().__init__()

            def wait_stream(self, other: Timeline) -> None:
                merge(self.clock, other.clock)

            def wait_event(self, event: Event) -> None:
                merge(self.clock, event.clock)

            def record_event(self, event: Event | None = None) -> Event:
                event = event or Event()
                event.record(self)
                return event

            def synchronize(self) -> None:
                order.refuse_wait("Stream.synchronize")
                order.host_waits(self.clock)

        def synchronize(*_: Any) -> None:
            order.refuse_wait("torch.cuda.synchronize")
            order.host_waits()

        home = order.current = Stream()
        return {
            "Event": Event,
            "Stream": Stream,
            "stream": order.on,
            "current_stream": lambda *_: order.current,
            "default_stream": lambda *_: home,
            "synchronize": synchronize,
        }
