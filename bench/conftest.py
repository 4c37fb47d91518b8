"""What the pytest-benchmark suites share: where they run, what a row says, and the ratios."""

import functools

import pytest
import torch

from bench.machine import copy_bandwidth, describe_machine
from bench.problems import Problem
from bench.rows import Row, time_workload
from bench.suites import ARENA, COMPILE, Suite, list_workload
from bench.ways import Call

RATIO_LINES = pytest.StashKey[list[str]]()
# The timed rounds of a workload whose ways run in rotation.
RATIO_SECONDS = 2.0
ROUNDS = 7


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="of the benchmarks")
    parser.addoption(
        "--with-compile",
        action="store_true",
        help="torch.compile on the CPU too, which takes minutes",
    )


def pytest_configure(config: pytest.Config) -> None:
    # More OpenMP threads than free cores make this many times slower.
    torch.set_num_threads(1)
    config.stash[RATIO_LINES] = []


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    lines = config.stash[RATIO_LINES]
    if lines:
        terminalreporter.section("times of the others over ours, medians of runs in rotation")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    chosen = request.config.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return chosen


@pytest.fixture(scope="session")
def machine(device: str) -> Row:
    return describe_machine(device)


@pytest.fixture(scope="session")
def copy_gb_per_s(device: str) -> float:
    return copy_bandwidth(device)


@pytest.fixture
def run_way(benchmark, device, machine, copy_gb_per_s, request):
    """Return what checks one way of a suite and, if it is right, times it."""

    def run(suite: Suite, name: str, way: str) -> None:
        compile_asked = device == "cuda" or request.config.getoption("--with-compile")
        if way.startswith(COMPILE) and not compile_asked:
            pytest.skip("torch.compile takes minutes on the CPU: pass --with-compile")
        workload = list_workload(name)
        wanted = load_wanted(suite, name, device)
        problem = load_problem(suite, name, way.endswith(ARENA), device)
        made = suite.makers[way](problem)
        error = suite.check(way, problem, made, wanted)
        benchmark.group = f"{suite.name} ({suite.form}), {name}"
        call = finish(made.call, device)
        benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=2)
        gb_per_s = suite.num_bytes(workload) / benchmark.stats.stats.median / 1e9
        benchmark.extra_info |= {
            "tensors": len(workload.shapes),
            "elements": workload.num_elements,
            "bytes": suite.num_bytes(workload),
            "flops": suite.num_flops(workload),
            "gb/s": gb_per_s,
            "copy gb/s": copy_gb_per_s,
            "share of copy": gb_per_s / copy_gb_per_s,
            "error": error,
            "machine": machine,
        }

    return run


@pytest.fixture
def note_ratio(request):
    """Return what keeps the ratio of two rows of a workload for the summary."""

    def note(ours: Row, other: Row, name: str) -> None:
        request.config.stash[RATIO_LINES].append(
            f"{ours['way']}, {name}: {other['times ours']:6.2f}x over {other['way']} "
            f"({ours['p50 ms']:.2f} ms against {other['p50 ms']:.2f} ms)"
        )

    return note


@pytest.fixture
def run_in_rotation(benchmark, device, machine, copy_gb_per_s, note_ratio):
    """Return what times all ways of a suite in rotation and keeps the ratios for the summary."""

    def run(suite: Suite, name: str) -> None:
        benchmark.group = f"{suite.name} ({suite.form}), all ways in rotation"
        rows, refusals = benchmark.pedantic(
            time_workload,
            (suite, list_workload(name)),
            {
                "names": suite.ways(compiled=device == "cuda"),
                "copy_gb_per_s": copy_gb_per_s,
                "seconds": RATIO_SECONDS,
                "device": device,
            },
            rounds=1,
        )
        assert not refusals
        benchmark.extra_info |= {"rows": rows, "machine": machine}
        for row in rows[1:]:
            note_ratio(rows[0], row, name)

    return run


# The ways of one workload run one after the other.
@functools.lru_cache(maxsize=2)
def load_problem(suite: Suite, name: str, arena: bool, device: str) -> Problem:
    kind = {"arena": True} if arena else {}
    return suite.make_problem(list_workload(name).shapes, device, **kind)


@functools.lru_cache(maxsize=1)
def load_wanted(suite: Suite, name: str, device: str) -> object:
    return suite.wanted(load_problem(suite, name, False, device))


def finish(call: Call, device: str) -> Call:
    """Return a call that ends when the device has done its work."""
    if device == "cpu":
        return call

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait
