"""What becomes of an exception: a message for what the user can mend, a log for what is our fault.

Exit codes: 2 for the user's, 1 for ours.
"""

from __future__ import annotations

import errno
import platform
import shlex
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.markup import escape

from fastppt import __version__
from fastppt.console import SafeConsole, printable, scrub, silence
from fastppt.errors import UserError
from fastppt.outputs.files import ERROR_LOG, write_file

USER_EXIT, FAULT_EXIT = 2, 1
# 128 and the number of SIGPIPE: what a shell says of a program whose reader went away.
BROKEN_PIPE_EXIT = 141

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO)
# What torch says where the host's memory is full; of a GPU's it raises a type of its own.
HOST_MEMORY_MARK = "can't allocate memory"
GPU_MEMORY_HELP = (
    "What helps: --gradient-checkpointing, a lower --resolution, --batch-size 1, --precision bf16, "
    "a lower --rank, fewer photos or photos.views, or a GPU that nothing else uses. "
    "`fastppt doctor` predicts what a run takes"
)
HOST_MEMORY_HELP = (
    "What helps: fewer photos, a lower --resolution, fewer photos.views, or less that runs beside "
    "it. `fastppt doctor` predicts what a run takes"
)


@dataclass
class FaultPlace:
    """Where the log of a fault goes.

    Attributes:
        folder: The output folder; None while it is not known, and for commands without one.
    """

    folder: Path | None = None


@contextmanager
def user_errors(folder: Path | None = None) -> Iterator[FaultPlace]:
    """Report what goes wrong inside, and exit as `report` says.

    Args:
        folder: The output folder, if it is known already.

    Returns:
        A context, in it what can be told where the output is.
    """
    place = FaultPlace(folder)
    try:
        yield place
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        raise typer.Exit(code=report(error, place.folder)) from None


def report(error: Exception, folder: Path | None = None) -> int:
    """Print what went wrong in one message on standard error; returns the exit code.

    That is 2 for what the user can mend (`UserError`, full memory, a full disk). Any other
    exception is a fault of ours: the code is 1, and the traceback goes to ``error.log``.

    Args:
        error: What was raised.
        folder: The output folder; None while it is not known, and for commands without one.
    """
    if isinstance(error, BrokenPipeError):
        silence(sys.stdout)
        return BROKEN_PIPE_EXIT
    message = _in_users_words(error)
    if message is not None:
        _print_error(message)
        return USER_EXIT
    _print_error(_log_fault(error, folder))
    return FAULT_EXIT


def report_thread(failed: threading.ExceptHookArgs) -> None:
    """Say in one line that a thread found no room on the disk; all else of threads as Python does.

    What waits for such a thread, as for TensorBoard's, raises the same exception.
    """
    if isinstance(failed.exc_value, OSError) and failed.exc_value.errno in NO_SPACE:
        _print_error(f"{failed.thread.name if failed.thread else 'a thread'}: {failed.exc_value}")
    else:
        threading.__excepthook__(failed)


def _print_error(message: str) -> None:
    console = SafeConsole(stderr=True, soft_wrap=True)
    console.print(f"[red]error:[/red] {escape(scrub(message))}")


def _in_users_words(error: Exception) -> str | None:
    """Return what the user can do about an exception; None if it is a fault of ours."""
    if isinstance(error, UserError):
        return str(error)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        said = str(error).split(". ")[0].removesuffix(".")
        return f"the GPU's memory is full ({_in_one_line(said)}). {GPU_MEMORY_HELP}"
    if isinstance(error, MemoryError) or HOST_MEMORY_MARK in str(error):
        return f"this machine's memory is full. {HOST_MEMORY_HELP}"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "fastppt").startswith(
        "fastppt"
    ):
        package = str(error.name).partition(".")[0]
        return (
            f"the package {package} is not installed, or too old: pip install -U {package}; "
            "`fastppt doctor` says what else is missing"
        )
    if isinstance(error, OSError):
        where = "a file or standard output" if error.filename is None else str(error.filename)
        if error.errno in NO_SPACE:
            return f"{where}: cannot be written ({error.strerror}); free some space and start again"
        if error.errno in NO_ACCESS:
            return f"{where}: cannot be read or written ({error.strerror})"
    return None


def _log_fault(error: Exception, folder: Path | None) -> str:
    """Write the traceback to where it can be written; returns the line that says so."""
    command = shlex.join(sys.argv)
    head = f"fastppt {__version__}, Python {platform.python_version()}, {platform.platform()}"
    trace = "".join(traceback.format_exception(error))
    text = printable(scrub(f"{head}\n{command}\n\n{trace}"))
    file = _write_log(text, folder)
    said = f"{type(error).__name__}: {_in_one_line(str(error))}"
    if file is None:
        sys.stderr.write(text)
        return f"a fault of fastppt's own ({said}); its traceback is above"
    return f"a fault of fastppt's own ({said}); its traceback is in {file}"


def _write_log(text: str, folder: Path | None) -> Path | None:
    """Write the log into the output folder, else the system's temporary one; None if in neither."""
    if folder is not None:
        try:
            write_file(folder / ERROR_LOG, text)
            return folder / ERROR_LOG
        except UserError:
            pass  # The temporary folder is left to try.
    try:
        file = Path(tempfile.mkdtemp(prefix="fastppt-")) / ERROR_LOG
        write_file(file, text)
    except (OSError, UserError):
        return None
    return file


def _in_one_line(text: str) -> str:
    return " ".join(text.split())
