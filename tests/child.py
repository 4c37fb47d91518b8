"""A command in a forked process, which has everything imported already."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from fastppt import cli


def in_child(arguments: list[str], before: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """Run a command in a forked process after something; returns its exit code and what it said."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        _be_the_command(arguments, before, writer)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), text


def _be_the_command(arguments: list[str], before: Callable[[], object], writer: int) -> NoReturn:
    code: object = 99
    try:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout = sys.stderr = os.fdopen(writer, "w", encoding="utf-8", buffering=1)
        before()
        sys.argv = ["fastppt", *arguments]
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 98)
