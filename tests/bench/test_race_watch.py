import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import race_energy
from bench.race_plan import PRIOR_PEER, EntrantPlan, Job
from bench.race_results import RaceSettings
from bench.race_watch import Watch, make_round, peak_memory

SETTINGS = RaceSettings(
    model="mini-sd",
    family="sd",
    resolution=32,
    batch_size=1,
    precision="float32",
    rank=4,
    steps=101,
    class_images=20,
    sampler_steps=2,
    guidance_scale=4.0,
    num_photos=5,
    seed=0,
    rounds=1,
    threads=1,
)


def make_job(sampled_images=20, trained_steps=101, prior=True):
    return Job(
        settings=SETTINGS,
        entrant=EntrantPlan(name=PRIOR_PEER, kind="diffusers", prior=prior),
        model="mini-sd",
        device="cpu",
        photos=Path(),
        class_noun="robot",
        output=Path(),
        class_images=Path(),
        sampled_images=sampled_images,
        trained_steps=trained_steps,
    )


class FakeMeter:
    """Counts a joule more each time it is read."""

    joules = 100.0

    def read(self):
        self.joules += 1.0
        return self.joules


def measured(job):
    """Return the round of a job whose phases and batches are known."""
    watch = Watch("cpu")
    watch.seconds = {"class_images": 50.0, "encode": 10.0, "first_step": 3.0, "training": 20.0}
    watch.joules = {"class_images": 100.0, "training": 40.0}
    watch.class_encoding_s = 8.0
    watch._batches = [20.0, 30.0, 34.0]
    return make_round(job, watch, start_s=6.0, peak=None)


def test_what_is_in_no_phase_is_other_and_all_add_up_to_the_wall_clock():
    watch = Watch("cpu")
    with watch.phase("load"):
        time.sleep(0.01)
    for _ in range(2):
        with watch.phase("training"):
            time.sleep(0.01)
    watch.close(1.0)
    assert watch.seconds["load"] >= 0.01 and watch.seconds["training"] >= 0.02
    assert sum(watch.seconds.values()) == pytest.approx(1.0)


def test_phases_do_not_overlap():
    watch = Watch("cpu")
    with (
        pytest.raises(AssertionError, match="save inside of load"),
        watch.phase("load"),
        watch.phase("save"),
    ):
        pass


def test_the_time_of_a_step_is_from_the_end_of_the_one_before():
    watch = Watch("cpu")
    watch._steps = [0.0, 9.0, 10.0, 11.0, 13.0]
    times = watch.step_times()
    assert times.p50 == pytest.approx(1.5)
    assert times.p20 < times.p50 < times.p80
    watch._steps = [0.0, 9.0]
    assert watch.step_times() is None


def test_energy_is_read_when_the_phase_changes_and_not_at_each_step():
    watch = Watch("cpu", FakeMeter())
    for name in ("load", "training", "training", "training", "save"):
        with watch.phase(name):
            pass
    watch.close(1.0)
    assert watch.joules == {"other": 1.0, "load": 1.0, "training": 1.0, "save": 1.0}


def test_a_job_done_whole_is_not_extrapolated():
    found = measured(make_job())
    assert found.extrapolated == []
    assert found.phases["class_images"] == 50.0 and found.phases["training"] == 20.0
    assert found.start_s == 6.0


def test_left_out_class_images_take_as_long_as_the_last_batch():
    found = measured(make_job(sampled_images=12))
    # Five batches, of which two are left; eight more pictures to encode.
    assert found.phases["class_images"] == pytest.approx(50.0 + 2 * 4.0)
    assert found.phases["encode"] == pytest.approx(10.0 + 8.0 * 8 / 12)
    assert found.energy_joules["class_images"] == pytest.approx(100.0 * 58 / 50)
    assert set(found.extrapolated) == {"class_images", "encode"}


def test_the_time_of_a_batch_is_from_the_end_of_the_one_before():
    batches = measured(make_job()).batch_s
    assert batches.p50 == pytest.approx(7.0)
    assert 4.0 <= batches.p20 < batches.p50 < batches.p80 <= 10.0


def test_without_class_images_nothing_of_them_is_extrapolated():
    assert measured(make_job(sampled_images=8, prior=False)).extrapolated == []


def test_left_out_steps_take_as_long_as_those_after_the_first():
    found = measured(make_job(trained_steps=11))
    assert found.phases["training"] == pytest.approx(20.0 * 100 / 10)
    assert found.phases["first_step"] == 3.0
    assert found.energy_joules["training"] == pytest.approx(400.0)
    assert found.extrapolated == ["training"] and found.steps == 101


def test_on_the_cpu_the_peak_is_of_this_process_and_grows_with_it():
    before, kind = peak_memory("cpu")
    held = torch.ones(1 << 26)
    after, _ = peak_memory("cpu")
    assert kind == "resident" and after >= before
    assert after > held.nbytes


def test_no_energy_is_counted_on_the_cpu_or_without_the_package(monkeypatch):
    assert race_energy.open_meter("cpu") is None
    monkeypatch.setattr(race_energy.importlib.util, "find_spec", lambda name: None)
    assert race_energy.open_meter("cuda") is None


@pytest.mark.parametrize("counts", [True, False])
def test_energy_is_that_of_torchs_gpu_where_the_card_counts_it(monkeypatch, counts):
    class NVMLError(Exception):
        pass

    def consumption(handle):
        if not counts:
            raise NVMLError
        return {b"GPU-1-2": 2500}[handle]

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=consumption,
    )
    monkeypatch.setattr(race_energy.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(race_energy.importlib, "import_module", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid="1-2")
    )
    meter = race_energy.open_meter("cuda")
    assert (meter is not None) == counts
    if counts:
        assert meter.read() == pytest.approx(2.5)
