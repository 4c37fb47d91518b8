import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from bench import ROOT, race_rounds
from bench.race import app, check_engines, check_label, check_work, split
from bench.race_plan import CACHED_PEER, PEER, PRIOR_PEER
from bench.race_results import Round, read_race
from fastppt.errors import UserError

SMALL = (
    *("--model", "mini-sd", "--recipes", "lora-prior,ppt-lora", "--resolution", "32"),
    *("--rank", "2", "--steps", "4", "--sampler-steps", "1", "--class-images", "5"),
    *("--rounds", "2", "--sampling-rounds", "1", "--device", "cpu"),
)


def run_race(*options):
    command = [sys.executable, "-m", "bench.race", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_leaves_a_race_and_prints_it(tmp_path):
    done = run_race(*SMALL, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("cpu-race-mini-sd-")
    report = read_race(path)
    names = [PRIOR_PEER, CACHED_PEER, PEER, "lora-prior, eager", "ppt-lora, eager"]
    assert [entrant.name for entrant in report.entrants] == names
    assert all(len(entrant.rounds) == 2 for entrant in report.entrants)
    assert all(each.start_s > 0 for entrant in report.entrants for each in entrant.rounds)
    assert "bench.race --model mini-sd" in report.command
    assert {each.recipe for each in report.decomposition} == {"lora-prior", "ppt-lora"}
    for words in ("5 class images of 1 sampler steps", f"against {PRIOR_PEER}:", "written:"):
        assert words in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipes", "dco"), "error: --recipes dco: is no recipe for sd"),
        (("--trained-steps", "2"), "error: --trained-steps must be 3 to 200, got 2"),
    ],
)
def test_what_cannot_be_raced_is_refused_in_one_line(tmp_path, options, message):
    done = run_race("--model", "mini-sd", "--output", str(tmp_path), *options)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_what_has_run_is_kept_where_the_next_entrant_fails(monkeypatch, tmp_path):
    def run_job(job, folder, most_seconds=None):
        if job.entrant.kind == "ours":
            raise UserError("lora-prior, eager: failed")
        class_images = {"class_images": 9.0} if job.entrant.prior else {}
        return Round(phases={"training": 1.0, **class_images}, steps=4)

    monkeypatch.setattr(race_rounds, "run_job", run_job)
    done = CliRunner().invoke(app, [*SMALL, "--output", str(tmp_path)])
    assert isinstance(done.exception, UserError)
    (path,) = tmp_path.iterdir()
    assert [each.name for each in read_race(path).entrants] == [PRIOR_PEER, CACHED_PEER, PEER]
    assert f"round 1, {PEER} " in done.stdout


def test_a_label_is_in_the_name_of_the_file(monkeypatch, tmp_path):
    def run_job(job, folder, most_seconds=None):
        class_images = {"class_images": 9.0} if job.entrant.prior else {}
        return Round(phases={"training": 1.0, **class_images}, steps=4)

    monkeypatch.setattr(race_rounds, "run_job", run_job)
    for options in ((), ("--label", "rounds2")):
        CliRunner().invoke(app, [*SMALL, "--output", str(tmp_path), *options])
    plain, labelled = sorted(path.name for path in tmp_path.iterdir())
    assert labelled == plain.replace("cpu-race-mini-sd-", "cpu-race-mini-sd-rounds2-")
    assert read_race(tmp_path / labelled).label == "rounds2"


@pytest.mark.parametrize("label", ["", "../away", "Two", "2-rounds", "two--rounds", "two-"])
def test_a_label_that_makes_no_name_is_refused(label):
    with pytest.raises(UserError, match=f"--label {label}: give small letters"):
        check_label(label)


@pytest.mark.parametrize(
    ("engine", "message"),
    [("fast", "is none; there are eager, compile"), ("graph", "--engines graph: ")],
)
def test_an_engine_that_cannot_be_used_is_refused(engine, message):
    check_engines(["eager"], torch.device("cpu"))
    with pytest.raises(UserError, match=message):
        check_engines(["eager", engine], torch.device("cpu"))


def test_names_of_a_list_may_have_spaces_around_them_and_count_once():
    assert split("apt, dco ,apt,") == ["apt", "dco"]


def test_what_an_earlier_race_has_left_is_not_taken_for_this_ones(tmp_path):
    check_work(None)
    check_work(tmp_path)
    check_work(tmp_path / "new")
    (tmp_path / "round-1-1").mkdir()
    with pytest.raises(UserError, match="is no empty folder; give another one"):
        check_work(tmp_path)
