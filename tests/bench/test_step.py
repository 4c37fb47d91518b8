import json
import math
import time

import pytest
import torch

from bench import step as step_bench
from bench import step_ways
from bench.rows import find_row
from bench.step import StepWay, time_steps
from bench.step_rows import (
    CPU_MAIN,
    MAIN,
    PEER,
    describe_work,
    list_cpu_targets,
    list_gpu_targets,
    print_steps,
)
from bench.step_ways import BASE_PASS, NETWORK, PEERS, RECIPES, Work, compare_notes
from bench.time_limit import at_most
from fastppt.config_io import build_config

PEER_NAME, CACHED_NAME = list(PEERS)[:2]
WAYS = [
    *(StepWay(recipe) for recipe in RECIPES),
    StepWay(PEER_NAME),
    StepWay(CACHED_NAME),
    StepWay(NETWORK),
    StepWay(BASE_PASS),
]


@pytest.fixture
def time_mini(photos):
    def time_them(ways):
        work = Work("mini-sdxl", rank=4)
        return time_steps(work, ways, photos, device="cpu", seconds=0.01)

    return time_them


@pytest.mark.slow
def test_every_way_gets_a_row_with_its_costs(time_mini):
    rows, refusals = time_mini(WAYS)
    assert not refusals
    assert [row["way"] for row in rows] == [str(way) for way in WAYS]
    found = {row["recipe"]: row for row in rows}
    for row in rows:
        assert row["suite"] == "step" and row["resolution"] == 64 and row["dtype"] == "float32"
        assert 0 < row["p20 ms"] <= row["p50 ms"] <= row["p80 ms"]
        assert row["kernels"] > 0 and row["host launches"] is row["peak bytes"] is None
        assert row["tflop/s"] == pytest.approx(row["flops"] / row["p50 ms"] / 1e9)
        assert row["share of product"] == pytest.approx(row["tflop/s"] / row["product tflop/s"])
        assert row["first step s"] > 0
    assert found["lora"]["times ours"] == found[NETWORK]["network share"] == 1
    # The work of the network is the same, whoever trains it; APT asks the base, too.
    flops = found["lora"]["flops"]
    assert found["ppt-lora"]["flops"] == found[PEER_NAME]["flops"] == flops
    assert found["apt"]["flops"] == flops + found[BASE_PASS]["flops"]
    # Text encoders that learn are work of their own.
    with_text = found["apt-base"]["flops"]
    assert with_text > flops
    assert found["apt-recipe"]["flops"] == with_text + found[BASE_PASS]["flops"]
    assert found[BASE_PASS]["flops"] < found[NETWORK]["flops"] < flops
    assert found["lora"]["kernels"] < found[CACHED_NAME]["kernels"]
    print_steps(rows)


def test_a_peer_that_disagrees_is_refused_and_gets_no_time(monkeypatch, time_mini):
    class WrongPeer(step_ways.DiffusersStep):
        def loss(self, photos, draws=None):
            return 1.01 * super().loss(photos, draws)

    monkeypatch.setattr(step_ways, "DiffusersStep", WrongPeer)
    rows, refusals = time_mini([StepWay("lora"), StepWay(CACHED_NAME)])
    assert [row["recipe"] for row in rows] == ["lora"]
    (refusal,) = refusals
    assert refusal["recipe"] == CACHED_NAME
    assert "no time is reported" in refusal["refused"]


@pytest.mark.parametrize("wrong", ["loss", "grad_norm", None])
def test_an_engine_that_disagrees_with_eager_steps_is_refused(monkeypatch, time_mini, wrong):
    notes = step_ways.TrainerStep.first_notes

    def change(self):
        found = notes(self)
        if wrong is not None and self.config.engine == "compile":
            found[-1][wrong] *= 1.01
        return found

    monkeypatch.setattr(step_ways.TrainerStep, "first_notes", change)
    # Nothing is compiled: what is tested is the comparison.
    monkeypatch.setattr(step_ways, "prepare_engine", lambda *arguments: None)
    rows, refusals = time_mini([StepWay("lora", "compile")])
    if wrong is None:
        assert not refusals and rows[0]["kernels"] is None
    else:
        assert not rows and wrong in refusals[0]["refused"]


def test_a_loss_that_is_not_finite_is_refused(monkeypatch, time_mini):
    check = step_bench.check_peer
    monkeypatch.setattr(step_bench, "check_peer", lambda *a: check(*a) | {"loss": math.nan})
    rows, refusals = time_mini([StepWay("lora"), StepWay(CACHED_NAME)])
    assert len(rows) == len(refusals) == 1


def replace_peer(monkeypatch, make):
    """Make a way of another kind fail or wait."""
    whole = step_bench._Bench.make
    monkeypatch.setattr(
        step_bench._Bench,
        "make",
        lambda bench, way: make() if way.recipe in PEERS else whole(bench, way),
    )


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_of_any_step_is_past_every_tolerance(place):
    wanted = [{"loss": 0.5, "grad_norm": 2.0} for _ in range(3)]
    found = [dict(notes) for notes in wanted]
    assert compare_notes(found, wanted) == {"loss": 0.0, "grad_norm": 0.0}
    found[place]["grad_norm"] = math.nan
    errors = compare_notes(found, wanted)
    assert errors["loss"] == 0.0 and math.isnan(errors["grad_norm"])


def test_a_way_that_dies_is_named_and_the_others_are_timed(monkeypatch, time_mini):
    def fail():
        raise RuntimeError("illegal memory access\nmore")

    replace_peer(monkeypatch, fail)
    rows, refusals = time_mini([StepWay(PEER_NAME), StepWay("lora")])
    assert [row["recipe"] for row in rows] == ["lora"] and rows[0]["p50 ms"] > 0
    assert [row["refused"] for row in refusals] == ["RuntimeError: illegal memory access"]


@pytest.mark.slow
def test_ways_made_before_the_time_is_up_are_timed(monkeypatch, photos):
    ways = [StepWay("lora"), StepWay(CACHED_NAME), StepWay(BASE_PASS)]
    replace_peer(monkeypatch, lambda: time.sleep(60))
    start = time.monotonic()
    with at_most(30):
        rows, refusals = time_steps(
            *(Work("mini-sdxl", rank=4), ways, photos),
            device="cpu",
            seconds=0.01,
            most_seconds=20,
        )
    assert time.monotonic() - start < 20
    assert [row["recipe"] for row in rows] == ["lora"] and rows[0]["p50 ms"] > 0
    assert [row["recipe"] for row in refusals] == [CACHED_NAME, BASE_PASS]
    assert {row["refused"] for row in refusals} == {"the time was up"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_engine_that_the_device_lacks_is_refused_with_the_reason(time_mini):
    rows, refusals = time_mini([StepWay("lora", "graph"), StepWay("lora")])
    assert [row["engine"] for row in rows] == ["eager"]
    assert "GPU" in refusals[0]["refused"]


@pytest.mark.slow
def test_the_command_leaves_rows_and_targets(tmp_path, capsys):
    arguments = ["--model", "mini-sd", "--recipe", "lora", "--engine", "eager", "--rank", "2"]
    arguments += [
        "--resolution",
        "32",
        "--batch",
        "2",
        "--seconds",
        "0.01",
        "--ours-only",
        "--base-pass",
    ]
    assert step_bench.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("cpu-step-")
    report = json.loads(path.read_text())
    row, *passes = report["rows"]
    assert [each["way"] for each in passes] == ["sequential", "batched"]
    assert describe_work(row) == "mini-sd, 32 pixels, batch 2, rank 2"
    assert report["refused"] == report["targets"] == []
    assert "mini-sd, 32 pixels" in capsys.readouterr().out


def row_of(labels, way, milliseconds, **costs):
    values = {"p50 ms": milliseconds, "times ours": milliseconds / 50}
    return labels | {"way": way, "recipe": way.partition(",")[0]} | values | costs


def test_cpu_targets_are_ratios_over_both_kinds_of_peer():
    labels = CPU_MAIN | {"resolution": 64}
    rows = [
        row_of(labels, "lora, eager", 50.0),
        row_of(labels, PEER, 75.0),
        row_of(labels, "diffusers-style, latents cached, eager", 60.0),
        row_of(labels | {"batch": 2}, "lora, eager", 50.0),
    ]
    targets = list_cpu_targets(rows)
    assert [t["measured"] for t in targets] == pytest.approx([1.5, 1.2])
    assert [t["met"] for t in targets] == [True, False]
    assert list_cpu_targets([]) == []


def test_what_apt_costs_is_measured_in_base_passes_beside_the_same_trainables():
    labels = CPU_MAIN | {"resolution": 64}
    rows = [
        row_of(labels, "lora, eager", 50.0),
        row_of(labels, "apt-base, eager", 60.0),
        row_of(labels, "apt-recipe, eager", 86.0),
        row_of(labels, "base pass alone, eager", 20.0),
    ]
    cost = list_cpu_targets(rows)[-1]
    assert cost["what"].endswith("recipe apt's step - recipe apt-base's, in base passes, at most")
    assert (cost["measured"], cost["met"]) == (pytest.approx(1.3), False)
    assert len(list_cpu_targets(rows[:-1])) == 2


def test_gpu_targets_compare_like_with_like():
    assert [target["met"] for target in list_gpu_targets([])] == [None] * 7
    rows = [
        row_of(MAIN, "lora, graph", 50.0, **{"peak bytes": 10}),
        row_of(MAIN, "ppt-lora, graph", 50.2),
        row_of(MAIN, "apt, graph", 75.0, **{"peak bytes": 11}),
        row_of(MAIN, "base pass alone, graph", 20.0),
        row_of(MAIN, "apt-base, graph", 60.0),
        row_of(MAIN, "apt-recipe, graph", 82.0),
        row_of(MAIN, PEER, 150.0),
        row_of(MAIN, "lora, graph+compile", 40.0),
    ]
    targets = list_gpu_targets([row_of(MAIN | {"batch": 2}, "lora, graph", 1.0), *rows])
    assert [t["measured"] for t in targets] == pytest.approx(
        [3.0, 50.0, 40.0, 1.004, 1.25, 1.1, 1.1]
    )
    assert [t["met"] for t in targets] == [True, True, True, True, False, True, False]
    assert find_row(rows, **MAIN)["way"] == "lora, graph"


@pytest.mark.gpu
def test_on_a_gpu_every_engine_and_peer_gets_a_row(photos):
    ways = [
        StepWay("lora", "graph"),
        StepWay("apt", "graph"),
        StepWay("lora"),
        StepWay(BASE_PASS, "graph"),
        *(StepWay(peer) for peer in PEERS),
    ]
    work = Work("mini-sdxl", rank=4)
    rows, refusals = time_steps(work, ways, photos, device="cuda", seconds=0.1)
    assert not refusals and len(rows) == len(ways)
    for row in rows:
        assert row["dtype"] == "bfloat16"
        assert row["kernels"] > 0 and row["peak bytes"] >= 0
    assert rows[0]["host launches"] < 20 < rows[2]["host launches"]
    assert rows[0]["kernels"] > 100


@pytest.mark.parametrize("recipe", ["lora", "apt-recipe"])
def test_every_lora_of_a_recipe_has_the_rank_that_is_reported(recipe):
    name, _ = RECIPES[recipe]
    settings = step_ways.rank_settings(name, 5)
    config = build_config(name, settings=[("model.path", "mini-sdxl"), *settings.items()])
    trainables = config.stage[0].trainables
    ranks = [each.rank for each in (trainables.lora, trainables.text_encoder_lora) if each]
    assert ranks == [5] * (1 if recipe == "lora" else 2)
