import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, race_gpu, race_rounds
from bench.networks import FAMILY_OF
from bench.race_gpu import (
    ENTRANTS,
    PRIOR_PEER,
    GpuRace,
    choose_entrants,
    list_race_targets,
    list_races,
    make_plan,
)
from bench.race_plan import RacePlan
from bench.race_results import RaceSettings, Round, read_race
from bench.time_limit import OutOfTimeError
from fastppt.errors import UserError

SECONDS = {PRIOR_PEER: 60.0, "ppt-lora, graph": 6.0}
SETTINGS = {
    "model": "sdxl",
    "family": "sdxl",
    "resolution": 1024,
    "batch_size": 1,
    "precision": "bfloat16",
    "rank": 32,
    "steps": 500,
    "class_images": 100,
    "sampler_steps": 50,
    "guidance_scale": 5.0,
    "num_photos": 5,
    "seed": 0,
    "rounds": 1,
    "threads": 1,
}


@pytest.fixture
def track(monkeypatch):
    """Return a clock, and make every entrant's process take 50 of its seconds."""
    clock = SimpleNamespace(now=0.0, failing=None)

    def run_job(job, folder, most_seconds=None):
        if job.entrant.name == clock.failing:
            raise UserError(f"{job.entrant.name}: failed (exit code 1):\nout of memory")
        clock.now += min(50.0, most_seconds)
        if most_seconds < 50:
            return None
        sampling = {"class_images": SECONDS.get(job.entrant.name, 30.0) / 2}
        phases = {"training": SECONDS.get(job.entrant.name, 30.0) / 2}
        phases |= sampling if job.entrant.prior else {}
        extrapolated = [name for name in phases if job.trained_steps < job.settings.steps]
        return Round(phases=phases, steps=500, extrapolated=extrapolated)

    def plan(race, work, device):
        return RacePlan(
            settings=RaceSettings(**SETTINGS),
            entrants=choose_entrants(race.entrants, "sdxl"),
            model="model",
            device=device,
            photos=work,
            class_noun="robot",
            work=work,
            sampled_images=race.sampled_images,
            trained_steps=race.trained_steps,
        )

    time = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(race_gpu, "time", time)
    monkeypatch.setattr(race_rounds, "time", time)
    monkeypatch.setattr(race_rounds, "run_job", run_job)
    monkeypatch.setattr(race_gpu, "make_plan", plan)
    return clock


def run(race, seconds):
    return race.time("jobs", "cpu", 1.0, seconds)


def test_a_race_leaves_a_file_and_a_row_that_names_it(track, tmp_path, capsys):
    race = GpuRace("sdxl", tmp_path)
    rows, refusals = run(race, 1000)
    (row,) = rows
    assert refusals == [] and row["left out"] == []
    assert row["times as fast"]["total"] == 20.0
    report = read_race(tmp_path / row["file"])
    assert row["file"].startswith("cpu-race-sdxl-")
    assert [each.name for each in report.entrants] == list(ENTRANTS)
    # Of a part of the work: each entrant says so.
    assert all("training" in each.rounds[0].extrapolated for each in report.entrants)
    race.show(rows)
    printed = capsys.readouterr().out
    assert "20.00x as fast" in printed
    assert "extrapolated from 8 of 100 class images and 50 of 500 steps" in printed


@pytest.mark.parametrize(("seconds", "num_entrants"), [(60, 1), (160, 3), (152, 2)])
def test_entrants_that_no_longer_fit_are_left_out_and_named(track, tmp_path, seconds, num_entrants):
    rows, _ = run(GpuRace("sdxl", tmp_path), seconds)
    assert rows[0]["left out"] == list(ENTRANTS[num_entrants:])
    assert len(read_race(tmp_path / rows[0]["file"]).entrants) == num_entrants


def test_a_race_without_an_entrant_is_out_of_time(track, tmp_path):
    with pytest.raises(OutOfTimeError):
        run(GpuRace("sdxl", tmp_path), 40)
    assert list(tmp_path.iterdir()) == []


def test_an_entrant_that_fails_ends_the_race_and_the_others_are_kept(track, tmp_path):
    track.failing = ENTRANTS[2]
    rows, (refusal,) = run(GpuRace("sdxl", tmp_path), 1000)
    assert "out of memory" in refusal["refused"]
    assert len(read_race(tmp_path / rows[0]["file"]).entrants) == 2


def test_races_are_measured_among_the_plans_of_the_one_command(track, tmp_path):
    races = [GpuRace("sdxl", tmp_path), GpuRace("sd15", tmp_path, most_seconds=40)]
    path = tmp_path / "race-gpu-it-2030-01-02.json"
    end = race_rounds.time.monotonic() + 10**9
    report = gpu.measure(
        races, {"copy gb/s": 1.0}, path, end, device="cpu", targets=list_race_targets
    )
    assert [row["model"] for row in report["rows"]] == ["sdxl"]
    (entry,) = report["not measured"]
    assert entry["plan"] == str(races[1]) and not entry["failed"]
    assert [target["met"] for target in report["targets"]] == [True, True]
    assert json.loads(path.read_text())["rows"] == report["rows"]


def test_targets_are_of_sdxl_in_the_size_that_they_speak_of():
    row = {"suite": "race", "model": "sdxl", "steps": 500, "class images": 100}
    row |= {"times as fast": {"total": 12.0, "class images cached": 2.5}}
    targets = list_race_targets([row])
    assert [target["met"] for target in targets] == [True, False]
    assert all("extrapolated from 50 steps" in target["what"] for target in targets)
    for other in ({"model": "sd15"}, {"steps": 200}, {"class images": 50}):
        found = list_race_targets([row | other])
        assert [target["measured"] for target in found] == [None, None]


def test_every_entrant_is_one_of_the_race_in_each_family():
    races = list_races(Path())
    assert [race.model for race in races] == ["sdxl", "sd15", "sd3-medium"]
    for race in races:
        found = choose_entrants(race.entrants, FAMILY_OF[race.model])
        assert [each.name for each in found] == list(race.entrants)
        assert race.least_seconds < race.most_seconds
        assert found[0].name == PRIOR_PEER and race.ours == "ppt-lora, graph"
    # All of it fits into the nine minutes, the tests aside.
    assert sum(race.most_seconds for race in races) <= gpu.TOTAL_SECONDS


def run_command(monkeypatch, tmp_path, *options, stop=None):
    found = []
    tests = {"folder": "tests", "passed": 3, "failed": 0, "output": "", "stop": stop}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_gpu_tests", lambda seconds: tests)
    machine = {"gpu": "NVIDIA H200", "date": "2030-01-02"}
    monkeypatch.setattr(gpu, "describe_machine", lambda device: machine)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda device: 4000.0)

    def measure(plans, report, path, end, *, targets):
        found.extend([plans, path])
        return report | {"rows": [], "targets": targets([]), "refused": [], "not measured": []}

    monkeypatch.setattr(gpu, "measure", measure)
    return gpu.main(["--out", str(tmp_path), "--group", "race", *options]), found


def test_the_group_has_a_file_that_no_table_is_made_from(monkeypatch, tmp_path):
    code, (plans, path) = run_command(monkeypatch, tmp_path)
    assert code == 0
    assert path.name == "race-gpu-nvidia-h200-2030-01-02.json"
    assert {plan.folder for plan in plans} == {tmp_path}
    assert {plan.prefix for plan in plans} == {""}


def test_races_after_red_tests_are_named_so(monkeypatch, tmp_path):
    code, (plans, path) = run_command(monkeypatch, tmp_path, "--even-if-red", stop="red")
    assert code == 1
    assert path.name.startswith("red-race-gpu-")
    assert {plan.prefix for plan in plans} == {"red-"}


def test_a_race_without_the_trainer_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "TRAINER_NEEDS", ("no_such_trainer_package",))
    assert run_command(monkeypatch, tmp_path) == (2, [])
    assert "pip install -e '.[test]'" in capsys.readouterr().err


SMALL = GpuRace(
    "mini-sd",
    Path(),
    entrants=(PRIOR_PEER, "ppt-lora, eager"),
    steps=6,
    trained_steps=3,
    class_images=12,
    sampled_images=8,
    sampler_steps=2,
)


@pytest.mark.slow
def test_a_race_of_small_models_runs_as_one_of_large_ones(tmp_path):
    (row,), refusals = run(dataclasses.replace(SMALL, folder=tmp_path), 600)
    assert refusals == [] and row["left out"] == []
    report = read_race(tmp_path / row["file"])
    peer, ours = report.entrants
    assert (peer.rounds[0].steps, ours.rounds[0].steps) == (6, 6)
    assert {"class_images", "training"} <= set(peer.rounds[0].extrapolated)
    assert ours.rounds[0].extrapolated == ["training"]


@pytest.mark.slow
def test_a_plan_has_the_settings_of_the_model(tmp_path):
    plan = make_plan(SMALL, tmp_path, "cpu")
    assert (plan.settings.family, plan.settings.precision) == ("sd", "float32")
    assert (plan.settings.num_photos, plan.settings.threads) == (5, 1)
    assert (plan.sampled_images, plan.trained_steps) == (8, 3)
    assert Path(plan.model, "model_index.json").is_file()


@pytest.mark.gpu
def test_a_race_on_a_gpu_replays_a_graph(tmp_path):
    race = dataclasses.replace(SMALL, folder=tmp_path, entrants=("ppt-lora, graph",))
    (row,), refusals = race.time("jobs", "cuda", 1.0, 300)
    assert refusals == []
    (entrant,) = read_race(tmp_path / row["file"]).entrants
    assert entrant.engine == "graph"
    assert entrant.rounds[0].memory_kind == "allocated"
