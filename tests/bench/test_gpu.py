import json
import subprocess
import sys
import time

import pytest
import torch

from bench import ROOT, gpu, gpu_tests, step_plans
from bench.gpu import Plan, list_targets, measure
from bench.step_plans import StepPlan
from bench.step_ways import BASE_PASS, MODELS, NETWORK, PEERS, RECIPES
from bench.suites import ANCHOR, COMPILE, OPTIMIZER, Suite, Workload
from bench.tables import write_tables
from bench.ways import Way

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
SMALL = Workload("small", [(3, 63), (130, 3)])
GREEN = {"folder": "tests", "passed": 3, "failed": 0, "skipped": 1, "seconds": 1.0}
GREEN |= {"output": "", "stop": None}


@pytest.fixture
def small_workloads(monkeypatch):
    monkeypatch.setattr(gpu, "list_workload", lambda name: SMALL)
    monkeypatch.setattr(gpu, "SECONDS", 0.01)


def measure_on_cpu(plans, tmp_path, *, seconds=60.0, modes=("eager",)):
    path = tmp_path / "gpu-it-2030-01-02.json"
    end = time.monotonic() + seconds
    start = {"copy gb/s": 10.0, "machine": {"gpu": "it"}}
    report = measure(plans, start, path, end, device="cpu", modes=modes)
    return report, json.loads(path.read_text())


@pytest.mark.slow
@without_gpu
def test_without_a_gpu_the_command_says_so_and_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_command_imports_nothing_of_the_trainer():
    code = (
        "import sys; import bench.gpu, bench.tables, bench.cpu; "
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('fastppt', 'diffusers', 'transformers', 'pydantic', 'pytest')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_report_holds_rows_targets_and_what_was_refused(small_workloads, tmp_path):
    plans = [Plan(OPTIMIZER, "SDXL, rank 32"), Plan(ANCHOR, "SDXL, rank 32")]
    report, written = measure_on_cpu(plans, tmp_path)
    assert written.keys() == report.keys()
    assert {row["suite"] for row in written["rows"]} == {"optimizer", "anchor"}
    assert written["refused"] == written["not measured"] == []
    # Of the ops, and of steps.
    assert [target["measured"] for target in written["targets"]] == [None] * (6 + 7)


def test_what_no_longer_fits_is_listed_as_not_measured(small_workloads, tmp_path):
    _, written = measure_on_cpu([Plan(ANCHOR, "SDXL, rank 32")], tmp_path, seconds=5)
    assert written["rows"] == []
    (entry,) = written["not measured"]
    assert entry["plan"] == "anchor (raw), SDXL, rank 32"
    assert entry["why"] == "the time was up"
    assert not entry["failed"]


def test_a_workload_past_its_time_is_stopped(monkeypatch, small_workloads, tmp_path):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    slow = Suite("anchor", "raw", 4, {"op": lambda p: Way(lambda: time.sleep(30))}, None, None)
    object.__setattr__(slow, "wanted", lambda problem: None)
    start = time.monotonic()
    report, _ = measure_on_cpu([Plan(slow, "SDXL, rank 32")], tmp_path, seconds=0.3)
    assert time.monotonic() - start < 10
    assert [e["why"] for e in report["not measured"]] == ["OutOfTimeError: the time was up"]
    assert not report["not measured"][0]["failed"]


def test_a_failing_workload_is_named_and_the_next_is_measured(
    monkeypatch, small_workloads, tmp_path
):
    def fail(problem):
        raise RuntimeError("illegal memory access\nmore")

    broken = Suite("broken", "raw", 4, {"op": fail}, lambda problem: None, None)
    plans = [Plan(broken, "SDXL, rank 32"), Plan(ANCHOR, "SDXL, rank 32")]
    report, _ = measure_on_cpu(plans, tmp_path)
    (entry,) = report["not measured"]
    assert entry["why"] == "RuntimeError: illegal memory access"
    assert entry["failed"]
    assert {row["suite"] for row in report["rows"]} == {"anchor"}


def run_main(monkeypatch, tmp_path, *options, tests=GREEN, refused=(), not_measured=()):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_gpu_tests", lambda seconds: tests)
    machine = {"gpu": "NVIDIA H200", "date": "2030-01-02"}
    monkeypatch.setattr(gpu, "describe_machine", lambda device: machine)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda device: 4000.0)
    paths = []

    def fake_measure(plans, report, path, end, *, targets):
        paths.append(path)
        results = {"rows": [], "targets": targets([]), "refused": list(refused)}
        return report | results | {"not measured": list(not_measured)}

    monkeypatch.setattr(gpu, "measure", fake_measure)
    return gpu.main(["--out", str(tmp_path), *options]), paths


def test_the_file_is_named_after_gpu_and_date(monkeypatch, tmp_path):
    code, paths = run_main(monkeypatch, tmp_path)
    assert code == 0
    assert paths == [tmp_path / "gpu-nvidia-h200-2030-01-02.json"]


def test_a_red_test_stops_the_report(monkeypatch, tmp_path, capsys):
    red = GREEN | {"failed": 1, "stop": "the gpu tests are red", "output": "E  assert 1 == 2"}
    code, paths = run_main(monkeypatch, tmp_path, tests=red)
    assert (code, paths) == (1, [])
    shown = capsys.readouterr().out
    assert "assert 1 == 2" in shown and "nothing is measured" in shown
    (path,) = tmp_path.iterdir()
    assert path.name == "red-gpu-nvidia-h200-2030-01-02.json"
    assert json.loads(path.read_text())["tests"] == red


def test_a_red_report_is_measured_when_asked_for_and_no_table_is_made_from_it(
    monkeypatch, tmp_path
):
    unmade = write_tables(tmp_path)
    red = GREEN | {"stop": "the gpu tests took more than 3 s"}
    code, (path,) = run_main(monkeypatch, tmp_path, "--even-if-red", tests=red)
    assert code == 1
    assert path == tmp_path / "red-gpu-nvidia-h200-2030-01-02.json"
    assert path.exists() and write_tables(tmp_path) == unmade


def test_what_cannot_be_imported_is_known_before_the_tests_run(monkeypatch, tmp_path):
    def fail():
        raise ImportError("no such name")

    monkeypatch.setattr(gpu, "list_plans", fail)
    with pytest.raises(ImportError):
        run_main(monkeypatch, tmp_path, tests=None)


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ({"refused": [{"way": "AnchoredAdamW"}]}, 1),
        ({"not_measured": [{"plan": "it", "failed": True}]}, 1),
        ({"not_measured": [{"plan": "it", "failed": False}]}, 0),
    ],
)
def test_a_refusal_or_a_failure_makes_the_exit_code_1(monkeypatch, tmp_path, what, code):
    assert run_main(monkeypatch, tmp_path, **what)[0] == code


@pytest.fixture
def gpu_tests_in(monkeypatch, tmp_path):
    """Return what runs run_gpu_tests on a project of one test file."""

    def run(body, *, needs=(), seconds=120.0):
        folder = tmp_path / "tests" / "kernels"
        folder.mkdir(parents=True)
        (tmp_path / "tests" / "conftest.py").write_text("import no_such_trainer_package\n")
        (tmp_path / "pyproject.toml").write_text(
            "[tool.pytest.ini_options]\nmarkers = ['gpu: it']\n"
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


def test_a_plan_of_compile_has_ours_beside_it_and_autograd_is_not_captured():
    names = Plan(OPTIMIZER, "SD1.5, rank 32", compiled=True).names("eager")
    assert names[:2] == ["AnchoredAdamW, arena", "AnchoredAdamW"]
    assert all(name.startswith(COMPILE) for name in names[2:]) and len(names) == 3
    plan = Plan(OPTIMIZER, "SD1.5, rank 32")
    left_out = set(plan.names("eager")) - set(plan.names("captured"))
    assert left_out == {"autograd loop + AdamW(foreach)"}


def test_targets_compare_like_with_like():
    def row(way, milliseconds, share):
        labels = {"suite": "optimizer", "form": "raw", "workload": gpu.MAIN_WORKLOAD}
        values = {"share of copy": share, "times ours": milliseconds / 0.5}
        return labels | {"mode": "captured", "way": way} | values

    targets = list_targets(
        [
            row("AnchoredAdamW, arena", 0.5, 0.9),
            row("AnchoredAdamW", 1.0, 0.7),
            row("foreach + AdamW(fused), arena", 0.8, 0.6),
            row("foreach + AdamW(fused)", 1.2, 0.5),
        ]
    )
    assert [t["measured"] for t in targets[:4]] == pytest.approx([0.9, 1.6, 0.7, 1.2])
    assert [t["met"] for t in targets[:4]] == [True, True, False, False]


def test_all_plans_name_workloads_that_exist():
    assert len({str(plan) for plan in gpu.PLANS}) == len(gpu.PLANS)
    for plan in gpu.PLANS:
        assert gpu.list_workload(plan.workload).name == plan.workload
        assert plan.names("captured")


def test_steps_are_planned_once_and_after_the_most_wanted_kernels():
    plans = gpu.list_plans()
    assert len({str(plan) for plan in plans}) == len(plans)
    assert [isinstance(plan, StepPlan) for plan in plans[:3]] == [False, False, True]
    for plan in plans:
        if isinstance(plan, StepPlan):
            assert plan.model in MODELS
            assert {recipe for recipe, _ in plan.ways} <= {*RECIPES, *PEERS, NETWORK, BASE_PASS}
            assert gpu.LEAST_SECONDS < plan.least_seconds < plan.most_seconds


def test_without_the_trainer_there_are_no_steps_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TRAINER_NEEDS", ("no_such_trainer_package",))
    assert gpu.list_plans() == gpu.PLANS
    assert "steps and adapters are not measured" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_are_measured_among_the_rest_and_given_up_after_their_own_time(
    monkeypatch, small_workloads, tmp_path
):
    monkeypatch.setattr(step_plans, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(step_plans, "SECONDS", 0.01)
    ways = (("lora", "eager"), ("base pass alone", "eager"))
    late = StepPlan("mini-sd", "late", ways, most_seconds=0.1)
    plans = [Plan(ANCHOR, "SDXL, rank 32"), StepPlan("mini-sd", "eager", ways), late]
    report, written = measure_on_cpu(plans, tmp_path)
    assert {row["suite"] for row in written["rows"]} == {"anchor", "step"}
    assert [row["way"] for row in written["rows"][-2:]] == [", ".join(way) for way in ways]
    (entry,) = report["not measured"]
    assert (entry["plan"], entry["why"]) == (str(late), "OutOfTimeError: the time was up")
