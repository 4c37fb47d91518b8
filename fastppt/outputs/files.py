"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from fastppt.errors import UserError

# The traceback of a fault, in the output folder.
ERROR_LOG = "error.log"


def write_file(path: Path, content: bytes | str) -> None:
    """Write to a temporary name beside the file, sync, rename, sync the folder.

    A reader, or a crash at any moment, sees the old file or the new one and nothing between.

    Args:
        path: Where to; its folder is made if it is missing, and synced.
        content: Bytes, or text that is stored as UTF-8.

    Raises:
        UserError: the file cannot be written, for want of space or of the right to.
    """
    data = content.encode() if isinstance(content, str) else content
    # The process id keeps two runs apart; one process writes one file at a time.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _make_folder(path.parent)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def rename(source: Path, target: Path) -> None:
    """Give a file or folder its name, and sync the folder that holds the name."""
    os.replace(source, target)
    _sync_folder(target.parent)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, and sync what holds the name of each."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
