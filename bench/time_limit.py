"""Ends what takes too long."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTimeError(Exception):
    """The time for one workload is up."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the block once the seconds are over: a compile asks nobody.

    What the block makes of that error, as torch.compile makes one of its own, is one too. A block
    inside another's leaves that one's time as it is.
    """
    is_over = False

    def stop(signal_number: int, frame: object) -> None:
        nonlocal is_over
        is_over = True
        raise OutOfTimeError("the time was up")

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    # Again each second: an exception that is raised inside a destructor goes no further.
    outer_seconds, _ = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    except Exception as error:
        if is_over and not isinstance(error, OutOfTimeError):
            raise OutOfTimeError("the time was up") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer_seconds:
            # 0 would be no limit at all.
            left = max(outer_seconds - (time.monotonic() - start), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, 1.0)
