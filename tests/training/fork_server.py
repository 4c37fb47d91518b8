"""A process that has imported all of fastppt, and forks a child for each command it is given.

Tests that kill runs by the dozen cannot wait for the imports each time. The server starts no
thread and computes nothing with torch, so that its children are as good as fresh processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
# What changes files, and where a run can be killed right before and right after.
CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
# Seconds that a command may take on a busy machine.
PATIENCE = 120.0


@dataclass
class Child:
    """A command that is under way."""

    server: ForkServer
    pid: int
    out: Path

    def said(self) -> str:
        """Standard output and error, so far."""
        return self.out.read_text()

    def wait_until_said(self, text: str) -> None:
        """Wait until the command has printed something."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.said():
            assert time.monotonic() < deadline and not self._has_ended(), self.said()
            time.sleep(0.002)

    def _has_ended(self) -> bool:
        # The server has not waited for it yet: a zombie.
        return ") Z " in Path(f"/proc/{self.pid}/stat").read_text()

    def send(self, signum: int) -> None:
        """Send a signal; a child that has ended is waited for by the server alone."""
        os.kill(self.pid, signum)

    def wait(self) -> int:
        """Return the exit code: negative where a signal ended it."""
        return int(self.server.ask(wait=self.pid)["code"])


class ForkServer:
    """The server, seen from the test."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))},
        )
        assert self.ask(hello=True) == {"threads": 1}
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, **request: object) -> dict[str, Any]:
        """Send a request and return the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def start(
        self,
        *arguments: object,
        out: Path,
        kill_at: int | None = None,
        slow: Path | None = None,
    ) -> Child:
        """Start `fastppt` with arguments.

        Args:
            arguments: As typed.
            out: File for standard output and error.
            kill_at: Number of the event, among the changes of files, at which the command kills
                itself with SIGKILL; 0 counts them all into the file OUT.events.
            slow: While this file exists, every sync takes minutes.
        """
        out.touch()
        request = {"start": [str(each) for each in arguments], "out": str(out), "kill_at": kill_at}
        answer = self.ask(**request, slow=str(slow) if slow is not None else None)
        return Child(self, int(answer["pid"]), out)

    def run(self, *arguments: object, out: Path, kill_at: int | None = None) -> int:
        """Start `fastppt`, wait, and return its exit code."""
        return self.start(*arguments, out=out, kill_at=kill_at).wait()


def _serve() -> None:
    import diffusers  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import fastppt.training.loop  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "hello" in request:
            answer = {"threads": len(os.listdir("/proc/self/task"))}
        elif "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                if request["slow"] is not None:
                    make_syncs_slow(Path(request["slow"]))
                _be_fastppt(request["start"], Path(request["out"]), request["kill_at"])
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _be_fastppt(arguments: list[str], out: Path, kill_at: int | None) -> None:
    """Run one command in a forked child, which ends here."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: object = 1
    try:
        file = os.open(out, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        sys.stdin.close()
        from fastppt.cli import main

        sys.argv = ["fastppt", *arguments]
        count = (lambda: 0) if kill_at is None else kill_at_event(kill_at)
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        if kill_at == 0:
            out.with_suffix(".events").write_text(str(count()))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def make_syncs_slow(sign: Path) -> None:
    """Let every sync take minutes while a file exists."""
    real = os.fsync

    def sync(descriptor: int) -> None:
        if sign.exists():
            time.sleep(2 * PATIENCE)
        real(descriptor)

    os.fsync = sync


def kill_at_event(number: int) -> Callable[[], int]:
    """Kill this process at an event: before or after a change of files, or half through a write.

    Args:
        number: Counted from 1; 0 never kills.

    Returns:
        A function that says how many events there have been.
    """
    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def patch(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            event()
            result = real(*arguments, **options)
            event()
            return result

        setattr(os, name, call)

    for name in CALLS:
        patch(name)
    real_open = Path.open

    @contextlib.contextmanager
    def writing(file: Any) -> Iterator[Any]:
        with file:
            real_write = file.write

            class Halves:
                fileno, flush = file.fileno, file.flush

                def write(self, data: bytes) -> None:
                    real_write(data[: len(data) // 2])
                    file.flush()
                    event()
                    real_write(data[len(data) // 2 :])

            yield Halves()

    def opened(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = real_open(self, mode, *arguments, **options)
        return writing(file) if mode == "wb" else file

    Path.open = opened  # type: ignore[method-assign]
    return lambda: events


if __name__ == "__main__":
    _serve()
