"""Runs the gpu-marked tests for `bench.gpu`, and counts them."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench import ROOT
from bench.rows import Row

# What tests/conftest.py imports beside torch. Without them only the kernels can be tested.
TRAINER_NEEDS = ("diffusers", "transformers", "pydantic", "tomli_w", "PIL", "safetensors")

# Tests wait for compilers most of the time, and what they put on the GPU is small.
NUM_PROCESSES = 4


def run_gpu_tests(seconds: float) -> Row:
    """Run the gpu-marked tests.

    Returns:
        Their counts; `stop`, why nothing should be measured, or None; and `notes`, the numbers that
        tests have noted, red ones too.
    """
    whole = all(importlib.util.find_spec(name) for name in TRAINER_NEEDS)
    folder = "tests" if whole else "tests/kernels"
    # Without the trainer's packages the conftest.py above the folder cannot be imported.
    cut = [] if whole else [f"--confcutdir={folder}"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        counts_file = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        # The form that has a place for what tests note.
        command += [f"--junitxml={counts_file}", "-o", "junit_family=xunit1", *cut, folder]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(NUM_PROCESSES), "--dist", "load"]
        code, output = run_within(command, seconds, environment)
        counts, notes = count_tests(counts_file), list_notes(counts_file)
    if code is None:
        stop = f"the gpu tests took more than {seconds:.0f} s"
    elif code not in (0, 5) or counts["failed"]:
        stop = f"the gpu tests are red (pytest's exit code is {code})"
    else:
        stop = (
            None if counts["passed"] else "no gpu test passed, so none says that the ops are right"
        )
    seconds_taken = time.monotonic() - start
    found = counts | {"folder": folder, "seconds": seconds_taken, "output": output, "stop": stop}
    return found | {"notes": notes}


def run_within(
    command: list[str], seconds: float, environment: dict[str, str]
) -> tuple[int | None, str]:
    """Run a command at the top of the repository, and stop it with all it started when time is up.

    Returns:
        Its exit code, None if the time was up; and what it and its processes printed until then.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return None, output
    return process.returncode, output


def count_tests(path: Path) -> dict[str, int]:
    """Return how many tests of a JUnit file passed, failed and were skipped."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    if not path.is_file():
        return counts
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped = int(suite.get("skipped", 0))
        counts["failed"] += failed
        counts["skipped"] += skipped
        counts["passed"] += int(suite.get("tests", 0)) - failed - skipped
    return counts


def list_notes(path: Path) -> list[Row]:
    """Return the numbers that tests of a JUnit file noted by `record_property`, a row a test."""
    rows: list[Row] = []
    if path.is_file():
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            noted = {str(each.get("name")): each.get("value") for each in case.iter("property")}
            if noted:
                numbers = {name: float(value or "nan") for name, value in noted.items()}
                rows.append({"test": case.get("name"), **numbers})
    return rows
