"""Runs a trainer's command, reads its output as it comes, and watches the memory that it takes."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from bench.peers.parse import Bar, BarReader, Log
from bench.race_results import MemoryKind
from fastppt.errors import UserError

# Seconds between two looks at the memory.
POLL_S = 0.25
PIECE_BYTES = 1 << 16
# Lines of a trainer's output that are shown where it failed. Its launcher's traceback, of some 20,
# comes after what it said itself.
SHOWN_LINES = 40


@dataclass(frozen=True)
class Command:
    """What is typed to train.

    Attributes:
        words: The program and its arguments.
        folder: Where it is started.
        variables: Of the environment, beside our own.
        num_launchers: Processes that do nothing but start the next, from the first one on: what
            they take is not the trainer's.
    """

    words: Sequence[str]
    folder: Path
    variables: Mapping[str, str]
    num_launchers: int = 0


@dataclass(frozen=True)
class _Ran:
    """One process, from its start to its end: what it printed, and when, in seconds after it."""

    bars: Sequence[Bar]
    begun_s: float | None
    printed_s: float
    """The last."""
    written_s: float
    """The last of the files beside its output; below zero if they all are older."""


def run_trainer(
    command: Command,
    output: Path,
    *,
    device: str,
    start_words: Sequence[str] | None = None,
    begins: str | None = None,
) -> Log:
    """Run a trainer to its end.

    Args:
        command: How.
        output: File for all that it prints, in the folder that it writes to.
        device: "cuda" watches the GPU's memory, which nothing else may be using; "cpu" the host's.
        start_words: A command that imports the same, prints something and ends, run before to be
            timed; None: there is none.
        begins: Pattern of what the trainer itself prints when all has been imported, instead.

    Raises:
        UserError: it cannot be started, or fails; with the end of what it printed. Or it never
            printed what it is to begin with.
    """
    start_s = None
    if start_words is not None:
        # The first reads the files from disk, and the trainer, run after it, does not.
        for _ in range(2):
            start_s = _run(command, start_words, output, None).printed_s
    watch = MemoryWatch(device, command.num_launchers)
    ran = _run(command, command.words, output, watch, begins)
    if watch.peak == 0:
        raise UserError(f"{output}: the trainer took no memory of the {device}; did it train?")
    if begins is not None:
        start_s = ran.begun_s
        if start_s is None:
            raise UserError(
                f"{output}: the trainer printed nothing like {begins!r}, which says that it has "
                "begun; is the checkout of the version that bench/peers/README.md names?"
            )
    done_s = max(ran.printed_s, ran.written_s)
    return Log(ran.bars, done_s, start_s, watch.peak, watch.kind)


def _run(
    command: Command,
    words: Sequence[str],
    output: Path,
    watch: "MemoryWatch | None",
    begins: str | None = None,
) -> _Ran:
    """Run a command to its end."""
    reader, bars, printed_s = BarReader(begins), [], 0.0
    begun, begun_at = time.monotonic(), time.time()
    try:
        process = subprocess.Popen(
            words,
            cwd=command.folder,
            env=os.environ | dict(command.variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise UserError(f"{words[0]}: cannot be started ({error.strerror})") from None
    assert process.stdout is not None
    try:
        if watch is not None:
            watch.start(process.pid)
        with output.open("wb") as file:
            while piece := os.read(process.stdout.fileno(), PIECE_BYTES):
                printed_s = time.monotonic() - begun
                bars += reader.read(piece, printed_s)
                file.write(piece)
        code = process.wait()
    finally:
        if watch is not None:
            watch.stop()
        if process.poll() is None:
            _kill_tree(process.pid)
            process.wait()
        process.stdout.close()
    if code != 0:
        raise UserError(
            f"the trainer ended with exit code {code}; all that it printed is in {output}, "
            f"which ends:\n{end_of(output)}"
        )
    if watch is not None:
        watch.check()
    written_at = max(_times_written(output), default=begun_at)
    return _Ran(bars, reader.begun_s, printed_s, written_at - begun_at)


def _times_written(output: Path) -> Iterator[float]:
    """Yield when each of the files beside a trainer's output was last written."""
    for path in output.parent.rglob("*"):
        # What a process that ends later deletes may be gone by now.
        with suppress(FileNotFoundError):
            if path != output and path.is_file():
                yield path.stat().st_mtime


def _kill_tree(process_id: int) -> None:
    """End a process and all that it has started, those too that have a session of their own."""
    started = psutil.Process(process_id).children(recursive=True)
    os.killpg(process_id, signal.SIGKILL)
    for each in started:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def end_of(output: Path) -> str:
    """Return the last lines of what a trainer printed."""
    lines = output.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join([line for line in lines if line.strip()][-SHOWN_LINES:])


class MemoryWatch:
    """The most memory that a trainer takes, looked at `POLL_S` apart.

    On a GPU what is taken of all GPUs beyond what was taken before: processes of their own number
    spaces, such as in a container, cannot be told from one another there. On the host the resident
    memory of the process and its children, pages that they share counted once.

    Args:
        device: "cuda" or "cpu".
        num_launchers: Generations of processes that are not counted on the host.
    """

    def __init__(self, device: str, num_launchers: int) -> None:
        self.kind: MemoryKind = "device" if device == "cuda" else "resident"
        self.peak = 0
        self._num_launchers = num_launchers
        self._before = _gpu_bytes() if self.kind == "device" else 0
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, process_id: int) -> None:
        """Watch from now on."""
        read = self._device_bytes
        if self.kind == "resident":
            process = psutil.Process(process_id)
            read = partial(resident_bytes, process, self._num_launchers)
        self._thread = threading.Thread(target=self._watch, args=(read,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Refuse a peak that is none.

        Raises:
            UserError: the memory could not be read at some time.
        """
        if self._error is not None:
            raise UserError(f"the memory of the trainer cannot be read: {self._error!r}")

    def _watch(self, read: Callable[[], int]) -> None:
        try:
            while True:
                self.peak = max(self.peak, read())
                if self._is_over.wait(POLL_S):
                    return
        # Of a thread it would be lost: `check` raises it.
        except Exception as error:
            self._error = error

    def _device_bytes(self) -> int:
        return _gpu_bytes() - self._before


def _gpu_bytes() -> int:
    """Return what is taken of the memory of all GPUs."""
    pairs = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
    return sum(total - free for free, total in pairs)


def resident_bytes(process: psutil.Process, num_launchers: int) -> int:
    """Return what a process and its children take, without so many generations of launchers.

    Of the pages that they share with anyone, those of the process that has most of them. The
    kernel's proportional count would give a launcher, which imports torch too, a part of torch.
    """
    try:
        members = [process]
        for _ in range(num_launchers):
            members = [child for each in members for child in each.children()]
        tree = {each for member in members for each in (member, *member.children(recursive=True))}
    except psutil.NoSuchProcess:
        return 0
    parts = [_own_and_shared_bytes(each) for each in tree]
    return sum(own for own, _ in parts) + max((shared for _, shared in parts), default=0)


def _own_and_shared_bytes(process: psutil.Process) -> tuple[int, int]:
    try:
        memory = process.memory_full_info()
    # It ended between two looks.
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return 0, 0
    return memory.uss, memory.rss - memory.uss
