"""One run at a time in a folder, and no lock that outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fastppt.errors import UserError
from fastppt.outputs import lock
from fastppt.outputs.lock import LOCK_NAME, lock_output

QUIET = Console(quiet=True)
NUM_RUNS, NUM_ENTRIES = 4, 20
HOLD = """
import sys, time
from pathlib import Path
from rich.console import Console
from fastppt.outputs.lock import lock_output
with lock_output(Path(sys.argv[1]), Console(quiet=True)):
    print("held", flush=True)
    {then}
"""


def hold_elsewhere(folder: Path, then: str = "time.sleep(60)") -> subprocess.Popen[str]:
    """Return a process that holds the folder."""
    command = [sys.executable, "-c", HOLD.format(then=then), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def assert_free(folder: Path) -> None:
    with lock_output(folder, QUIET):
        pass


def assert_held(folder: Path) -> None:
    """By this process."""
    words = f"process {os.getpid()}\\) is writing there"
    with pytest.raises(UserError, match=words), lock_output(folder, QUIET):
        pass


def test_the_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    holder = hold_elsewhere(tmp_path)
    try:
        words = f"output {tmp_path}: another run \\(process {holder.pid}\\) is writing there"
        with pytest.raises(UserError, match=words), lock_output(tmp_path, QUIET):
            pass
        # The refusal has taken nothing from the one that holds it.
        with pytest.raises(UserError), lock_output(tmp_path, QUIET):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    assert_free(tmp_path)
    assert not (tmp_path / LOCK_NAME).exists()


def test_the_second_run_of_one_process_is_refused(tmp_path: Path) -> None:
    with lock_output(tmp_path, QUIET):
        assert_held(tmp_path)
        assert (tmp_path / LOCK_NAME).exists()
    assert_free(tmp_path)


def test_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, lock_output(tmp_path, QUIET):
        patch.setattr(lock.platform, "node", lambda: "elsewhere")
        (tmp_path / LOCK_NAME).write_text("7 node12\n")
        with pytest.raises(UserError, match="process 7 on node12"), lock_output(tmp_path, QUIET):
            pass


def test_a_child_that_outlives_a_killed_run_keeps_no_lock(tmp_path: Path) -> None:
    """Neither a forked child nor a started program."""
    then = (
        "import os, subprocess\n"
        "    started = subprocess.Popen(['sleep', '60'])\n"
        "    print(started.pid, flush=True)\n"
        "    if os.fork() == 0: print(os.getpid(), flush=True)\n"
        "    time.sleep(60)"
    )
    holder = hold_elsewhere(tmp_path, then)
    assert holder.stdout is not None
    children = [int(holder.stdout.readline()), int(holder.stdout.readline())]
    try:
        holder.kill()
        holder.wait()
        assert_free(tmp_path)
        for pid in children:
            os.kill(pid, 0)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_a_child_that_outlives_a_finished_run_keeps_no_lock(tmp_path: Path) -> None:
    child = 0
    try:
        with lock_output(tmp_path, QUIET):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
        assert_free(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_was_made_for_nothing_is_taken_away(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    with lock_output(inner, QUIET):
        assert (inner / LOCK_NAME).exists()
    assert list(tmp_path.iterdir()) == []
    with lock_output(inner, QUIET):
        (inner / "file").write_text("kept")
    assert (inner / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    assert_free(tmp_path / "empty")
    assert (tmp_path / "empty").is_dir()


def test_of_many_that_start_at_once_one_at_a_time_holds_the_folder(tmp_path: Path) -> None:
    """Into a folder that is not there yet, and that is taken away as often as it is made."""
    folder, marks = tmp_path / "new" / "out", tmp_path / "marks"
    marks.mkdir()
    children = []
    for _ in range(NUM_RUNS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = enter_often(folder, marks)
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * NUM_RUNS
    assert not (folder / LOCK_NAME).exists()
    assert not list(marks.iterdir())


def test_a_file_that_was_deleted_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run that held it, between the opening and the locking."""
    real, calls = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / LOCK_NAME).unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock_output(tmp_path, QUIET):
        assert (tmp_path / LOCK_NAME).exists()
        assert_held(tmp_path)


def test_a_folder_that_was_taken_away_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.open, []

    def late(path: Path, *how: int) -> int:
        calls.append(path)
        if len(calls) == 1:
            path.parent.rmdir()
        return real(path, *how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", late)
        with lock_output(tmp_path / "out", QUIET):
            assert (tmp_path / "out" / LOCK_NAME).exists()


def enter_often(folder: Path, marks: Path) -> int:
    """Return 0 if this process was in the folder often, and never together with another."""
    entered = 0
    while entered < NUM_ENTRIES:
        try:
            with lock_output(folder, QUIET):
                mark = marks / str(os.getpid())
                mark.touch()
                if len(list(marks.iterdir())) != 1:
                    return 2
                mark.unlink()
                entered += 1
        except UserError as error:
            if "is writing there" not in str(error):
                return 3
            time.sleep(0.001)
    return 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    said = StringIO()
    with lock_output(tmp_path, Console(file=said, width=40)):
        pass
    assert f"the file system of {tmp_path} has no locks" in said.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_locked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place, words in (
        (tmp_path / "file", "is a file; choose another folder"),
        (tmp_path / "file" / "out", "is a file; choose another folder"),
        (Path("/proc/no/out"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=f"output {place}: .*{words}"):
            lock_output(place, QUIET).__enter__()
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"), lock_output(tmp_path, QUIET):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_is_full_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(lock.os, "write", fail)
        with pytest.raises(UserError, match="No space left"), lock_output(tmp_path / "a", QUIET):
            pass
    assert list(tmp_path.iterdir()) == []
    assert_free(tmp_path)
