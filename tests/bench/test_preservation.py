import json
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
from rich.console import Console

from bench import ROOT, bench_preservation, tables
from bench.preservation_cells import (
    Cell,
    cell_path,
    find_cell,
    hold_cell,
    list_cells,
    make_config,
)
from bench.preservation_claims import (
    MONOTONE,
)
from bench.preservation_plan import (
    ANCHOR_WEIGHT,
    APT,
    APT_ADDED,
    APT_BASE,
    APT_TAKEN,
    FULL_ANCHOR_WEIGHT,
    LORA,
    LORA_ANCHOR_WEIGHT,
    METHODS,
    PPT_DREAMBOOTH,
    PPT_LORA,
    SWEEPS,
    Plan,
    quick,
    sweep_methods,
)
from bench.preservation_statistics import (
    NOT_SHOWN,
)
from fastppt.config_io import recipe_text
from fastppt.families.loading import detect_family
from fastppt.mini.world import NOUNS

PLAN = Plan(subjects=3, seeds=2)


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


def test_a_part_of_apt_is_what_the_methods_compared_for_it_differ_in(tmp_path):
    def told(name):
        (method,) = [method for method in METHODS if method.name == name]
        (stage,) = make_config(Cell(method, 0, 0), method, PLAN, tmp_path).stage
        objectives = stage.objectives
        features, attention = objectives.feature_alignment, objectives.attention_alignment
        adapts = objectives.denoising.weighting == "adaptive"
        assert objectives.augment == adapts
        return {
            "adaptive adjustment": adapts,
            "features": features is not None and features.weight > 0,
            "attention": attention is not None and attention.weight > 0,
        }

    assert not any(told(APT_BASE).values()) and all(told(APT).values())
    for pairs in (APT_ADDED, APT_TAKEN):
        for part, (without, with_it) in pairs.items():
            assert not told(without)[part]
            assert told(without) | {part: True} == told(with_it), part


def test_subjects_are_of_the_world_and_methods_have_names_of_their_own(tmp_path):
    assert set(bench_preservation.NOUNS) <= set(NOUNS)
    names = [method.name for method in (*METHODS, *sweep_methods())]
    assert len(set(names)) == len(names)
    cells = list_cells(PLAN, [*METHODS, *sweep_methods()])
    paths = {cell_path(cell, PLAN, tmp_path) for cell in cells}
    assert len(paths) == len(cells) == PLAN.subjects * (1 + PLAN.seeds * len(names))


def test_a_cell_that_was_kept_by_other_numbers_is_measured_again_and_stays(tmp_path):
    cell = Cell(METHODS[0], 0, 0)
    assert find_cell(cell, PLAN, tmp_path) is None
    cell_path(cell, PLAN, tmp_path).write_text('{"load": 1.0}')
    row = {"load": 1.0, **cell.labels()}
    assert row["method"] == LORA and row["noun"] == "robot"
    assert find_cell(cell, PLAN, tmp_path) == row
    assert find_cell(cell, replace(PLAN, seeds=7), tmp_path) == row
    for other in (replace(PLAN, steps=77), quick(PLAN)):
        assert find_cell(cell, other, tmp_path) is None
        assert cell_path(cell, other, tmp_path) != cell_path(cell, PLAN, tmp_path)


def test_a_weight_of_the_sweep_that_becomes_the_methods_own_is_not_measured_again(tmp_path):
    found = [method for method in sweep_methods() if method.sweep == PPT_LORA]
    (of_sweep,) = [method for method in found if method.anchor_weight == 0.1]
    own = replace(of_sweep, name=PPT_LORA)
    cell_path(Cell(of_sweep, 0, 0), PLAN, tmp_path).write_text("{}")
    assert find_cell(Cell(own, 0, 0), PLAN, tmp_path)["method"] == PPT_LORA


def test_a_cell_is_held_by_one_process_and_free_when_that_is_killed(tmp_path):
    path = tmp_path / "work" / "cell.json"
    path.parent.mkdir()
    code = "import fcntl, sys, time; file = open(sys.argv[1], 'ab'); fcntl.flock(file, 2);"
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code + "print(True, flush=True); time.sleep(60)",
            path.parent / "cell.lock",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "True\n"
    with hold_cell(path) as held:
        assert not held
    other.kill()
    other.communicate()
    with hold_cell(path) as held:
        assert held
        path.write_text("{}")
    assert [each.name for each in path.parent.iterdir()] == ["cell.json"]


def measured(monkeypatch, tmp_path, run_cell):
    """Measure two cells, base and lora, by something that stands in for `run_cell`."""
    monkeypatch.setattr(bench_preservation, "run_cell", run_cell)
    plan = Plan(subjects=1, seeds=1)
    return bench_preservation.measure_all(plan, METHODS[:1], tmp_path, Console(quiet=True))


def kept(cell, plan, work):
    cell_path(cell, plan, work).write_text('{"cpu seconds": 1.0}')
    return {"cpu seconds": 1.0}


def test_a_cell_that_another_process_holds_is_left_to_it(monkeypatch, tmp_path):
    base = list_cells(Plan(subjects=1, seeds=1), [])[0]
    taken = []

    def run_cell(cell, plan, work):
        taken.append(cell.labels()["method"])
        return kept(cell, plan, work)

    with hold_cell(cell_path(base, Plan(1, 1), tmp_path)) as held:
        assert held and measured(monkeypatch, tmp_path, run_cell) is None
    assert taken == [LORA]
    rows = measured(monkeypatch, tmp_path, run_cell)
    assert taken == [LORA, "base"] and [row["method"] for row in rows] == ["base", LORA]


def test_a_cell_that_fails_stops_no_other_and_is_named(monkeypatch, tmp_path):
    def run_cell(cell, plan, work):
        if cell.method is None:
            raise ArithmeticError("not finite")
        return kept(cell, plan, work)

    with pytest.raises(SystemExit, match=r"failed.*robot, base, seed 0"):
        measured(monkeypatch, tmp_path, run_cell)
    rows = measured(monkeypatch, tmp_path, kept)
    assert [row["method"] for row in rows] == ["base", LORA]


def test_a_method_that_is_not_there_is_refused_by_name():
    with pytest.raises(SystemExit, match="no 'lorra'"):
        bench_preservation.choose_methods(["lora", "lorra"], with_sweep=False)
    assert [m.name for m in bench_preservation.choose_methods(["apt"], with_sweep=False)] == ["apt"]
    assert [m.name for m in bench_preservation.choose_methods(["apt"], with_sweep=True)] == ["apt"]
    chosen = bench_preservation.choose_methods([PPT_LORA], with_sweep=True)
    assert {method.anchor_weight for method in chosen} == set(SWEEPS[PPT_LORA])
    assert {method.sweep for method in chosen} == {PPT_LORA}


def test_the_mini_model_is_of_the_family_whose_stages_are_taken():
    from fastppt.config import ModelConfig

    assert detect_family(ModelConfig(path="mini-sdxl")) == METHODS[0].family


def test_anchor_weights_are_those_that_the_committed_numbers_calibrate():
    newest = max((ROOT / "bench" / "results").glob("cpu-preservation-*.json"))
    weights = {PPT_LORA: LORA_ANCHOR_WEIGHT, PPT_DREAMBOOTH: FULL_ANCHOR_WEIGHT}
    assert json.loads(newest.read_text())["calibrated anchor weights"] == weights


def test_recipes_have_for_the_mini_model_what_was_calibrated():
    seen = {}
    for method in METHODS:
        if method.name != method.recipe or method.family != "sdxl":
            continue
        (own,) = [
            variant["settings"]
            for variant in tomllib.loads(recipe_text(method.recipe))["variant"]
            if variant.get("models") == ["mini-sdxl"]
        ]
        measured = Plan(1, 1).settings_of(method)
        assert own.items() <= measured.items(), method.name
        # All that is measured, but for how class images are sampled.
        assert all("prior_preservation" in key for key in measured.keys() - own.keys())
        seen[method.name] = own.get(ANCHOR_WEIGHT)
    assert seen[PPT_LORA] == LORA_ANCHOR_WEIGHT and len(seen) == 9


def test_the_demo_holds_by_the_calibrated_weight():
    lines = (ROOT / "Makefile").read_text().splitlines()
    (train,) = [line for line in lines if f"--recipe {PPT_LORA}" in line]
    (both,) = [line for line in lines if line.startswith("DEMO_RUN")]
    # What the recipe has for the model, that is.
    assert "--model mini-sdxl" in both and "anchor" not in both + train
    assert not {"--rank", "--learning-rate", "--set"} & {*both.split(), *train.split()}


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
