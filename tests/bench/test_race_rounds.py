import sys
import time
from pathlib import Path

import pytest
import torch

from bench import race_rounds
from bench.race_plan import CACHED_PEER, PEER, PRIOR_PEER, RacePlan, list_entrants
from bench.race_ratios import make_report
from bench.race_results import RaceSettings, Round, StepTimes
from bench.race_rounds import prepare_model, run_job, run_race
from bench.race_words import describe_race, describe_round
from fastppt.errors import UserError

SETTINGS = RaceSettings(
    model="mini-sd",
    family="sd",
    resolution=32,
    batch_size=1,
    precision="float32",
    rank=4,
    steps=5,
    class_images=4,
    sampler_steps=2,
    guidance_scale=4.0,
    num_photos=5,
    seed=0,
    rounds=2,
    threads=1,
)
PRIOR, PPT = "lora-prior, eager", "ppt-lora, eager"


@pytest.fixture
def make_plan(tmp_path):
    def make(**settings):
        return RacePlan(
            settings=SETTINGS.model_copy(update=settings),
            entrants=list_entrants(["lora-prior", "ppt-lora"], ["eager"], "sd"),
            model="mini-sd",
            device="cpu",
            photos=tmp_path,
            class_noun="robot",
            work=tmp_path,
        )

    return make


@pytest.fixture
def jobs(monkeypatch):
    """Jobs that take no time: where class images are new they take 10 s more each time."""
    ran, there = [], set()

    def fake(job, folder, most_seconds=None):
        ran.append(job)
        phases = {"training": 2.0}
        if job.entrant.prior:
            phases["class_images"] = 0.5 if job.class_images in there else 10.0 * len(ran)
            there.add(job.class_images)
        times = StepTimes(p20=1.0, p50=1.0, p80=1.0)
        return Round(phases=phases, steps=5, step_s=times, start_s=6.0)

    monkeypatch.setattr(race_rounds, "run_job", fake)
    return ran


def class_seconds(entrants):
    return {
        each.name: [(r.phases["class_images"], r.taken_from) for r in each.rounds]
        for each in entrants
        if each.prior
    }


def test_every_other_round_runs_backwards(jobs, make_plan):
    plan = make_plan(rounds=3)
    told, found = zip(*run_race(plan), strict=True)
    entrants = found[-1]
    names = [entrant.name for entrant in plan.entrants]
    order = [job.entrant.name for job in jobs]
    assert order == [*names, *names[::-1], *names]
    assert [number for number, *_ in told] == [0] * 5 + [1] * 5 + [2] * 5
    assert [entrant.name for entrant in entrants] == names
    assert all(len(entrant.rounds) == 3 for entrant in entrants)


def test_two_forms_of_one_job_share_class_images_and_the_first_of_a_round_samples_them(
    jobs, make_plan
):
    *_, (_, entrants) = run_race(make_plan())
    found = class_seconds(entrants)
    name = "class_images"
    assert found[PRIOR_PEER] == [(10.0, {}), (90.0, {name: CACHED_PEER})]
    assert found[CACHED_PEER] == [(10.0, {name: PRIOR_PEER}), (90.0, {})]
    assert found[PRIOR] == [(40.0, {}), (70.0, {})]
    folders = {job.class_images for job in jobs if job.entrant.prior}
    assert len(folders) == 4


def test_rounds_that_do_not_sample_take_the_last_time_that_it_took(jobs, make_plan):
    *_, (_, entrants) = run_race(make_plan(rounds=3, sampling_rounds=1))
    found = class_seconds(entrants)
    assert [seconds for seconds, _ in found[PRIOR]] == [40.0] * 3
    assert [by for _, by in found[PRIOR]] == [{}, *[{"class_images": PRIOR}] * 2]
    assert [seconds for seconds, _ in found[CACHED_PEER]] == [10.0] * 3


def test_what_was_extrapolated_where_it_was_sampled_is_so_where_it_is_shared():
    sampled = Round(
        phases={"training": 1.0, "class_images": 70.0},
        steps=5,
        extrapolated=["class_images"],
        energy_joules={"class_images": 9.0},
        batch_s=StepTimes(p20=1.0, p50=2.0, p80=3.0),
    )
    found = Round(
        phases={"training": 1.0, "class_images": 0.1},
        steps=5,
        extrapolated=["training"],
        energy_joules={"class_images": 0.2, "training": 3.0},
    )
    shared = race_rounds.take_class_images(found, sampled, "peer")
    assert shared.phases == {"class_images": 70.0, "training": 1.0}
    assert set(shared.extrapolated) == {"class_images", "training"}
    assert shared.energy_joules == {"class_images": 9.0, "training": 3.0}
    assert shared.batch_s == sampled.batch_s


def test_words_mark_what_is_extrapolated(jobs, make_plan):
    plan = make_plan(rounds=1)
    *_, (_, entrants) = run_race(plan)
    peer = entrants[0].rounds[0].model_copy(update={"extrapolated": ["class_images"]})
    entrants[0] = entrants[0].model_copy(update={"rounds": [peer]})
    text = describe_race(make_report({}, plan.settings, entrants))
    (line,) = [line for line in text.splitlines() if line.startswith(f"{PRIOR_PEER} ")]
    assert "10.00*" in line and line.endswith("12.00*")
    assert "total 6.00* (6.00 to 6.00), class images cached 1.00 (" in text
    assert "in one round" in text
    assert describe_round(0, plan.entrants[0], peer).endswith("12.00 s (extrapolated)")


def test_each_entrant_leaves_what_there_is_so_far_in_the_order_of_the_first_round(jobs, make_plan):
    counts = [[len(each.rounds) for each in entrants] for _, entrants in run_race(make_plan())]
    first = [[1] * number for number in range(1, 6)]
    assert counts == [*first, *([1] * (5 - number) + [2] * number for number in range(1, 6))]


def test_after_the_time_is_up_no_entrant_is_started(jobs, make_plan):
    assert list(run_race(make_plan(), until=time.monotonic() - 1)) == []
    assert jobs == []


def test_what_the_jobs_write_is_deleted_unless_it_is_kept(monkeypatch, make_plan, tmp_path):
    def write(job, folder, most_seconds=None):
        job.output.mkdir(parents=True)
        return Round(phases={"training": 1.0, "class_images": 1.0}, steps=5)

    monkeypatch.setattr(race_rounds, "run_job", write)
    list(run_race(make_plan(rounds=1)))
    assert list(tmp_path.rglob("ppt-lora*")) == []


def test_words_say_what_was_given_and_how_many_times_as_fast(jobs, make_plan):
    plan = make_plan(sampling_rounds=1)
    *_, (_, entrants) = run_race(plan)
    machine = {"cpu": "a CPU", "torch": "2.13", "triton": "3.7", "diffusers": "0.42"}
    text = describe_race(make_report(machine, plan.settings, entrants))
    for words in (
        "4 class images of 2 sampler steps, guidance 4",
        "32 px, batch 1, float32, rank 4, 5 steps",
        "torch 2.13, triton 3.7, diffusers 0.42",
        f"against {PRIOR_PEER}:",
        "total 6.00 (6.00 to 6.00), class images cached 1.00 (1.00 to 1.00), step 1.00",
        "10.00+",
    ):
        assert words in text
    line = describe_round(0, plan.entrants[2], entrants[2].rounds[0])
    assert PEER in line and line.endswith("2.00 s")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Stand a shell script in for Python."""

    def put(text):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def test_a_job_runs_in_a_process_with_its_threads_and_without_the_hub(script, make_plan, tmp_path):
    took = '{"phases": {"training": 1}, "steps": 5}'
    script(f"echo $OMP_NUM_THREADS $HF_HUB_OFFLINE $2; echo '{took}' > $4")
    plan = make_plan(threads=3)
    found = run_job(plan.job(plan.entrants[-1], tmp_path, tmp_path), tmp_path / "job")
    assert found.phases == {"training": 1.0}
    log = (tmp_path / "job" / "log.txt").read_text()
    assert log == "3 1 bench.race_entrant\n"


def test_every_job_compiles_anew_and_leaves_nothing_of_it(script, make_plan, tmp_path):
    took = '{"phases": {"training": 1}, "steps": 5}'
    caches = "$TORCHINDUCTOR_CACHE_DIR $TRITON_CACHE_DIR"
    script(f"ls -d {caches}; mkdir -p {caches}; echo {caches}; echo '{took}' > $4")
    plan = make_plan()
    for number in range(2):
        folder = tmp_path / f"job-{number}"
        run_job(plan.job(plan.entrants[-1], tmp_path, tmp_path), folder)
        *missing, made = (folder / "log.txt").read_text().splitlines()
        assert len(missing) == 2 and all("No such file" in line for line in missing)
        assert made == f"{folder}/compiled/inductor {folder}/compiled/triton"
        assert not (folder / "compiled").exists()


def test_an_entrant_that_fails_ends_the_race_with_its_last_words(script, make_plan, tmp_path):
    script("echo something broke; exit 3")
    with pytest.raises(UserError, match=r"preservation: failed \(exit code 3\):\nsomething broke"):
        list(run_race(make_plan()))


def test_a_job_past_its_time_is_ended_and_left_out(script, make_plan, tmp_path):
    script("exec sleep 60")
    plan = make_plan()
    job = plan.job(plan.entrants[0], tmp_path, tmp_path)
    assert run_job(job, tmp_path / "job", most_seconds=0.2) is None


def test_what_is_no_model_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(UserError, match=r"no diffusers folder .*mini-sdxl.*sd3-medium"):
        prepare_model("someone/model", tmp_path, "cpu", torch.float32)


def test_a_diffusers_folder_is_taken_as_it_is(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    found = prepare_model(str(tmp_path), tmp_path / "unused", "cpu", torch.float32)
    assert found == Path(tmp_path) and not (tmp_path / "unused").exists()
