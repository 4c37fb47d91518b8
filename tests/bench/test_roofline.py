import json

import pytest
import torch

from bench import roofline, roofline_phases
from bench.roofline_phases import measure_step, update_traffic
from bench.roofline_rows import (
    PRODUCT_SIZES,
    Ceilings,
    describe_phase,
    measure_ceilings,
    print_phases,
)
from bench.step_costs import count_flops
from bench.step_parts import BACKWARD, FORWARD, PARTS, UPDATE, PartClock, PartMarks, count_parts
from bench.step_ways import NetworkAlone, TrainerStep, Work, open_source
from bench.traffic import Traffic

CEILINGS = Ceilings(tflop_per_s=2.0, product_size=64, gb_per_s=100.0)


@pytest.fixture(scope="module")
def source(photos):
    return open_source(Work("mini-sd3", rank=2), "cpu", photos)


@pytest.fixture
def step(source):
    made = TrainerStep(source, "ppt-lora", "eager")
    made()
    return made


def test_a_phase_is_bound_by_what_takes_longer_at_the_ceiling():
    # A second of products, half a second of copying.
    row = describe_phase("forward", 4.0, 2 * 10**12, Traffic(10**11, 5 * 10**10), CEILINGS)
    assert (row["bound"], row["floor s"]) == ("products", pytest.approx(1.0))
    assert row["mfu"] == row["share of roof"] == pytest.approx(1 / 4)
    assert row["tflop/s"] == pytest.approx(0.5) and row["gb/s"] == pytest.approx(25)
    assert row["share of copy"] == pytest.approx(1 / 4)
    assert row["flop/byte"] == pytest.approx(40)
    update = describe_phase("update", 4.0, 10**9, Traffic(10**11, 10**11), CEILINGS)
    assert (update["bound"], update["share of roof"]) == ("memory", pytest.approx(1 / 4))
    assert update["mfu"] == pytest.approx(0.5e-3 / 4)


def test_the_ridge_is_where_both_ceilings_meet():
    assert CEILINGS.row()["ridge flop/byte"] == pytest.approx(20)


def test_a_phase_that_was_not_measured_has_a_floor_and_no_rates(capsys):
    row = describe_phase("load", None, 0, Traffic(10**11, 10**11), CEILINGS)
    assert row["floor s"] == pytest.approx(1.0)
    assert row["mfu"] is row["gb/s"] is row["share of roof"] is None
    print_phases([row])
    assert "not measured" in capsys.readouterr().out


def test_the_ceiling_is_the_fastest_of_the_products(monkeypatch):
    speeds = {256: 1.0, 512: 3.0, 1024: 2.0}
    monkeypatch.setitem(PRODUCT_SIZES, "cpu", tuple(speeds))
    monkeypatch.setattr("bench.roofline_rows.product_speed", lambda d, t, size: speeds[size])
    monkeypatch.setattr("bench.roofline_rows.copy_bandwidth", lambda device: 9.0)
    assert measure_ceilings("cpu", torch.float32) == Ceilings(3.0, 512, 9.0)


def test_marks_come_once_a_part_in_order_and_are_taken_away(step):
    names = []
    with PartMarks(step, names.append):
        step()
    assert names == [BACKWARD, UPDATE]
    step()
    assert len(names) == 2


@pytest.mark.slow
def test_a_base_pass_and_the_alignments_are_part_of_the_forward_pass(source, step):
    apt = TrainerStep(source, "apt", "eager")
    apt()
    names = []
    with PartMarks(apt, names.append) as marks:
        apt()
        assert names == [BACKWARD, UPDATE]
        with_base = count_parts(apt, marks)
    with PartMarks(step, names.append) as marks:
        plain = count_parts(step, marks)
    # Where it is held, the attention to the text is one more product of both passes.
    aligned = with_base[FORWARD][0] - plain[FORWARD][0] - network_flops(source, step)
    assert 0 < aligned < 0.2 * plain[FORWARD][0]
    assert with_base[BACKWARD][0] - plain[BACKWARD][0] == pytest.approx(1.5 * aligned)


def test_parts_of_the_counts_are_those_of_the_whole_step(source, step):
    with PartMarks(step, lambda name: None) as marks:
        counts = count_parts(step, marks)
    assert tuple(counts) == PARTS
    forward, backward = (counts[name][0] for name in (FORWARD, BACKWARD))
    # The update's products are the anchor's.
    assert forward + backward == count_flops(step.gradients)
    assert forward > network_flops(source, step) > 0
    assert 0 < counts[UPDATE][0] < forward
    for _, traffic in counts.values():
        assert 0 < traffic.least <= traffic.ops
    # Parameters, gradients and moments: read, and written but for the gradients.
    flat = step.trainables.lora.arena.flat
    assert counts[UPDATE][1].least >= 7 * flat.nbytes


def network_flops(source, step):
    """The operations of the network without adapters, forward."""
    return count_flops(NetworkAlone(source.make_family(), step, backward=False))


def test_every_part_of_a_step_is_timed(step):
    phases = measure_step(step, "cpu", 3)
    assert [phase.name for phase in phases] == list(PARTS)
    assert all(phase.seconds > 0 for phase in phases)


def test_the_clock_counts_from_mark_to_mark(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("bench.step_parts.time.perf_counter", lambda: now[0])
    clock = PartClock("cpu")

    def step():
        for seconds, name in ((3, BACKWARD), (5, UPDATE)):
            now[0] += seconds
            clock(name)
        now[0] += 2

    assert clock.time(step) == {FORWARD: 3, BACKWARD: 5, UPDATE: 2}


def test_bytes_of_the_kernels_of_the_update_are_counted_by_hand(step):
    size = sum(p.nbytes for group in step.step.optimizer.param_groups for p in group["params"])
    # Parameter for the products; parameter, and gradient there and back, for the anchor's pull;
    # gradient for the norm; parameter, gradient and moments; parameter and moments written.
    assert update_traffic(step) == Traffic(12 * size, 7 * size)


def test_without_an_anchor_the_update_reads_less(source):
    step = TrainerStep(source, "lora", "eager")
    size = step.trainables.lora.arena.flat.nbytes
    assert update_traffic(step) == Traffic(8 * size, 7 * size)


@pytest.mark.slow
def test_the_command_leaves_every_phase_the_ceilings_and_a_picture(
    source, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(PRODUCT_SIZES, "cpu", (128, 256))
    arguments = ["--model", "mini-sd3", "--rank", "2", "--sampler-steps", "2", "--rounds", "2"]
    assert roofline.main([*arguments, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cpu-roofline-mini-sd3-2*.json")
    report = json.loads(path.read_text())
    assert (
        report["command"] == f"python -m bench.roofline {' '.join(arguments)} --output {tmp_path}"
    )
    phases = {row["phase"]: row for row in report["phases"]}
    assert list(phases) == ["load", "encode", "class sampling", *PARTS, "step"]
    assert all(row["p50 s"] > 0 and row["least bytes"] > 0 for row in phases.values())
    assert phases["step"]["flops"] == pytest.approx(
        sum(phases[name]["flops"] for name in PARTS), rel=1e-3
    )
    assert report["mfu"] == phases["step"]["mfu"] > 0
    # Read from files, and written to memory.
    weights = sum(source.make_family().weight_bytes().values())
    assert (
        phases["load"]["least bytes"]
        == phases["load"]["bytes"]
        == pytest.approx(2 * weights, rel=1e-3)
    )
    assert "4 pictures, 2 steps" in phases["class sampling"]["note"]
    assert report["settings"]["resolution"] == 64
    assert report["profile"]["engine"] == "eager" and report["profile"]["top"]
    assert (tmp_path / report["picture"]).stat().st_size > 5000
    assert "kernel family" in capsys.readouterr().out


def test_a_bench_that_takes_too_long_is_given_up(monkeypatch, tmp_path, capsys):
    def wait(options, folder):
        import time

        time.sleep(60)

    monkeypatch.setattr(roofline, "_measure_model", wait)
    arguments = ["--most-seconds", "0.1", "--output", str(tmp_path)]
    assert roofline.main(arguments) == 1
    assert "not done in 0.1 s" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_parts_of_a_captured_step_are_told_apart_by_its_replays(photos):
    gpu_source = open_source(Work("mini-sd3", rank=2), "cuda", photos)
    step = TrainerStep(gpu_source, "ppt-lora", "graph")
    phases = {phase.name: phase for phase in measure_step(step, "cuda", 5)}
    assert all(phase.seconds > 0 for phase in phases.values())
    eager = TrainerStep(gpu_source, "ppt-lora", "eager")
    eager()
    assert phases[FORWARD].flops + phases[BACKWARD].flops == count_flops(eager.gradients)
    assert phases[UPDATE].traffic.ops >= update_traffic(step).ops


@pytest.mark.gpu
def test_on_a_gpu_the_whole_roofline_is_measured(tmp_path):
    arguments = ["--model", "mini-sd3", "--rank", "2", "--sampler-steps", "2", "--rounds", "3"]
    assert roofline.main([*arguments, "--device", "cuda", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cuda-roofline-*.json")
    report = json.loads(path.read_text())
    assert report["profile"]["engine"] == "graph"
    assert {row["family"]: row for row in report["profile"]["families"]}["other"]["share"] < 0.5
    assert roofline_phases.SAMPLER_BATCH == 4
