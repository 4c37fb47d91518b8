"""One run at a time may write to an output folder."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from fastppt.errors import UserError

LOCK_NAME = ".lock"
# What a file system answers that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# Tries to lock a file that others delete; a folder that cannot be made looks the same.
ATTEMPTS = 1000


def check_place(output: Path) -> None:
    """Refuse an output folder that is or lies under a file.

    Raises:
        UserError: names the file.
    """
    for place in (output, *output.absolute().parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"output {output}: {place} is a file; choose another folder")


@contextmanager
def lock_output(folder: Path, console: Console) -> Iterator[None]:
    """Hold an output folder, so that no other run reads or writes there.

    The kernel holds the lock (flock on FOLDER/.lock): it ends with the process, however that ends,
    and a file that a crash leaves behind means nothing. The file names the process that holds it.
    At the end it is deleted, and so are the folders that were made for it, if nothing has been
    written there.

    Args:
        folder: Made if it is missing.
        console: Is told where the file system has no locks; the run then goes on without.

    Raises:
        UserError: another run holds the folder, or it cannot be made or written.
    """
    check_place(folder)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        lock = _Lock(folder / LOCK_NAME)
    except OSError as error:
        _remove_empty(missing)
        raise UserError(
            f"output {folder}: cannot be written ({error.strerror or error}); choose another folder"
        ) from None
    if not lock.is_held:
        console.print(
            f"note: the file system of {folder} has no locks: nothing keeps a second run from "
            "writing there",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    try:
        yield
    finally:
        lock.release()
        _remove_empty(missing)


@contextmanager
def wait_for_folder(folder: Path, on_wait: Callable[[], object]) -> Iterator[bool]:
    """Hold a folder of a cache; where another process holds it, wait until that ends.

    The lock is that of `lock_output`, on a file that stays. Where the file system has no locks it
    is not held: what is written must be whole file by file, and the same from every process.

    Args:
        folder: Made if it is missing.
        on_wait: Called before the waiting, where there is some.

    Returns:
        A context, in it whether the folder is held.

    Raises:
        OSError: the folder or the file cannot be made.
    """
    is_held = True
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("ab") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            is_held = False
        yield is_held


class _Lock:
    """A locked file.

    Raises:
        OSError: the file cannot be made.
        UserError: another holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor, self.is_held = self._acquire()
        try:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{os.getpid()} {platform.node()}\n".encode())
        except OSError:
            self.release()
            raise
        # A forked child shares the lock, and would keep it when this process is killed.
        closing = weakref.WeakMethod(self._close)

        def close_in_child() -> None:
            close = closing()
            if close is not None:
                close()

        os.register_at_fork(after_in_child=close_in_child)

    def _acquire(self) -> tuple[int, bool]:
        """Return the open file, and whether it is locked: not where there are no locks."""
        gone = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        for _ in range(ATTEMPTS):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                descriptor = os.open(self._path, flags, 0o666)
            except FileNotFoundError as error:
                # Perhaps another run has just ended here, and has taken its empty folder away.
                gone = error
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 300).decode(errors="replace").split()
                os.close(descriptor)
                raise UserError(
                    f"output {self._path.parent}: {_holder_in_words(holder)} is writing there; "
                    "wait until it ends, or choose another folder"
                ) from None
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return descriptor, False
                os.close(descriptor)
                raise
            # Whoever held the lock may have deleted the file after it was opened here.
            if self._is_there(descriptor):
                return descriptor, True
            os.close(descriptor)
        raise gone

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.lstat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        with suppress(OSError):
            self._path.unlink()
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _holder_in_words(holder: list[str]) -> str:
    """Return who holds the lock, from what the file says: process and machine."""
    if len(holder) != 2:
        return "another run"
    pid, machine = holder
    elsewhere = f" on {machine}" if machine != platform.node() else ""
    return f"another run (process {pid}{elsewhere})"


def _remove_empty(folders: list[Path]) -> None:
    """Delete folders that are empty, the inner ones first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
