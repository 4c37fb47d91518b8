"""Text and TOML files that users give, read within limits."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fastppt.errors import UserError

LARGEST_TEXT = 4 * 2**20
"""Bytes: captions of 10,000 photos are 2 MiB; a run's configuration is 20 KiB."""

MOST_DOTS = 1000
"""Dots in one line: Python's reader of TOML takes time that grows with the square of the parts of a
dotted key."""


def read_text(file: Path, key: str = "") -> str:
    """Return the text of a file in UTF-8.

    Args:
        file: The file; a pipe will do.
        key: What an error message begins with, such as ``photos: ``.

    Raises:
        UserError: there is no such file, it cannot be read, is too large, or is no text.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST_TEXT + 1)
        if len(content) > LARGEST_TEXT:
            raise UserError(
                f"{key}{file}: is over {LARGEST_TEXT // 2**20} MiB long; is it the right file?"
            )
        # As Python reads text: any line ending is one.
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise UserError(f"{key}{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}{file}: cannot be read as text ({error})") from None


def read_toml(file: Path, key: str = "") -> dict[str, Any]:
    """Return the table that a TOML file is; arguments and errors as of `read_text`.

    Raises:
        UserError: also where it is no TOML.
    """
    text = read_text(file, key)
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > MOST_DOTS:
            raise UserError(f"{key}{file}: line {number} has more than {MOST_DOTS} dots")
    try:
        return tomllib.loads(text)
    # A number of too many digits is a plain ValueError.
    except ValueError as error:
        raise UserError(f"{key}{file}: is not a TOML file ({error})") from None
    except RecursionError:
        raise UserError(f"{key}{file}: is not a TOML file (too deeply nested)") from None
