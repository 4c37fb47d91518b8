import json
import random

import numpy as np
import pytest

from bench import scaling, scaling_runs
from bench.rows import Row
from bench.scaling_axes import AXES, STEP, SUBJECTS, TENSORS, choose_targets, list_points
from bench.scaling_fits import FIXED_AND_UNIT, NEITHER, POWER_LAW, fit
from bench.scaling_plots import draw_axis
from bench.scaling_runs import RunWork, has_class_images, time_runs
from bench.scaling_steps import time_axis
from bench.step_ways import Work, open_source
from fastppt.errors import UserError

XS = [1, 2, 4, 8, 16]


@pytest.fixture(scope="module")
def source(photos):
    return open_source(Work("mini-sd3", rank=2), "cpu", photos)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_power_law_is_found_and_its_exponent(exponent):
    found = fit(XS, [3.0 * x**exponent for x in XS])
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.exponent_half == pytest.approx(0, abs=1e-9)
    assert found.law == POWER_LAW and found.is_power_law
    assert found.local_exponents == pytest.approx([exponent] * 4, abs=1e-9)


def test_a_fixed_part_and_a_units_are_found_and_are_said_to_be_no_power_law():
    found = fit(XS, [5.0 + 2.0 * x for x in XS])
    assert (found.fixed, found.unit) == pytest.approx((5.0, 2.0))
    assert found.law == FIXED_AND_UNIT and not found.is_power_law
    said = found.describe("s", "photo")
    assert said.startswith("5 s + 2 s a photo, within 0.0%; no power law (exponent 0.6")


def test_where_neither_holds_the_exponents_between_neighbours_are_said():
    found = fit(XS, [float(x + x**3) for x in XS])
    assert found.law == NEITHER and not found.is_power_law
    # From x = 1 to 2 from 2 to 10, and at last nearly cubic.
    assert found.local_exponents[0] == pytest.approx(np.log2(5.0))
    assert "no power law" in found.describe("s", "photo")
    assert "2.32 to 2.98" in found.describe("s", "photo")


def test_costs_that_fall_or_begin_below_zero_have_no_fixed_part():
    assert fit(XS, [20.0 - x for x in XS]).law == NEITHER
    # -0.9 + x: as a line within nothing, and yet no cost.
    assert fit(XS, [x - 0.9 for x in XS]).law == NEITHER


def test_what_the_points_are_off_themselves_is_no_bend():
    ys = [1.0, 2.3, 3.8, 8.9, 15.0]
    assert fit(XS, ys).law == NEITHER
    assert fit(XS, ys, spread=0.15).law != NEITHER


def test_the_interval_of_an_exponent_holds_the_true_one_19_times_in_20():
    generator, held, runs = random.Random(0), 0, 600
    for _ in range(runs):
        found = fit(XS, [x**1.3 * np.exp(generator.gauss(0, 0.05)) for x in XS])
        held += abs(found.exponent - 1.3) <= found.exponent_half
    assert held / runs == pytest.approx(0.95, abs=0.03)


def test_two_points_have_an_exponent_without_an_interval():
    found = fit([1, 4], [1.0, 2.0])
    assert found.exponent == pytest.approx(0.5) and found.exponent_half is None
    assert "±" not in found.describe("s", "photo")


@pytest.mark.parametrize(
    ("xs", "ys", "what"),
    [
        ([1], [1.0], "two or more"),
        ([1, 2], [1.0], "two or more"),
        ([2, 1], [1.0, 2.0], "rise"),
        ([0, 1], [1.0, 2.0], "positive"),
        ([1, 2], [1.0, 0.0], "costs > 0"),
    ],
)
def test_points_that_nothing_can_be_fitted_to_are_refused(xs, ys, what):
    with pytest.raises(ValueError, match=what):
        fit(xs, ys)


def test_targets_are_spread_over_the_network_and_begin_with_the_first():
    groups = [[f"{index}.q", f"{index}.k"] for index in range(8)]
    assert choose_targets(groups, 1) == [name for group in groups for name in group]
    assert choose_targets(groups, 1 / 4) == ["0.q", "0.k", "4.q", "4.k"]
    assert choose_targets(groups, 0.01) == ["0.q", "0.k"]


def test_every_axis_has_points_that_rise_for_every_model():
    for axis in AXES.values():
        for model in ("mini-sdxl", "sd15", "sdxl"):
            values = axis.values(model)
            assert len(values) >= 3 and list(values) == sorted(set(values))


def test_points_differ_in_one_thing(source):
    base = source.work
    for name in ("resolution", "batch", "rank"):
        points = list_points(AXES[name], [64, 32], base, source)
        assert [point.value for point in points] == [32, 64]
        changed = {
            field for field, value in vars(points[0].work).items() if value != vars(base)[field]
        }
        assert changed == {"batch_size" if name == "batch" else name}
        assert points[0].changes == {}
    few, most = list_points(TENSORS, [1, 0.3], base, source)
    assert few.work == most.work == base
    (few_names,), (all_names,) = few.changes.values(), most.changes.values()
    assert set(few_names) < set(all_names)


def test_steps_of_all_points_are_timed_and_counted_and_a_point_that_cannot_be_is_refused(source):
    points = list_points(AXES["resolution"], [32, 64, 100], source.work, source)
    measured = time_axis(
        AXES["resolution"],
        points,
        source,
        recipe="lora",
        engine="eager",
        device="cpu",
        seconds=0.01,
    )
    assert [row["x"] for row in measured.rows] == [32**2, 64**2]
    small, large = measured.rows
    assert 0 < small["p20 s"] <= small["p50 s"] <= small["p80 s"]
    assert small["memory"] == "counted" and small["peak bytes"] < large["peak bytes"]
    assert small["flops"] < large["flops"] < 5 * small["flops"]
    (refusal,) = measured.refused
    assert refusal["label"] == "100" and "multiple" in refusal["refused"]
    assert measured.drift is None


@pytest.mark.slow
def test_counted_memory_holds_weights_and_grows_with_the_adapters(source):
    points = list_points(AXES["rank"], [2, 32], source.work, source)
    axis = AXES["rank"]
    options = {"recipe": "lora", "engine": "eager", "device": "cpu", "seconds": 0.01}
    small, large = time_axis(axis, points, source, **options).rows
    weights = sum(p.nbytes for p in source.pipeline.transformer.parameters())
    assert weights < small["peak bytes"]
    # Values, gradients and two moments of float32, at least.
    grown = 16 * (large["elements"] - small["elements"])
    assert large["elements"] == 16 * small["elements"]
    assert grown <= large["peak bytes"] - small["peak bytes"] < 3 * grown


def test_points_after_the_time_are_listed(source):
    points = list_points(AXES["batch"], [1, 2], source.work, source)
    options = {"recipe": "lora", "engine": "eager", "device": "cpu", "seconds": 0.01}
    measured = time_axis(AXES["batch"], points, source, most_seconds=0.0, **options)
    assert measured.rows == []
    assert [row["refused"] for row in measured.refused] == ["the time was up"] * 2


@pytest.fixture
def fake_runs(monkeypatch):
    """Replace training by a clock that each run moves on: a second, and a tenth a step."""
    clock, ran = [0.0], []

    def run(work, recipe, output, folder):
        shared = folder / "class-images"
        drawing = 0 if shared.exists() or not has_class_images(recipe) else 7.0
        if drawing:
            shared.mkdir()
        clock[0] += 1 + work.steps / 10 + drawing
        ran.append((recipe, work.steps, output.name))
        return 1000 * work.steps

    monkeypatch.setattr(scaling_runs, "_run", run)
    monkeypatch.setattr(scaling_runs.time, "perf_counter", lambda: clock[0])
    return ran


WORK = RunWork("mini-sd3", "cpu", "eager", None, 1, 2, 5, 3, 2, photos=None)


def test_runs_are_timed_by_their_steps_in_turning_order(fake_runs, tmp_path):
    rows = time_runs(AXES["steps"], [20, 10], WORK, recipes=["lora"], folder=tmp_path, rounds=2)
    assert [(row["x"], row["p50 s"]) for row in rows] == [
        (10, pytest.approx(2)),
        (20, pytest.approx(3)),
    ]
    # A run that nobody times, then the rounds.
    assert [steps for _, steps, _ in fake_runs] == [1, 10, 20, 20, 10]
    assert rows[0]["rounds"] == 2 and rows[0]["memory"] == "allocated"


def test_subjects_of_a_round_share_the_class_images_and_each_round_draws_them_anew(
    fake_runs, tmp_path
):
    recipes = ["lora", "lora-prior"]
    rows = time_runs(SUBJECTS, [1, 3], WORK, recipes=recipes, folder=tmp_path, rounds=2)
    seconds = {(row["recipe"], row["x"]): row["p50 s"] for row in rows}
    assert seconds == {
        ("lora", 1): pytest.approx(1.5),
        ("lora", 3): pytest.approx(4.5),
        ("lora-prior", 1): pytest.approx(8.5),
        ("lora-prior", 3): pytest.approx(11.5),
    }
    assert [name for _, _, name in fake_runs[2:5]] == ["subject-0", "subject-1", "subject-2"]


def test_no_round_beyond_the_least_begins_after_the_time(fake_runs, tmp_path):
    rows = time_runs(
        AXES["steps"], [1, 2], WORK, recipes=["lora"], folder=tmp_path, rounds=9, most_seconds=0.0
    )
    assert rows[0]["rounds"] == scaling_runs.LEAST_ROUNDS


def test_fits_are_of_each_recipe_and_of_each_cost_that_was_measured():
    def row(recipe, x, seconds, num_bytes):
        times = {"p20 s": 0.9 * seconds, "p50 s": seconds, "p80 s": 1.1 * seconds}
        return {"recipe": recipe, "x": x, "peak bytes": num_bytes, "flops": None} | times

    rows = [row("lora", x, 2.0 * x, 7 + x) for x in XS] + [row("apt", 1, 1.0, None)]
    fits = scaling.list_fits(AXES["batch"], rows)
    assert [(each["recipe"], each["what"]) for each in fits] == [
        ("lora", "seconds"),
        ("lora", "bytes"),
    ]
    assert fits[0]["spread"] == pytest.approx(0.1) and fits[1]["spread"] == 0
    assert fits[0]["exponent"] == pytest.approx(1) and "power law" in fits[0]["in words"]
    json.dumps(fits)


def test_every_cost_gets_a_panel_of_the_picture(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("bench.scaling_plots._draw_cost", lambda *given: drawn.append(given[-1]))
    row: Row = {"recipe": "lora", "x": 1, "p50 s": 1.0, "peak bytes": None, "flops": 3}
    draw_axis({"x": "photos", "of": STEP, "rows": [row], "fits": []}, tmp_path / "a.png")
    assert drawn == ["seconds", "flops"]


@pytest.mark.slow
def test_the_command_leaves_numbers_laws_and_a_picture(tmp_path, capsys):
    arguments = ["--model", "mini-sd3", "--recipe", "lora", "--axes", "batch", "--rank", "2"]
    arguments += ["--values", "1", "2", "--seconds", "0.01", "--output", str(tmp_path)]
    assert scaling.main(arguments) == 0
    (path,) = tmp_path.glob("cpu-scaling-mini-sd3-2*.json")
    report = json.loads(path.read_text())
    (axis,) = report["axes"]
    assert report["kind"] == "scaling" and report["settings"]["resolution"] == 64
    assert report["command"] == f"python -m bench.scaling {' '.join(arguments)}"
    assert [row["x"] for row in axis["rows"]] == [1, 2]
    assert {each["what"] for each in axis["fits"]} == {"seconds", "bytes", "flops"}
    assert (tmp_path / axis["picture"]).stat().st_size > 5000
    assert "photos in a step" in capsys.readouterr().out


def test_values_without_one_axis_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--values", "1", "2", "--output", str(tmp_path)])
    assert "which one axis" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("axis", "value", "said"),
    [
        ("batch", "1.5", "whole numbers from 1 on for batch, got 1.5"),
        ("subjects", "0", "whole numbers from 1 on for subjects, got 0"),
        ("tensors", "1.5", "(0, 1], got 1.5"),
    ],
)
def test_values_that_an_axis_does_not_have_are_refused(tmp_path, capsys, axis, value, said):
    with pytest.raises(SystemExit):
        scaling.main(["--axes", axis, "--values", "1", value, "--output", str(tmp_path)])
    assert said in capsys.readouterr().err


def test_the_drift_of_the_machine_is_printed(capsys):
    axis = {"axis": "rank", "x": "rank", "of": STEP, "rows": [], "refused": [], "fits": []}
    scaling.print_axis(axis | {"drift": 0.9})
    assert "ran 0.90 times as fast" in capsys.readouterr().out


def test_an_axis_that_the_model_refuses_is_in_the_report(monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise UserError("no such layer")

    monkeypatch.setattr(scaling, "list_points", refuse)
    arguments = ["--model", "mini-sd3", "--axes", "batch", "--output", str(tmp_path)]
    assert scaling.main(arguments) == 1
    (path,) = tmp_path.iterdir()
    (axis,) = json.loads(path.read_text())["axes"]
    assert axis["refused"] == [{"label": "all", "refused": "no such layer"}]
    assert axis["rows"] == [] and axis["picture"] is None


@pytest.mark.slow
def test_whole_runs_are_timed_from_a_model_on_disk(tmp_path):
    arguments = ["--model", "mini-sd3", "--axes", "steps", "subjects", "--recipe", "lora"]
    arguments += ["--rank", "2", "--run-steps", "1", "--class-images", "1", "--sampler-steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("steps", "subjects"):
            patch.setattr(type(AXES[name]), "values", lambda self, model: (1, 2))
        assert scaling.main([*arguments, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cpu-scaling-mini-sd3-2*.json")
    steps, subjects = json.loads(path.read_text())["axes"]
    assert {row["recipe"] for row in steps["rows"]} == {"lora"}
    assert [(row["recipe"], row["x"]) for row in subjects["rows"]] == [
        ("lora", 1),
        ("lora", 2),
        ("lora-prior", 1),
        ("lora-prior", 2),
    ]


@pytest.mark.gpu
def test_on_a_gpu_points_are_captured_one_after_the_other_and_drift_is_said(photos):
    gpu_source = open_source(Work("mini-sd3", rank=2), "cuda", photos)
    points = list_points(AXES["batch"], [1, 2], gpu_source.work, gpu_source)
    options = {"recipe": "ppt-lora", "engine": "graph", "device": "cuda", "seconds": 0.1}
    measured = time_axis(AXES["batch"], points, gpu_source, **options)
    assert [row["memory"] for row in measured.rows] == ["allocated"] * 2
    assert 0 < measured.rows[0]["peak bytes"] < measured.rows[1]["peak bytes"]
    assert 0.3 < measured.drift < 3
