"""Files that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from fastppt.errors import UserError

# What a checkpoint keeps beside the files of a run.
STATE_FILE = "state.safetensors"
# The traceback of a fault, in the output folder.
ERROR_LOG = "error.log"


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file whole, as `whole_file` says.

    Args:
        path: Where to.
        content: Bytes, or text that is stored as UTF-8.

    Raises:
        UserError: the file cannot be written, for want of space or of the right to.
    """
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary name beside the file; afterwards sync, rename, sync the folder.

    A reader, or a crash at any moment, sees the old file or the new one and nothing between.

    Args:
        path: Where to; its folder is made if it is missing, and synced.

    Raises:
        UserError: the file cannot be written, for want of space or of the right to.
    """
    temporary = _aside(path)
    try:
        _make_folder(path.parent)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Fill a folder beside its place, sync all that is in it, rename it.

    A folder of that name is deleted right before: a crash between the two leaves none.

    Args:
        path: Where to; the folder above is made if it is missing.
        fill: Writes into the folder that it is given.

    Raises:
        UserError: it cannot be written, for want of space or of the right to.
    """
    aside = _aside(path)
    try:
        _make_folder(path.parent)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            fill(aside)
            for each in (*aside.rglob("*"), aside):
                _sync(each)
            if path.exists():
                shutil.rmtree(path)
            rename(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    except SafetensorError as error:
        # What it says when a disk is full is no OSError.
        raise UserError(f"{path}: cannot be written ({error})") from OSError(str(error))


def rename(source: Path, target: Path) -> None:
    """Give a file or folder its name, and sync the folder that holds the name."""
    os.replace(source, target)
    _sync(target.parent)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, and sync what holds the name of each."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _aside(path: Path) -> Path:
    """Return where a file or folder is written before it has its name."""
    # The process id keeps two runs apart; one process writes one file at a time.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
