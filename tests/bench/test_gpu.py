import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import ROOT, gpu, gpu_targets, step_plans
from bench.gpu import NOT_REACHED, Plan, SpoiledError, measure, read_report
from bench.gpu_targets import list_targets
from bench.rows import write_report
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


def test_a_spoiled_gpu_ends_the_process_and_a_fresh_one_measures_what_is_left(
    monkeypatch, small_workloads, tmp_path
):
    def fail(problem):
        raise RuntimeError("illegal memory access")

    broken = Suite("broken", "raw", 4, {"op": fail}, lambda problem: None, None)
    first, last = Plan(ANCHOR, "SDXL, rank 32"), Plan(OPTIMIZER, "SDXL, rank 32")
    plans = [first, Plan(broken, "SDXL, rank 32"), last]
    monkeypatch.setattr(gpu, "is_spoiled", lambda device: True)
    with pytest.raises(SpoiledError, match=r"broken \(raw\), .*illegal memory access"):
        measure_on_cpu(plans, tmp_path)
    path = tmp_path / "gpu-it-2030-01-02.json"
    _, left = read_report(path)
    why = {entry["plan"]: entry["why"] for entry in left["not measured"]}
    assert why == {str(plans[1]): "RuntimeError: illegal memory access", str(last): NOT_REACHED}
    before = list(left["rows"])
    assert {row["suite"] for row in before} == {"anchor"}
    # The one that spoiled it, and the one that is measured, would do it again.
    report = measure(plans, left, path, time.monotonic() + 60, device="cpu", modes=("eager",))
    assert report["rows"][: len(before)] == before
    assert {row["suite"] for row in report["rows"][len(before) :]} == {"optimizer"}
    assert [entry["plan"] for entry in report["not measured"]] == [str(plans[1])]


def test_a_way_that_died_is_looked_into_though_its_plan_has_rows(
    monkeypatch, small_workloads, tmp_path
):
    plans = [Plan(ANCHOR, "SDXL, rank 32"), Plan(OPTIMIZER, "SDXL, rank 32")]
    refusals = [{"way": "lora, graph", "refused": "the step cannot be captured"}]
    monkeypatch.setattr(Plan, "time", lambda *_: ([], refusals))
    asked = []
    monkeypatch.setattr(gpu, "is_spoiled", lambda device: asked.append(device) or True)
    with pytest.raises(SpoiledError, match="cannot be captured"):
        measure_on_cpu(plans, tmp_path)
    assert asked == ["cpu"]
    report = json.loads((tmp_path / "gpu-it-2030-01-02.json").read_text())
    assert report["refused"] == refusals
    assert [each["plan"] for each in report["not measured"]] == [str(plans[1])]
    # Nobody is left whom a fresh process would help.
    measure_on_cpu(plans[:1], tmp_path)


def test_what_is_measured_is_not_asked_whether_it_spoiled_the_gpu(
    monkeypatch, small_workloads, tmp_path
):
    monkeypatch.setattr(gpu, "is_spoiled", None)
    report, _ = measure_on_cpu([Plan(ANCHOR, "SDXL, rank 32")], tmp_path)
    assert report["rows"] and not report["not measured"]


def test_the_command_goes_on_in_a_fresh_process_with_the_time_that_is_left(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))

    def spoil(*_):
        raise SpoiledError("it")

    red = GREEN | {"stop": "the gpu tests are red", "output": "E  assert 1 == 2"}
    options = ("--seconds", "60", "--group", "race", "--even-if-red")
    run_main(monkeypatch, tmp_path, *options, tests=red, on_measure=spoil)
    (command,) = commands
    path = tmp_path / "red-race-gpu-nvidia-h200-2030-01-02.json"
    assert command[:3] == [sys.executable, "-m", "bench.gpu"]
    assert 40 < float(command[command.index("--seconds") + 1]) <= 60 - gpu.FRESH_SECONDS
    # Neither tests nor bandwidth anew; as red as before, and so is the file of a race.
    begun = {"machine": {"gpu": "it"}, "tests": red, "copy gb/s": 3000.0}
    begun |= {"rows": [{"way": "before"}]}
    write_report(path, begun)
    seen = []
    code, paths = run_main(
        monkeypatch,
        tmp_path,
        *command[3:],
        tests=None,
        on_measure=lambda plans, report: seen.append((plans, dict(report))),
    )
    assert (code, paths) == (1, [path])
    ((plans, report),) = seen
    assert report == begun
    assert {plan.prefix for plan in plans} == {"red-"}


def run_main(
    monkeypatch,
    tmp_path,
    *options,
    on_measure=lambda *_: None,
    tests=GREEN,
    refused=(),
    not_measured=(),
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_gpu_tests", lambda seconds: tests)
    machine = {"gpu": "NVIDIA H200", "date": "2030-01-02"}
    monkeypatch.setattr(gpu, "describe_machine", lambda device: machine)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda device: 4000.0)
    paths = []

    def fake_measure(plans, report, path, end, *, targets):
        paths.append(path)
        on_measure(plans, report)
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


def test_a_plan_of_compile_has_ours_beside_it_and_autograd_is_not_captured():
    names = Plan(OPTIMIZER, "SD1.5, rank 32", compiled=True).names("eager")
    assert names[:2] == ["AnchoredAdamW, arena", "AnchoredAdamW"]
    assert all(name.startswith(COMPILE) for name in names[2:]) and len(names) == 3
    plan = Plan(OPTIMIZER, "SD1.5, rank 32")
    left_out = set(plan.names("eager")) - set(plan.names("captured"))
    assert left_out == {"autograd loop + AdamW(foreach)"}


def test_targets_compare_like_with_like():
    def row(way, milliseconds, share):
        labels = {"suite": "optimizer", "form": "raw", "workload": gpu_targets.MAIN_WORKLOAD}
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
