import os
import sys
import time

from bench.gpu_tests import run_within

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
