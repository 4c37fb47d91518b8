import os
import signal
import sys
import time
from pathlib import Path

import pytest

from bench import ROOT, gpu_tests
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


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_what_a_late_command_started_is_stopped_with_it(handler) -> None:
    start, before = time.monotonic(), signal.signal(signal.SIGINT, handler)
    try:
        code, output = run_within([sys.executable, "-c", PARENT], 3.0, dict(os.environ))
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert code is None and time.monotonic() - start < 30
    deadline = time.monotonic() + 5
    # It was interrupted first, and says so.
    child, *rest = output.split()
    assert "KeyboardInterrupt" in rest
    while is_running(int(child)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(child))


DEAF = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("x" * 100_000, flush=True)
time.sleep(60)
"""


def test_a_late_command_that_heeds_no_interrupt_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "GRACE_SECONDS", 1.0)
    start = time.monotonic()
    code, output = run_within([sys.executable, "-c", DEAF], 3.0, dict(os.environ))
    assert (code, len(output)) == (None, 100_001) and time.monotonic() - start < 30


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


@pytest.fixture
def gpu_tests_in(monkeypatch, tmp_path):
    """Return what runs run_gpu_tests on a project of one test file."""

    def run(body, *, seconds=120.0):
        folder = tmp_path / "tests" / "kernels"
        folder.mkdir(parents=True)
        (tmp_path / "tests" / "conftest.py").write_text("import no_such_trainer_package\n")
        (tmp_path / "pyproject.toml").write_text(
            "[tool.pytest.ini_options]\nmarkers = ['gpu: it', 'slow: it']\n"
            "addopts = ['--import-mode=importlib']\n"
        )
        (folder / "test_it.py").write_text(f"import pytest\nimport time\n\n{body}")
        monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
        monkeypatch.setattr(gpu_tests, "TRAINER_NEEDS", ("no_such_trainer_package",))
        return gpu_tests.run_gpu_tests(seconds)

    return run


MARK = "@pytest.mark.gpu\n"


@pytest.mark.slow
def test_without_the_trainer_only_the_kernels_are_tested(gpu_tests_in):
    tests = gpu_tests_in(f"{MARK}def test_a(): pass\n\ndef test_b(): assert False\n")
    assert tests["stop"] is None, tests["output"]
    assert (tests["folder"], tests["passed"], tests["failed"]) == ("tests/kernels", 1, 0)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        pytest.param(
            f"{MARK}def test_a(): pass\n\n{MARK}def test_b(): assert False\n",
            "red",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            f"{MARK}def test_a(): pytest.skip()\n", "no gpu test passed", marks=pytest.mark.slow
        ),
        pytest.param("def test_a(): pass\n", "no gpu test passed", marks=pytest.mark.slow),
        pytest.param("import no_such_module\n", "red", marks=pytest.mark.slow),
    ],
    ids=["a red test", "all skipped", "none there", "not collected"],
)
def test_gpu_tests_that_show_nothing_stop_the_report(gpu_tests_in, body, why):
    tests = gpu_tests_in(body)
    assert why in tests["stop"]


def test_gpu_tests_that_take_too_long_stop_the_report(gpu_tests_in):
    tests = gpu_tests_in(f"{MARK}def test_a(): time.sleep(60)\n", seconds=3)
    assert "more than 3 s" in tests["stop"]


@pytest.mark.slow
def test_what_tests_found_until_the_time_was_up_is_kept(gpu_tests_in):
    body = f"{MARK}def test_a(): assert 1 == 2\n\n{MARK}def test_b(): time.sleep(300)\n"
    # Long enough for two processes to import torch on a busy machine.
    tests = gpu_tests_in(body, seconds=45)
    assert "more than 45 s" in tests["stop"]
    assert tests["failed"] == 1 and "assert 1 == 2" in tests["output"]


@pytest.mark.slow
def test_a_test_that_spoils_the_gpu_ends_its_process_and_no_other_test(gpu_tests_in, tmp_path):
    pytest.importorskip("xdist")
    spoiled = tmp_path / "spoiled"
    body = (
        "import os\nfrom pathlib import Path\nfrom bench import gpu_plugin\n\n"
        f"spoiled = Path({str(spoiled)!r})\n"
        "gpu_plugin.is_spoiled = lambda device: spoiled.read_text() == str(os.getpid())\n\n"
        f"{MARK}def test_a():\n    spoiled.write_text(str(os.getpid()))\n    assert 1 == 2\n\n"
        f"{MARK}def test_b():\n    assert spoiled.read_text() != str(os.getpid())\n"
    )
    tests = gpu_tests_in(body)
    assert tests["passed"] == 1, tests["output"]
    assert tests["failed"] >= 1 and "assert 1 == 2" in tests["output"]
    assert "red" in tests["stop"]


@pytest.mark.slow
def test_slow_tests_come_last(gpu_tests_in, tmp_path):
    note = tmp_path / "order"
    body = f"NOTE = {str(note)!r}\n\ndef note(name):\n    print(name, file=open(NOTE, 'a'))\n\n"
    body += f"@pytest.mark.slow\n{MARK}def test_a(): note('a')\n\n"
    body += "".join(f"{MARK}def test_{name}(): note('{name}')\n\n" for name in "bc")
    tests = gpu_tests_in(body)
    assert tests["passed"] == 3, tests["output"]
    assert note.read_text().split()[-1] == "a"


@pytest.mark.slow
def test_processes_that_tests_start_find_what_is_not_installed(gpu_tests_in):
    roots = [str(ROOT), str(ROOT / "kernels")]
    body = "import os\n\n"
    body += f"{MARK}def test_a():\n"
    body += f"    assert os.environ['PYTHONPATH'].split(os.pathsep)[:2] == {roots!r}\n"
    tests = gpu_tests_in(body)
    assert tests["passed"] == 1, tests["output"]


def test_kernels_are_tested_first_and_benches_last():
    places = gpu_tests.list_places(ROOT / "tests")
    assert places[0] == "tests/kernels" and places[-1] == "tests/bench"
    files = {file.relative_to(ROOT).parts[1] for file in (ROOT / "tests").rglob("test_*.py")}
    assert {place.removeprefix("tests/") for place in places} == files
