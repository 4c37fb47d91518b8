import os
import sys
import time
from pathlib import Path

from bench.gpu_tests import count_tests, list_notes, run_within

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_late_command_started_is_stopped_with_it() -> None:
    start = time.monotonic()
    code, output = run_within([sys.executable, "-c", PARENT], 3.0, dict(os.environ))
    assert code is None and time.monotonic() - start < 30
    deadline = time.monotonic() + 5
    while is_running(int(output)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(output))


def test_a_command_in_time_gives_its_exit_code_and_all_that_it_printed() -> None:
    script = "import sys; print('out'); print('err', file=sys.stderr, flush=True); sys.exit(3)"
    code, output = run_within([sys.executable, "-u", "-c", script], 30.0, dict(os.environ))
    assert (code, output) == (3, "out\nerr\n")


NOTING = """
def test_green(record_property):
    record_property("taken gb", 2.5)
    record_property("doctor gb", 2.375)

def test_red(record_property):
    record_property("taken gb", 9.0)
    assert False

def test_silent():
    pass
"""


def test_what_tests_note_is_found_of_green_and_red_ones(tmp_path: Path) -> None:
    (tmp_path / "test_noting.py").write_text(NOTING)
    counts_file = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"--junitxml={counts_file}", "-o", "junit_family=xunit1", f"--rootdir={tmp_path}"]
    code, output = run_within([*command, str(tmp_path)], 60.0, dict(os.environ))
    assert code == 1 and "warning" not in output
    assert count_tests(counts_file) == {"passed": 2, "failed": 1, "skipped": 0}
    assert list_notes(counts_file) == [
        {"test": "test_green", "taken gb": 2.5, "doctor gb": 2.375},
        {"test": "test_red", "taken gb": 9.0},
    ]
    assert list_notes(tmp_path / "never-written.xml") == []
