"""Ctrl-C and its like: a run ends between two steps, with all that it has learned."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

# Ctrl-C; what schedulers and `kill` send; a terminal that hangs up.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds in which another signal is the first one again: a launcher hands on to the run what the
# terminal has sent to both of them, and systemd can send SIGHUP behind its SIGTERM.
SAME_SIGNAL = 0.25
# How a run can have ended that has nothing to save.
NOTHING_TRAINED = "ended before the first step; nothing was trained yet"
NO_STEP = "ended before another step was taken"
NOT_YET_RESUMED = f"{NO_STEP}; the same command goes on with the run"
IMAGES_KEPT = (
    "ended while class images were drawn; those that are finished are kept, and the same command "
    "goes on with them"
)
NOT_DONE = "ended before all was done"
NOTED = "ending as soon as all is saved; a second signal ends the run at once"


class Interrupted(BaseException):
    """A signal has ended a run.

    No `Exception`, so that no library takes it for a failure of its own.

    Attributes:
        signum: The signal.
        folder: The output of a run that can be resumed; None where nothing was written.
    """

    def __init__(self, signum: int, message: str, folder: Path | None = None) -> None:
        super().__init__(message)
        self.signum = signum
        self.folder = folder

    @property
    def exit_code(self) -> int:
        """What shells report of a process that the signal ended: 130 for SIGINT."""
        return 128 + self.signum


class Interruption:
    """SIGINT, SIGTERM and SIGHUP while inside: noted, for the run to ask between its steps.

    The handlers only set a flag, because a signal may come anywhere in a step: inside autograd,
    the compiler, a capture. Where a run has nothing to lose, `at_once` lets them raise.
    A second signal ends the process there and then. Signals that were ignored stay ignored (nohup
    does that to SIGHUP). The handlers before are put back at the end. Outside of the main thread,
    where Python allows no handlers, nothing is noted.

    Args:
        quiet: Say nothing when a signal is noted.

    Attributes:
        wanted: The signal that asks the run to end; None while there is none.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.wanted: int | None = None
        self._quiet = quiet
        self._noted = 0.0
        self._refusal: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                before = signal.getsignal(signum)
                # None: a handler that Python did not install, and could not put back.
                if before not in (signal.SIG_IGN, None):
                    self._before[signum] = before
                    signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before)
        self._before.clear()

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Let a signal end what is inside there and then; the innermost message counts.

        Args:
            message: What the exception says.

        Raises:
            Interrupted: a signal has come, inside or before.
        """
        before, self._refusal = self._refusal, message
        try:
            self._refuse()
            yield
            # A library may have swallowed what the handler raised.
            self._refuse()
        except Exception:
            # Or have failed of it later, its import half done.
            self._refuse()
            raise
        finally:
            self._refusal = before

    def _refuse(self) -> None:
        if self.wanted is not None and self._refusal is not None:
            raise Interrupted(self.wanted, f"{signal_name(self.wanted)}: {self._refusal}")

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.wanted is None:
            self.wanted, self._noted = signum, now
            drop_dead_outputs()
            self._refuse()
            self._say(f"{signal_name(signum)}: {NOTED}")
        elif now - self._noted >= SAME_SIGNAL:
            self._say(f"{signal_name(signum)}: a second signal, ended at once")
            os._exit(128 + signum)

    def _say(self, text: str) -> None:
        # Not by `print`: the signal may have come in the middle of one. The cursor, which a
        # progress line hides, is shown again.
        if not self._quiet:
            with suppress(OSError):
                cursor = "\x1b[?25h" if os.isatty(2) else ""
                os.write(2, f"{cursor}\n{text}\n".encode())


class _End(Interruption):
    """The first signal ends the process."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = message

    def _note(self, signum: int, frame: FrameType | None) -> None:
        drop_dead_outputs()
        self._say(f"{signal_name(signum)}: {self._message}")
        os._exit(128 + signum)


def ended_at_once(message: str) -> Interruption:
    """Return a context in which a signal ends the process there and then.

    For what writes nothing, such as imports: cut short by an exception, some print tracebacks,
    abort, or go on by halves.

    Args:
        message: What is printed.
    """
    return _End(message)


@contextmanager
def raised_at_once(message: str) -> Iterator[None]:
    """Let a signal end what is inside as an exception; see `Interruption.at_once`.

    Raises:
        Interrupted: a signal has come.
    """
    with Interruption() as interruption, interruption.at_once(message):
        yield


def signal_name(signum: int) -> str:
    """Return what people call a signal, such as SIGINT."""
    return signal.Signals(signum).name


def drop_dead_outputs() -> None:
    """Send what is printed nowhere, where standard output or error is a terminal that hung up.

    Every write to it would fail, and end the run before it has saved.
    """
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
