"""Runs that are ended before their end, killed or by a signal, and resumed: nothing is lost.

Ten kills in the fast tests and ninety in the slow ones, half of them at random moments and half at
chosen points: before and after each sync, rename and deletion, and in the middle of each write.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastppt.training import interrupt
from fastppt.training.checkpoint import read_checkpoint
from tests.training.fork_server import PATIENCE, ForkServer

STEPS = 12
NUM_FAST, NUM_ALL = 4, 100
# Of all trials, those that give up what was killed and start over.
OVERWRITES = 10
# Kills of one trial, to draw from.
NUM_KILLS = (1, 1, 2, 3)
# What of a LoRA file's metadata says when it was written.
DATES = re.compile(rb'"(modelspec\.date|ss_training_finished_at)":"[^"]*"')
SIGNALS = ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129))


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as started:
        yield started


@dataclass(frozen=True)
class Reference:
    """A run that nothing has ended."""

    output: Path
    seconds: float
    num_events: int


@pytest.fixture(scope="module")
def reference(
    server: ForkServer, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    place = tmp_path_factory.mktemp("reference")
    log, started = place / "log", time.monotonic()
    code = server.run(*train_command(photos, place / "out"), out=log, kill_at=0)
    assert code == 0, log.read_text()
    seconds = time.monotonic() - started
    return Reference(place / "out", seconds, int(log.with_suffix(".events").read_text()))


def train_command(photos: Path, output: Path, *more: object) -> list[object]:
    """Return a short run's command; every output folder has one name, which files' names hold."""
    return [
        *("train", "--recipe", "ppt-lora", "--model", "mini-sd3", "--photos", photos),
        *("--class-noun", "robot", "--output", output, "--steps", STEPS, "--rank", 2),
        *("--learning-rate", 1e-3, "--device", "cpu", "--log-every", 3, "--seed", 1),
        *("--no-samples", "--checkpoint-every", 2, "--keep-checkpoints", 2, *more),
    ]


def assert_same_run(output: Path, reference: Path) -> None:
    """Byte for byte, but for dates, and for paths and durations in texts."""
    names, expected = (
        sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        for root in (output, reference)
    )
    assert names == expected
    for name in names:
        found, wanted = (output / name).read_bytes(), (reference / name).read_bytes()
        if name.endswith("manifest.json"):
            keys = ("step", "stage", "number", "identity", "files")
            tables = json.loads(found), json.loads(wanted)
            assert all(tables[0][key] == tables[1][key] for key in keys), name
        elif name not in ("config.toml", "README.md"):
            # Not as an assertion that shows the difference of megabytes.
            same = DATES.sub(b"", found) == DATES.sub(b"", wanted)
            assert same, f"{name}: {differences(output / name, reference / name)}"


def differences(found: Path, wanted: Path) -> str:
    """Say in few words how two files that should be the same differ."""
    if found.suffix == ".safetensors":
        tensors, expected = load_file(found), load_file(wanted)
        different = [
            key
            for key in tensors.keys() & expected.keys()
            if not torch.equal(tensors[key], expected[key])
        ]
        return f"keys {sorted(tensors.keys() ^ expected.keys())}, tensors {sorted(different)}"
    lines = found.read_bytes().splitlines(), wanted.read_bytes().splitlines()
    changed = [pair for pair in zip(*lines, strict=False) if pair[0] != pair[1]]
    return f"{len(lines[0])} and {len(lines[1])} lines, the first other one {changed[:1]}"


def assert_checkpoints_are_whole(output: Path) -> None:
    for folder in (output / "checkpoints").glob("step-*"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "trial",
    [
        *range(NUM_FAST),
        *(pytest.param(each, marks=pytest.mark.slow) for each in range(NUM_FAST, NUM_ALL)),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    server: ForkServer, reference: Reference, photos: Path, tmp_path: Path, trial: int
) -> None:
    draw, output = random.Random(trial), tmp_path / "out"
    train = train_command(photos, output)
    command, ends, code = train, [], -signal.SIGKILL
    for number in range(draw.choice(NUM_KILLS)):
        log = tmp_path / f"log-{number}"
        if (trial + number) % 2:
            event = draw.randint(1, reference.num_events)
            code = server.run(*command, out=log, kill_at=event)
            ends.append(f"event {event}: {code}")
        else:
            seconds = draw.uniform(0.0, reference.seconds)
            child = server.start(*command, out=log)
            time.sleep(seconds)
            child.send(signal.SIGKILL)
            code = child.wait()
            ends.append(f"{seconds:.2f} s: {code}")
        assert code in (0, -signal.SIGKILL), log.read_text()
        assert_checkpoints_are_whole(output)
        begun = (output / "config.toml").exists()
        command = ["train", "--resume", output] if begun else train
    if trial % OVERWRITES == OVERWRITES - 1:
        command = [*train, "--overwrite"]
    log = tmp_path / "log-last"
    assert server.run(*command, out=log) == 0, f"{ends}\n{log.read_text()}"
    assert_same_run(output, reference.output)


def resume_command(said: str) -> list[str]:
    """Return the arguments of the command that an ended run has named."""
    command = shlex.split(said.split("go on with it:\n")[1].splitlines()[0])
    return command[command.index("train") :]


@pytest.mark.parametrize(
    ("signum", "code"), [*SIGNALS[:2], pytest.param(*SIGNALS[2], marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_names_the_command_that_goes_on(
    server: ForkServer,
    reference: Reference,
    photos: Path,
    tmp_path: Path,
    signum: signal.Signals,
    code: int,
) -> None:
    child = server.start(*train_command(photos, tmp_path / "out"), out=tmp_path / "log")
    child.wait_until_said(f"step 4/{STEPS}")
    child.send(signum)
    assert child.wait() == code, child.said()
    assert f"\n{signum.name}: {interrupt.NOTED}\n" in child.said()
    assert f"\n{signum.name}: ended after step " in child.said()
    assert "Traceback" not in child.said()
    # The newest checkpoint is of the very step after which the run has ended.
    (ended,) = [line for line in child.said().splitlines() if "ended after step" in line]
    newest = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1]
    assert ended == (
        f"{signum.name}: ended after step {int(newest.name[-6:])} of {STEPS}, saved in {newest}"
    )
    assert_checkpoints_are_whole(tmp_path / "out")
    log = tmp_path / "log-2"
    assert server.run(*resume_command(child.said()), out=log) == 0, log.read_text()
    assert_same_run(tmp_path / "out", reference.output)


def test_a_second_signal_ends_a_run_in_the_middle_of_its_saving(
    server: ForkServer, reference: Reference, photos: Path, tmp_path: Path
) -> None:
    """What was saved before is whole, and the run goes on from there."""
    slow = tmp_path / "slow"
    child = server.start(*train_command(photos, tmp_path / "out"), out=tmp_path / "log", slow=slow)
    child.wait_until_said(f"step 4/{STEPS}")
    slow.touch()
    child.send(signal.SIGINT)
    child.wait_until_said(interrupt.NOTED)
    time.sleep(2 * interrupt.SAME_SIGNAL)
    started = time.monotonic()
    child.send(signal.SIGTERM)
    assert child.wait() == 143
    assert time.monotonic() - started < PATIENCE / 2
    assert "SIGTERM: a second signal, ended at once" in child.said()
    assert_checkpoints_are_whole(tmp_path / "out")
    log = tmp_path / "log-2"
    code = server.run("train", "--resume", tmp_path / "out", out=log)
    assert code == 0, log.read_text()
    assert_same_run(tmp_path / "out", reference.output)


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_signal_before_the_first_step_ends_at_once_and_leaves_nothing(
    server: ForkServer, photos: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    child = server.start(*train_command(photos, tmp_path / "out"), out=tmp_path / "log")
    # The folder is held before anything is loaded.
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "out" / ".lock").exists():
        assert time.monotonic() < deadline
    time.sleep(0.1)
    child.send(signum)
    assert child.wait() == code
    assert child.said().endswith(
        f"{signum.name}: ended before the first step; nothing was trained yet\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_signal_while_pictures_are_drawn_ends_at_the_next_picture(
    server: ForkServer, photos: Path, tmp_path: Path
) -> None:
    """The grid of the resumed run is that of the uninterrupted one."""
    more = (
        "--samples",
        "--sample-every",
        2,
        "--set",
        "samples.steps=3",
        "--steps",
        4,
        "--log-every",
        1,
    )
    whole, ended = (train_command(photos, tmp_path / each / "out", *more) for each in "ab")
    assert server.run(*whole, out=tmp_path / "log-a") == 0
    child = server.start(*ended, out=tmp_path / "log")
    child.wait_until_said("step 2/4")
    time.sleep(0.05)
    child.send(signal.SIGTERM)
    assert child.wait() == 143, child.said()
    output = tmp_path / "b" / "out"
    assert not (output / "samples" / "step-000002.png").exists()
    assert (output / "checkpoints" / "step-000002").is_dir()
    log = tmp_path / "log-2"
    assert server.run(*resume_command(child.said()), out=log) == 0, log.read_text()
    assert_same_run(output, tmp_path / "a" / "out")


def test_a_second_run_into_one_output_is_refused_and_a_kill_frees_it(
    server: ForkServer, photos: Path, tmp_path: Path
) -> None:
    train = train_command(photos, tmp_path / "out", "--steps", 200)
    child = server.start(*train, out=tmp_path / "log")
    child.wait_until_said("step 20/200")
    child.send(signal.SIGSTOP)
    before = {path: path.read_bytes() for path in tmp_path.rglob("out/**/*") if path.is_file()}
    for number, command in enumerate(
        (train, [*train, "--overwrite"], ["train", "--resume", tmp_path / "out"])
    ):
        log = tmp_path / f"refused-{number}"
        assert server.run(*command, out=log) == 2
        assert f"another run (process {child.pid}) is writing there" in log.read_text()
    assert before == {
        path: path.read_bytes() for path in tmp_path.rglob("out/**/*") if path.is_file()
    }
    child.send(signal.SIGKILL)
    child.wait()
    log = tmp_path / "log-2"
    code = server.run(*train_command(photos, tmp_path / "out", "--overwrite"), out=log)
    assert code == 0, log.read_text()


@pytest.mark.slow
def test_ctrl_c_as_typed_and_the_command_that_it_names(
    reference: Reference, photos: Path, tmp_path: Path
) -> None:
    """In fresh processes, the second through a shell."""
    command = [str(each) for each in train_command(photos, tmp_path / "my out" / "out")]
    here = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
    }
    run = subprocess.Popen(
        [sys.executable, "-m", "fastppt", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=here,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("step 4/"):
            break
    run.send_signal(signal.SIGINT)
    _, complaint = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130, complaint
    named = complaint.split("go on with it:\n")[1].strip()
    assert f"train --resume '{tmp_path / 'my out' / 'out'}'" in named
    finished = subprocess.run(named, shell=True, env=here, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert_same_run(tmp_path / "my out" / "out", reference.output)
