"""Signals: noted between steps, raised where nothing is lost, and the second one is at once."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress

import pytest

from fastppt.training import interrupt
from fastppt.training.interrupt import SIGNALS, Interrupted, Interruption

# A run in small: steps until a signal is seen, then as long a save.
RUN = """
import sys, time
from fastppt.training.interrupt import Interruption
with Interruption() as interruption:
    print("ready", flush=True)
    while interruption.wanted is None:
        time.sleep(0.01)
    print("seen", interruption.wanted, flush=True)
    time.sleep(float(sys.argv[1]))
print("done")
sys.exit(128 + interruption.wanted)
"""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Every test starts with Python's own handlers, whatever started the tests, and restores."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def start(save_seconds: float, before: str = "") -> subprocess.Popen[str]:
    """Return a process that is in its steps."""
    process = subprocess.Popen(
        [sys.executable, "-c", before + RUN, str(save_seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_the_first_signal_is_noted_and_the_second_ends_the_process(
    signum: signal.Signals, code: int
) -> None:
    process = start(60)
    process.send_signal(signum)
    assert process.stdout is not None
    assert process.stdout.readline() == f"seen {int(signum)}\n"
    time.sleep(2 * interrupt.SAME_SIGNAL)
    process.send_signal(signum)
    said, complaint = process.communicate(timeout=20)
    assert process.returncode == code
    assert said == ""
    assert complaint.split("\n") == [
        "",
        f"{signum.name}: {interrupt.NOTED}",
        "",
        f"{signum.name}: a second signal, ended at once",
        "",
    ]


def test_the_second_signal_may_be_another_and_gives_its_own_code() -> None:
    process = start(60)
    process.send_signal(signal.SIGINT)
    time.sleep(3 * interrupt.SAME_SIGNAL)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_a_signal_that_a_launcher_hands_on_is_not_a_second_one() -> None:
    process = start(1)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(signum)
    said, _ = process.communicate(timeout=20)
    assert said.endswith("done\n")
    # Which of several pending signals Python hands over first is that of the lowest number.
    assert process.returncode in (129, 130, 143)


@pytest.mark.parametrize("signum", SIGNALS)
def test_ignored_signals_stay_ignored(signum: signal.Signals) -> None:
    """As under nohup, and as shells do with SIGINT for what runs behind an ampersand."""
    process = start(0, f"import signal; signal.signal({int(signum)}, signal.SIG_IGN)\n")
    process.send_signal(signum)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM if signum == signal.SIGINT else signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == (143 if signum == signal.SIGINT else 130)


def test_a_terminal_that_hangs_up_does_not_keep_a_run_from_saving() -> None:
    """Every write to it fails from then on, and so does every print."""
    reading, writing = os.pipe()
    pid, master = pty.fork()
    if pid == 0:
        saved = b"failed"
        try:
            with Interruption() as interruption:
                os.write(writing, b"ready")
                deadline = time.monotonic() + 20
                while interruption.wanted is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                # Not by `print`, whose streams pytest has taken.
                for descriptor in (1, 2):
                    os.write(descriptor, b"saving")
                saved = b"saved" if interruption.wanted == signal.SIGHUP else b"no signal"
        finally:
            os.write(writing, saved)
            os._exit(0)
    assert os.read(reading, 100) == b"ready"
    os.close(master)
    assert os.read(reading, 100) == b"saved"
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)


def test_the_cursor_of_a_terminal_is_shown_again_when_a_run_ends_at_once() -> None:
    reading, writing = os.pipe()
    pid, master = pty.fork()
    if pid == 0:
        with Interruption():
            os.write(writing, b"ready")
            time.sleep(60)
        os._exit(0)
    assert os.read(reading, 100) == b"ready"
    os.kill(pid, signal.SIGTERM)
    time.sleep(2 * interrupt.SAME_SIGNAL)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert b"\x1b[?25h" in os.read(master, 1000)
    for descriptor in (master, reading, writing):
        os.close(descriptor)


def raise_inside(signum: signal.Signals, *, swallow: bool = False) -> None:
    """Get a signal where a run has nothing to lose, perhaps inside a library that catches it."""
    with (
        Interruption(quiet=True) as interruption,
        interruption.at_once("nothing was trained"),
        suppress(BaseException) if swallow else nullcontext(),
    ):
        signal.raise_signal(signum)
        pytest.fail("went on")


def test_where_nothing_is_lost_a_signal_raises_there_and_then() -> None:
    with pytest.raises(Interrupted, match="SIGTERM: nothing was trained") as caught:
        raise_inside(signal.SIGTERM)
    assert caught.value.exit_code == 143 and caught.value.folder is None
    # Its type is none that code which catches failures would catch.
    assert not isinstance(caught.value, Exception)


def test_an_exception_that_a_library_swallows_comes_back() -> None:
    with pytest.raises(Interrupted):
        raise_inside(signal.SIGINT, swallow=True)


def test_a_signal_between_two_parts_stops_the_next_one() -> None:
    with Interruption(quiet=True) as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.wanted == signal.SIGINT
        with pytest.raises(Interrupted), interruption.at_once("nothing"):
            pytest.fail("began")


def message_of_a_signal(*, inside: bool) -> str:
    """What an end says of a signal that comes inside of two messages, or after the inner one."""
    try:
        with Interruption(quiet=True) as interruption, interruption.at_once("outer"):
            with interruption.at_once("inner"):
                if inside:
                    os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
    except Interrupted as end:
        return str(end)
    raise AssertionError("not ended")


def test_the_innermost_message_counts_and_then_the_outer_one_again() -> None:
    assert message_of_a_signal(inside=True) == "SIGTERM: inner"
    assert message_of_a_signal(inside=False) == "SIGTERM: outer"


def test_an_interruption_says_nothing_when_told_to(capfd: pytest.CaptureFixture[str]) -> None:
    with Interruption(quiet=True):
        signal.raise_signal(signal.SIGINT)
    with Interruption():
        pass
    assert capfd.readouterr() == ("", "")


def test_the_handlers_before_are_put_back() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]

    def fail() -> None:
        assert all(signal.getsignal(signum) not in before for signum in SIGNALS)
        raise RuntimeError

    with pytest.raises(RuntimeError), Interruption():
        fail()
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_outside_of_the_main_thread_nothing_is_installed() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    found: list[object] = []

    def run() -> None:
        with Interruption() as interruption, interruption.at_once("nothing"):
            found.extend(signal.getsignal(signum) for signum in SIGNALS)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == before
