"""What becomes of an exception: a message and exit code 2, or a log and exit code 1."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from fastppt import faults
from fastppt.cli import app
from fastppt.console import HIDDEN, SafeConsole, printable, scrub
from fastppt.errors import UserError
from fastppt.faults import user_errors

TOKEN = "hf_" + "aB3" * 12


def exit_code(error: BaseException, folder: Path | None = None) -> int:
    with pytest.raises(typer.Exit) as caught, user_errors(folder):
        raise error
    return caught.value.exit_code


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("photos: none"), "error: photos: none"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "--gradient-checkpointing"),
        (MemoryError(), "this machine's memory is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), "memory is full"),
        (ModuleNotFoundError("x", name="diffusers.new"), "pip install -U diffusers"),
        (OSError(errno.ENOSPC, "No space left on device", "/o/a"), "/o/a: cannot be written"),
        (
            OSError(errno.EFBIG, "File too large"),
            "a file or standard output: cannot be written (File too large)",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/o"), "/o: cannot be read or"),
    ],
)
def test_what_the_user_can_mend_is_a_message_and_exits_with_2(
    error: Exception, message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert exit_code(error, tmp_path) == 2
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), ModuleNotFoundError("x", name="fastppt.nothing"), OSError()]
)
def test_a_fault_is_one_line_and_a_log_in_the_output_folder(
    error: Exception, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert exit_code(error, tmp_path / "out") == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "out" / "error.log") in said
    log = (tmp_path / "out" / "error.log").read_text()
    assert "Traceback" in log and type(error).__name__ in log and sys.argv[0] in log
    assert os.listdir(tmp_path / "out") == ["error.log"]


def test_a_log_that_does_not_fit_the_output_goes_to_the_temporary_folder(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "temporary").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(faults.tempfile, "tempdir", str(tmp_path / "temporary"))
        assert exit_code(ZeroDivisionError("x"), tmp_path / "file") == 1
        (log,) = (tmp_path / "temporary").glob("*/error.log")
        patch.setattr(faults.tempfile, "tempdir", str(tmp_path / "file"))
        assert exit_code(ZeroDivisionError("y")) == 1
    assert log.parent.stat().st_mode & 0o077 == 0
    said = capfd.readouterr().err
    assert f"(ZeroDivisionError: x); its traceback is in {log}\n" in said
    assert "Traceback" in said and said.endswith("(ZeroDivisionError: y); its traceback is above\n")


def test_exits_and_interruptions_go_through() -> None:
    assert exit_code(typer.Exit(7)) == 7
    with pytest.raises(KeyboardInterrupt), user_errors():
        raise KeyboardInterrupt


def test_tokens_of_the_hub_are_in_no_message_and_no_log(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-old-secret")
    secrets = f"{TOKEN} https://me:{TOKEN}@hub/x an-old-secret ?token=abc Bearer xyz"
    assert exit_code(ValueError(secrets), tmp_path) == 1
    assert exit_code(UserError(secrets)) == 2
    for text in (capfd.readouterr().err, (tmp_path / "error.log").read_text()):
        assert HIDDEN in text
        for secret in (TOKEN, "me:", "an-old-secret", "abc", "xyz"):
            assert secret not in text
    assert scrub("hf_diffusion/models and a@b") == "hf_diffusion/models and a@b"


def test_what_a_terminal_would_obey_is_shown_as_escapes(capfd: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J\x9b31m\u202egnp\udcff \tü\n"
    assert printable(name) == "a\\x1b[2J\\x9b31m\\u202egnp\\udcff \tü\n"
    assert exit_code(UserError(name)) == 2
    SafeConsole(force_terminal=True).print(f"[red]x[/red] {name}")
    said = capfd.readouterr()
    assert "\x1b[2J" not in said.out + said.err and "\\x1b" in said.err
    assert "\x1b[31mx" in said.out


@pytest.mark.parametrize(
    ("body", "code"),
    [("raise KeyboardInterrupt", 130), ("print('x' * 100_000)", 141), ("raise ValueError", 1)],
)
def test_commands_outside_of_training_end_in_order(body: str, code: int, tmp_path: Path) -> None:
    """With nobody who reads what is printed."""
    script = f"""
import os, sys
from fastppt import cli
def body(*args, **kw):
    {body}
cli.build_config = body
sys.argv = ["fastppt", "config"]
cli.main()
"""
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, env=environment
    )
    os.close(writer)
    said = process.stderr.decode()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert ("error.log" in said) == (code == 1)


@pytest.mark.parametrize("module", ["typer", "fastppt.outputs.convert"])
def test_ctrl_c_while_something_is_imported_is_no_traceback(module: str) -> None:
    script = f"""
import signal, sys
from fastppt.__main__ import main
class Finder:
    def find_spec(self, name, *_):
        if name == "{module}":
            signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
sys.argv = ["fastppt", "convert", "x", "--to", "peft"]
main()
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 130
    said = "" if module == "typer" else "SIGINT: ended before all was done"
    assert process.stderr.strip() == said


@pytest.mark.parametrize("swallow", [False, True])
def test_ctrl_c_while_a_command_works_is_one_line(
    swallow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a library swallows the exception, and fails of what it then lacks."""

    def work(*_: object) -> Path:
        with suppress(BaseException) if swallow else nullcontext():
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("half done")

    monkeypatch.setattr("fastppt.outputs.convert.convert", work)
    # Tests that run in the background of a shell have SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = CliRunner().invoke(app, ["convert", "x", "--to", "peft"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr == "SIGINT: ended before all was done\n"


@pytest.mark.parametrize("command", ["config", "recipes", "--help", "--version"])
def test_a_full_disk_under_standard_output_is_a_message(command: str) -> None:
    script = f"""
import sys
from fastppt.__main__ import main
sys.argv = ["fastppt", "{command}"]
main()
"""
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, check=False
        )
    said = process.stderr.decode()
    assert process.returncode == 2 and said.count("\n") == 1
    assert "standard output: cannot be written (No space left on device)" in said


def test_nothing_is_highlighted(capfd: pytest.CaptureFixture[str]) -> None:
    """That would take minutes for a word of some 100,000 letters."""
    SafeConsole(force_terminal=True).print("1 'x' /a/b", soft_wrap=True)
    assert capfd.readouterr().out == "1 'x' /a/b\n"


def test_a_run_goes_on_when_its_reader_goes_away() -> None:
    script = """
import sys
from fastppt.console import SafeConsole
console = SafeConsole()
for _ in range(100):
    console.print("x" * 1000)
print("alive", file=sys.stderr)
"""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert process.returncode == 0 and process.stderr == b"alive\n"
