"""Runs the gpu-marked tests for `bench.gpu`, and counts them."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from pathlib import Path

from bench import ROOT
from bench.rows import Row

# What tests/conftest.py imports beside torch. Without them only the kernels can be tested.
TRAINER_NEEDS = ("diffusers", "transformers", "pydantic", "tomli_w", "PIL", "safetensors")

# Tests wait for compilers most of the time, and what they put on the GPU is small. So many, and no
# more than half of the cores: torch.compile has workers of its own.
NUM_PROCESSES = 8
# Of each process: its default, all cores, is far too many beside one another.
COMPILE_THREADS = 2
# Until pytest has ended its workers and told what it knows, once it is interrupted.
GRACE_SECONDS = 20.0
# Tests that took longest, which are told.
NUM_SLOWEST = 20


def run_gpu_tests(seconds: float) -> Row:
    """Run the gpu-marked tests: the kernels' first, the benches' last.

    Returns:
        Their counts; `stop`, why nothing should be measured, or None; and `notes`, the numbers that
        tests have noted, red ones too.
    """
    whole = all(importlib.util.find_spec(name) for name in TRAINER_NEEDS)
    folder = "tests" if whole else "tests/kernels"
    places = list_places(ROOT / "tests") if whole else [folder]
    # Without the trainer's packages the conftest.py above the folder cannot be imported.
    cut = [] if whole else [f"--confcutdir={folder}"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # The plugin's, and that of what is not installed, for the processes that tests start.
    # Where this file is, whatever the tests are run on.
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(COMPILE_THREADS))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        counts_file = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "bench.gpu_plugin", f"--durations={NUM_SLOWEST}"]
        # The form that has a place for what tests note.
        command += [f"--junitxml={counts_file}", "-o", "junit_family=xunit1", *cut, *places]
        if importlib.util.find_spec("xdist"):
            num_processes = max(1, min(NUM_PROCESSES, (os.cpu_count() or 1) // 2))
            command += ["-n", str(num_processes), "--dist", "load"]
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


def list_places(tests: Path) -> list[str]:
    """Return what of the tests is run, in the order of what a fault in it would spoil."""
    found = [
        place
        for place in sorted(tests.iterdir())
        if place.match("test_*.py") or any(place.glob("**/test_*.py"))
    ]
    order = {"kernels": -1, "bench": 1}
    found.sort(key=lambda place: order.get(place.name, 0))
    return [str(place.relative_to(tests.parent)) for place in found]


def run_within(
    command: list[str], seconds: float, environment: dict[str, str]
) -> tuple[int | None, str]:
    """Run a command at the top of the repository, and stop it with all it started when time is up.

    It is interrupted first, as by Ctrl-C: pytest then tells what it has found.

    Returns:
        Its exit code, None if the time was up; and what it and its processes printed until then.
    """
    # What is started where interrupts are ignored, as in a shell's background, ignores them too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            output, until = None, time.monotonic() + GRACE_SECONDS
            # What it started may hold its output open for longer than it lasts itself.
            while output is None and process.poll() is None and time.monotonic() < until:
                with suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=0.5)
            # It may be gone, and what it started not.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if output is None:
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
