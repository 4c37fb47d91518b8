"""What the command line says when a run ends."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from fastppt.console import SafeConsole
from fastppt.machine import peak_host_memory, size_in_words
from fastppt.training.interrupt import Interrupted

if TYPE_CHECKING:
    from fastppt.training.result import RunResult


@contextmanager
def interruptions() -> Iterator[None]:
    """Say how to go on with a run that a signal has ended, and exit with 128 and its number."""
    try:
        yield
    except Interrupted as end:
        console = SafeConsole(stderr=True, soft_wrap=True)
        console.print(str(end), markup=False)
        if end.folder is not None:
            command = f"{_program()} train --resume {shlex.quote(str(end.folder))}"
            console.print(f"go on with it:\n  {command}", markup=False)
        raise typer.Exit(code=end.exit_code) from None


def _program() -> str:
    """Return what a user types to start this program from the same place."""
    if shutil.which("fastppt"):
        return "fastppt"
    script = Path(sys.argv[0])
    return "python -m fastppt" if script.name == "__main__.py" else str(script)


def peaks_in_words(result: RunResult) -> str:
    """Return the most memory that the run has had: of the GPU by phase, of the host in all."""
    host = f"host {size_in_words(peak_host_memory())} (the whole process)"
    if not result.peak_memory:
        return host
    phases = (f"{phase} {size_in_words(peak)}" for phase, peak in result.peak_memory.items())
    most = size_in_words(max(result.peak_memory.values()))
    return f"GPU {most} ({', '.join(phases)}), {host}"


def print_result(result: RunResult, console: Console) -> None:
    """Say where a run's time and memory went, what it wrote, and how to use it."""
    seconds = ", ".join(f"{name} {spent:.1f} s" for name, spent in result.seconds.items())
    console.print(f"time: {seconds}")
    console.print(f"peak memory: {peaks_in_words(result)}")
    if result.num_bad_steps:
        console.print(
            f"note: {result.num_bad_steps} steps were left out, for their loss or gradient was not "
            f"finite; {result.folder.metrics.name} names their photos and timesteps",
            soft_wrap=True,
            markup=False,
        )
    console.print("wrote:")
    for path in result.files:
        console.print(f"  {path}", soft_wrap=True, markup=False)
    root = shlex.quote(str(result.folder.root))
    prompt = shlex.quote(result.trigger_prompt)
    command = f"{_program()} generate --run {root} --prompt {prompt} --count 4"
    console.print("use it:")
    console.print(f"  {command}", soft_wrap=True, markup=False)
