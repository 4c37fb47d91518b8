"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, content: bytes | str) -> None:
    """Write to a temporary name beside the file, sync, rename, sync the folder.

    A reader, or a crash at any moment, sees the old file or the new one and nothing between.

    Args:
        path: Where to; its folder is made if it is missing.
        content: Bytes, or text that is stored as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    # The process id keeps two runs apart; one process writes one file at a time.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
