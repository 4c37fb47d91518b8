import json
import math
import pickle
import re
from dataclasses import replace

import pytest

from bench import ROOT, bench_preservation, preservation_cells, tables
from bench.preservation_cells import Cell, find_cell, list_cells, make_config, summarise_indicator
from bench.preservation_claims import (
    INDICATOR,
    MONOTONE,
    OTHER_CLASSES,
    PARTS,
    RARE,
    answer_claims,
    calibrate,
)
from bench.preservation_plan import (
    APT,
    APT_PARTS,
    DREAMBOOTH,
    DREAMBOOTH_PRIOR,
    LORA,
    LORA_ANCHOR_WEIGHT,
    LORA_PRIOR,
    METHODS,
    PPT_DREAMBOOTH,
    PPT_LORA,
    RARE_TOKEN,
    Plan,
    quick,
    sweep_methods,
)
from bench.preservation_plots import pareto_front
from bench.preservation_statistics import (
    FAILS,
    HOLDS,
    NOT_SHOWN,
    Difference,
    combine,
    difference,
    mean_over_subjects,
    number,
    summarise,
)
from fastppt.families.loading import detect_family
from fastppt.mini.world import NOUNS

SUBJECTS, SEEDS = range(3), range(2)
PLAN = Plan(subjects=3, seeds=2)
# What a method has of each measure unless a test says otherwise.
PLAIN = {
    "subject_fidelity": 0.5,
    "subject_context": 0.5,
    "class_noise": 1.0,
    "other_noise": 1.0,
    "other_frechet": 1.0,
    "other_all": 0.5,
    "parameter_distance": 1.0,
}


def made(method, *, weight=None, shift=0.0, indicator=None, seconds=0.0, **numbers):
    """Cells of a method on every subject and seed; they vary by subject, and a little by seed."""
    return [
        {
            "method": method,
            "subject": subject,
            "seed": seed,
            "anchor weight": weight,
            "numbers": {
                name: value + 0.3 * subject + 0.01 * seed + shift
                for name, value in {**PLAIN, **numbers}.items()
            },
            "seconds": {"training": 1.0 + subject, "class images": seconds},
            "indicator": indicator,
        }
        for subject in SUBJECTS
        for seed in SEEDS
    ]


def verdict(cells, claim):
    return next(row for row in answer_claims(cells) if row["claim"] == claim)


def test_a_subject_counts_once_whatever_its_seeds():
    cells = made("lora")
    cells += [{**cells[0], "seed": seed} for seed in range(10, 40)]
    found = mean_over_subjects(cells, number("class_noise"))
    few = mean_over_subjects(made("lora"), number("class_noise"))
    assert found.mean == pytest.approx(few.mean, abs=0.01)
    # Three subjects: Student's t of two degrees of freedom, of values 0.3 apart.
    assert few.half == pytest.approx(4.303 * 0.3 / math.sqrt(3))
    assert few.mean == pytest.approx(1.0 + 0.3 + 0.005)


def test_differences_are_taken_on_one_subject_and_seed():
    cells = made("a", shift=0.25) + made("b")
    found = difference(cells, "a", "b", number("class_noise"))
    # What varies by subject and seed is gone.
    assert found.mean == pytest.approx(0.25) and found.half == pytest.approx(0, abs=1e-12)
    # Without the one of subject 2, seed 1, the other of it is left out.
    fewer = [c for c in cells if (c["method"], c["subject"], c["seed"]) != ("b", 2, 1)]
    assert difference(fewer, "a", "b", number("class_noise")).mean == pytest.approx(0.25)
    assert difference(cells, "a", "c", number("class_noise")) is None


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        (Difference(0.3, 0.2), 1, HOLDS),
        (Difference(0.3, 0.2), -1, FAILS),
        (Difference(-0.3, 0.2), -1, HOLDS),
        (Difference(0.3, 0.4), 1, NOT_SHOWN),
        (Difference(-0.3, 0.4), 1, NOT_SHOWN),
        (Difference(0.0, 0.0), 1, NOT_SHOWN),
        # One subject says nothing of others.
        (Difference(0.3, None), 1, NOT_SHOWN),
    ],
)
def test_a_part_is_decided_by_its_whole_interval(found, wanted, said):
    assert found.verdict(wanted) == said


def test_a_claim_holds_where_all_its_parts_do():
    assert combine([HOLDS, HOLDS]) == HOLDS
    assert combine([HOLDS, NOT_SHOWN]) == NOT_SHOWN
    assert combine([HOLDS, NOT_SHOWN, FAILS]) == FAILS
    assert combine([]) == NOT_SHOWN


def sweep(drifts, fidelities=(0.9, 0.88, 0.86, 0.7)):
    """Cells of weights 0, 0.1, 1 and 10 with these drifts."""
    cells = []
    for weight, drift, fidelity in zip((0.0, 0.1, 1.0, 10.0), drifts, fidelities, strict=True):
        numbers = dict.fromkeys(("parameter_distance", "class_noise", "other_noise"), drift)
        name = LORA if weight == 0 else f"{PPT_LORA}, weight {weight:g}"
        cells += made(name, weight=weight, subject_fidelity=fidelity, **numbers)
    return cells


def test_a_drift_that_falls_with_every_weight_is_monotone():
    row = verdict(sweep((4.0, 3.0, 2.0, 1.0)), MONOTONE)
    assert row["verdict"] == HOLDS and len(row["parts"]) == 9
    assert [part["difference"] for part in row["parts"]] == pytest.approx([-1.0] * 9)
    assert row["beside"]["parameter_distance falls throughout"] == "6 of 6"


def test_a_drift_that_rises_once_is_not_monotone():
    row = verdict(sweep((4.0, 3.0, 3.5, 1.0)), MONOTONE)
    assert row["verdict"] == FAILS
    assert [p["what"] for p in row["parts"] if p["verdict"] == FAILS] == [
        f"{name}, weight 1 minus 0.1"
        for name in ("parameter_distance", "class_noise", "other_noise")
    ]
    assert row["beside"]["class_noise falls throughout"] == "0 of 6"
    assert verdict(sweep((4.0, 3.0, 3.0, 1.0)), MONOTONE)["verdict"] == NOT_SHOWN


def others(ours, theirs):
    numbers = [{"other_noise": drift, "other_frechet": drift} for drift in (ours, theirs)]
    return [
        *made(PPT_LORA, weight=0.01, **numbers[0]),
        *made(LORA_PRIOR, seconds=7.0, **numbers[1]),
        *made(PPT_DREAMBOOTH, **numbers[0]),
        *made(DREAMBOOTH_PRIOR, seconds=9.0, **numbers[1]),
    ]


def test_the_anchor_is_held_against_prior_preservation_both_ways_of_training():
    row = verdict(others(1.0, 2.0), OTHER_CLASSES)
    assert row["verdict"] == HOLDS
    assert [part["verdict"] for part in row["parts"]].count(HOLDS) == 4
    costs = row["beside"]
    assert costs[f"seconds for class images, {PPT_LORA}"] == 0
    assert costs[f"seconds for class images, {DREAMBOOTH_PRIOR}"] == pytest.approx(9.0)
    assert verdict(others(2.0, 1.0), OTHER_CLASSES)["verdict"] == FAILS
    # Of one way alone.
    some = [cell for cell in others(1.0, 2.0) if "dreambooth" not in cell["method"]]
    assert verdict(some, OTHER_CLASSES)["verdict"] == NOT_SHOWN


def test_what_stands_beside_a_claim_does_not_decide_it():
    cells = others(1.0, 2.0)
    for cell in cells:
        if cell["method"] == PPT_LORA:
            cell["numbers"]["subject_fidelity"] -= 5
    row = verdict(cells, OTHER_CLASSES)
    assert row["verdict"] == HOLDS
    beside = {part["what"]: part for part in row["parts"] if part["verdict"] is None}
    lost = beside[f"subject_fidelity, {PPT_LORA} minus {LORA_PRIOR}"]
    assert lost["difference"] == pytest.approx(-5.0)


def bins(low, high):
    return [low] * 3 + [0.5] * 4 + [high] * 3


def test_the_indicator_is_read_at_both_ends_of_the_noise():
    rising = {"mean": bins(0.9, 0.1), "half reached": bins(0.1, 0.9)}
    row = verdict(made(APT, indicator=rising), INDICATOR)
    # Without any variation an interval is a point; that is no fault of the claim's.
    assert row["verdict"] == HOLDS
    assert [part["difference"] for part in row["parts"]] == pytest.approx([0.8, -0.8])
    falling = {"mean": bins(0.1, 0.9), "half reached": bins(0.1, 0.9)}
    assert verdict(made(APT, indicator=falling), INDICATOR)["verdict"] == FAILS
    assert verdict(made(LORA), INDICATOR)["verdict"] == NOT_SHOWN


def test_the_indicator_is_summarised_by_bin():
    rows = [[0.0, 0.1], [0.5, 0.2], [0.7, 0.3], [0.9, 0.4]]
    told = summarise_indicator(rows)
    assert told["mean"] == pytest.approx([0.525, 0.25])
    assert told["half reached"] == [0.25, 1.0]
    assert told["course"] == rows
    many = summarise_indicator([[step / 1000] for step in range(1000)])
    assert len(many["course"]) == 20 and many["course"][-1] == [0.999]


def parts(without):
    cells = made(APT, class_noise=1.0, other_noise=1.0)
    for part, drift in zip(APT_PARTS, without, strict=True):
        cells += made(part.name, class_noise=drift, other_noise=drift)
    return cells


def test_each_part_of_apt_must_lower_the_drift_by_itself():
    assert verdict(parts((1.5, 1.4, 1.3, 1.2)), PARTS)["verdict"] == HOLDS
    row = verdict(parts((1.5, 1.4, 0.8, 1.2)), PARTS)
    assert row["verdict"] == FAILS
    assert {part["what"] for part in row["parts"] if part["verdict"] == FAILS} == {
        f"{name}, {APT_PARTS[2].name} minus {APT}" for name in ("class_noise", "other_noise")
    }
    assert verdict(parts((1.5, 1.4, 1.0, 1.2)), PARTS)["verdict"] == NOT_SHOWN


def test_the_rare_token_must_be_better_in_what_is_learned_and_in_what_is_kept():
    better = {"subject_fidelity": 0.7, "subject_context": 0.6, "class_noise": 0.5}
    assert verdict(made(RARE_TOKEN, **better) + made(DREAMBOOTH), RARE)["verdict"] == HOLDS
    worse = {**better, "class_noise": 1.5}
    assert verdict(made(RARE_TOKEN, **worse) + made(DREAMBOOTH), RARE)["verdict"] == FAILS


def test_the_calibrated_weight_is_the_largest_that_keeps_most_of_the_gain():
    base = [{**cell, "seconds": {"whole": 1.0}} for cell in made("base", subject_fidelity=0.4)]
    drifts = (4.0, 3.0, 2.0, 1.0)
    # Of a gain of 0.5 these keep 100, 96, 92 and 60 %.
    assert calibrate(sweep(drifts) + base) == 1.0
    assert calibrate(sweep(drifts, (0.9, 0.5, 0.5, 0.5)) + base) is None
    assert calibrate(sweep(drifts, (0.3, 0.3, 0.3, 0.3)) + base) is None
    assert calibrate(sweep(drifts)) is None


def test_means_stand_by_method_with_their_intervals():
    cells = made("base") + made(LORA, weight=0.0, shift=1.0)
    base, lora = summarise(cells, ["base", LORA, APT])
    assert (base["method"], lora["method"], lora["cells"]) == ("base", LORA, 6)
    assert lora["numbers"]["class_noise"]["mean"] == pytest.approx(2.305)
    assert lora["numbers"]["class_noise"]["±"] == pytest.approx(4.303 * 0.3 / math.sqrt(3))
    assert lora["seconds"]["training"]["mean"] == pytest.approx(2.0)


def test_the_front_is_what_nothing_beats_in_both():
    points = [(1.0, 0.5), (2.0, 0.4), (0.5, 0.3), (3.0, 0.9), (0.5, 0.2)]
    assert pareto_front(points) == [2, 0, 3]


def test_every_method_has_a_configuration_with_as_many_steps(tmp_path):
    for method in (*METHODS, *sweep_methods()):
        config = make_config(Cell(method, 0, 5), method, PLAN, tmp_path)
        assert sum(stage.steps for stage in config.stage) == PLAN.steps, method.name
        assert (config.seed, config.prompts.class_noun) == (5, "robot")
        assert not config.samples.enabled
        assert {stage.batch_size for stage in config.stage} == {1}
        held = [stage.objectives.anchor for stage in config.stage]
        if method.anchor_weight:
            assert [anchor.weight for anchor in held] == [method.anchor_weight]
        for stage in config.stage:
            prior = stage.objectives.prior_preservation
            assert prior is None or prior.cache == tmp_path / "class-images"


def test_parts_of_apt_are_off_one_at_a_time(tmp_path):
    def told(method):
        (stage,) = make_config(Cell(method, 0, 0), method, PLAN, tmp_path).stage
        return {
            "weighting and views": stage.objectives.denoising.weighting == "adaptive",
            "views": stage.objectives.augment,
            "features": stage.objectives.feature_alignment.weight > 0,
            "attention": stage.objectives.attention_alignment.weight > 0,
        }

    whole = told(next(method for method in METHODS if method.name == APT))
    assert all(whole.values())
    for method in APT_PARTS:
        off = {name for name, on in told(method).items() if not on}
        part = method.name.removeprefix(f"{APT} without ")
        assert off == ({part, "views"} if part == "weighting and views" else {part})


def test_subjects_are_of_the_world_and_methods_have_names_of_their_own():
    assert set(bench_preservation.NOUNS) <= set(NOUNS)
    names = [method.name for method in (*METHODS, *sweep_methods())]
    assert len(set(names)) == len(names)
    cells = list_cells(PLAN, METHODS)
    paths = {cell.path(preservation_cells.Path("w")) for cell in cells}
    assert len(paths) == len(cells) == PLAN.subjects * (1 + PLAN.seeds * len(METHODS))


def test_a_cell_that_was_kept_by_other_numbers_is_measured_again(tmp_path):
    cell = Cell(METHODS[0], 0, 0)
    assert find_cell(cell, PLAN, tmp_path) is None
    path = cell.path(tmp_path)
    path.parent.mkdir()
    row = {"method": LORA, "key": preservation_cells.cell_key(cell, PLAN)}
    path.write_text(json.dumps(row))
    assert find_cell(cell, PLAN, tmp_path) == row
    assert find_cell(cell, replace(PLAN, seeds=7), tmp_path) == row
    assert find_cell(cell, replace(PLAN, steps=77), tmp_path) is None
    assert find_cell(cell, quick(PLAN), tmp_path) is None


def test_a_cell_can_be_sent_to_another_process():
    for given in (PLAN, quick(PLAN)):
        sent = (list_cells(given, [*METHODS, *sweep_methods()]), given)
        assert pickle.loads(pickle.dumps(sent)) == sent


def test_a_method_that_is_not_there_is_refused_by_name():
    with pytest.raises(SystemExit, match="no 'lorra'"):
        bench_preservation.choose_methods(["lora", "lorra"], with_sweep=False)
    assert [m.name for m in bench_preservation.choose_methods(["apt"], with_sweep=False)] == ["apt"]


def test_the_mini_model_is_of_the_family_whose_stages_are_taken():
    from fastppt.config import ModelConfig

    assert detect_family(ModelConfig(path="mini-sdxl")) == METHODS[0].family


def test_the_demo_holds_by_the_weight_that_the_bench_has_calibrated():
    (given,) = re.findall(r"--anchor-weight (\S+)", (ROOT / "Makefile").read_text())
    assert float(given) == LORA_ANCHOR_WEIGHT


@pytest.mark.slow
def test_the_command_measures_and_keeps_cells_and_says_what_became_of_the_claims(
    tmp_path, monkeypatch, capsys
):
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = ["--output", str(out), "--work", str(work), "--subjects", "1", "--seeds", "1"]
    arguments += ["--recipes", "ppt-lora", "lora-prior", "apt", "rare-token"]
    arguments += ["--no-sweep", "--quick"]
    bench_preservation.main(arguments)
    assert "5 cells, 0 of them kept" in capsys.readouterr().out
    (path,) = out.glob("*.json")
    assert path.name.startswith("quick-cpu-preservation-2")
    assert len(list(out.glob("*.png"))) == 2
    report = json.loads(path.read_text())
    assert [row["method"] for row in report["rows"]] == [
        *("base", "ppt-lora", "lora-prior", "apt", "rare-token")
    ]
    by_name = {row["method"]: row for row in report["rows"]}
    assert by_name["base"]["numbers"]["parameter_distance"]["mean"] == 0
    assert by_name["ppt-lora"]["numbers"]["parameter_distance"]["mean"] > 0
    assert by_name["lora-prior"]["seconds"]["class images"]["mean"] > 0
    assert by_name["ppt-lora"]["seconds"]["class images"]["mean"] == 0
    cells = {cell["method"]: cell for cell in report["cells"]}
    assert cells["lora-prior"]["class images"] == 2
    assert len(cells["apt"]["indicator"]["mean"]) == 10
    assert len(report["claims"]) == 5
    assert {claim["verdict"] for claim in report["claims"]} == {NOT_SHOWN}
    # What is kept is not measured again.
    monkeypatch.setattr(bench_preservation, "run_cell", lambda *_: pytest.fail("measured again"))
    bench_preservation.main(arguments)
    assert "5 cells, 5 of them kept" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"] == report["rows"]
    path.rename(out / path.name.removeprefix("quick-"))
    table = tables.BLOCKS["preservation"](out)
    assert "| ppt-lora |" in table and f"| {MONOTONE} | not shown |" in table
