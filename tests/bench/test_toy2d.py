import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from bench import tables, toy2d
from bench.student import mean_and_interval
from bench.toy2d_measures import energy_distance, measure
from bench.toy2d_model import Model, Way, tune, weight_distance
from bench.toy2d_world import CLASSES

PLAN = toy2d.Plan(seeds=1, pretrain_steps=40, tune_steps=4, num_samples=10)
SEED = 1


@pytest.fixture(scope="module")
def start():
    return toy2d.prepare(SEED, PLAN)


def tune_by(start, way, **changes):
    given = {"steps": PLAN.tune_steps, "seed": SEED, "class_points": start.class_points}
    return tune(start.base, start.subject.label, start.points, way, **given | changes)


def values(model):
    return [*model.network.layers.parameters(), model.embeddings]


def are_equal(one, other):
    return all(map(torch.equal, values(one), values(other)))


def test_an_anchor_of_weight_zero_is_the_standard_objective_bit_for_bit(start):
    standard = tune_by(start, toy2d.STANDARD)
    # As a tensor it is not left out, but read in each step.
    zero = Way("anchor", anchor_weight=torch.zeros(()), holds_word=True)
    assert are_equal(tune_by(start, zero), standard)
    assert are_equal(tune_by(start, toy2d.STANDARD), standard)
    assert not are_equal(tune_by(start, toy2d.ANCHORS[0]), standard)


def test_a_larger_anchor_weight_leaves_the_weights_nearer_to_the_base(start):
    ways = [toy2d.STANDARD, *(Way("anchor", anchor_weight=w) for w in (0.1, 1.0, 10.0))]
    distances = [weight_distance(tune_by(start, way, steps=20), start.base) for way in ways]
    assert all(larger > smaller > 0 for larger, smaller in pairwise(distances))


def test_the_anchor_holds_the_word_where_it_is_asked_to(start):
    label = start.subject.label
    moved = []
    for held in (False, True):
        way = Way("anchor", anchor_weight=10.0, holds_word=held)
        word = tune_by(start, way, steps=20).embeddings[-1]
        moved.append((word - start.base.embeddings[label]).norm().item())
    assert moved[1] < 0.5 * moved[0]


def test_the_base_and_the_embeddings_of_classes_stay_as_they_are(start):
    before = [value.clone() for value in values(start.base)]
    tuned = tune_by(start, toy2d.PRIOR)
    assert all(map(torch.equal, values(start.base), before))
    assert torch.equal(tuned.embeddings[:-1], start.base.embeddings)
    alone = tune_by(start, toy2d.WORD_ALONE)
    assert weight_distance(alone, start.base) == 0
    assert not torch.equal(alone.embeddings[-1], start.base.embeddings[start.subject.label])


def test_prior_preservation_trains_on_points_that_the_base_draws_of_the_class(start):
    label = torch.full((toy2d.NUM_CLASS_POINTS,), start.subject.label)
    generator = torch.Generator().manual_seed(SEED)
    toy2d.draw_subject(start.subject.label, generator).draw(toy2d.NUM_POINTS, generator)
    noise = torch.randn(toy2d.NUM_CLASS_POINTS, 2, generator=generator)
    assert torch.equal(start.class_points, start.base.sample(label, noise))
    others = tune_by(start, toy2d.PRIOR, class_points=start.class_points + 1)
    assert not are_equal(others, tune_by(start, toy2d.PRIOR))
    without = tune_by(start, toy2d.STANDARD, class_points=None)
    assert are_equal(without, tune_by(start, toy2d.STANDARD))


def test_class_points_leave_the_draws_of_the_subject_as_they_are(start):
    # So light that the class half moves nothing: what is left is another rounding.
    light = tune_by(start, Way("prior preservation", prior_weight=1e-30))
    both = zip(values(light), values(tune_by(start, toy2d.STANDARD)), strict=True)
    assert all(torch.allclose(ours, theirs, rtol=0, atol=1e-5) for ours, theirs in both)


def test_an_unchanged_model_has_no_drift(start):
    label = start.subject.label
    word = start.base.embeddings[label][None]
    same = replace(start.base, embeddings=torch.cat([start.base.embeddings, word]))
    numbers = measure(same, start.base, start.subject, start.draws, start.base_points)
    gone = {"class drift", "other drift", "class noise difference", "other noise difference"}
    assert {numbers[name] for name in gone | {"weight distance", "word distance"}} == {0.0}
    share = start.subject.share_of(start.base_points[label])
    assert numbers["class share on subject"] == numbers["subject share"] == share


def test_predictions_that_are_shifted_differ_by_the_square_of_the_shift(start):
    network = copy.deepcopy(start.base.network)
    network.layers[-1].bias += torch.tensor([0.3, 0.1])
    word = start.base.embeddings[start.subject.label][None]
    shifted = Model(network, torch.cat([start.base.embeddings, word]))
    numbers = measure(shifted, start.base, start.subject, start.draws, start.base_points)
    for classes in ("class", "other"):
        by_timestep = numbers[f"{classes} noise difference by timestep"]
        assert by_timestep == pytest.approx(10 * [(0.3**2 + 0.1**2) / 2], rel=1e-4)
        assert numbers[f"{classes} drift"] > 0
    assert numbers["weight distance"] == pytest.approx((0.3**2 + 0.1**2) ** 0.5, rel=1e-4)


def test_the_energy_distance_of_two_places_is_the_root_of_twice_their_distance():
    here, there = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]]).repeat(2, 1)
    assert energy_distance(here, there) == pytest.approx(10**0.5)
    assert energy_distance(here, here) == 0
    # E|X - Y| = 1/2, E|X - X'| = 1/2, and of the second none.
    pair = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert energy_distance(pair, pair[:1]) == pytest.approx(0.5**0.5)


def test_the_interval_is_students():
    mean, half = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    assert mean_and_interval([2.0]) == (2.0, None)


def test_the_command_writes_numbers_of_every_way_and_two_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy2d, "Plan", lambda seeds: replace(PLAN, seeds=seeds))
    toy2d.main(["--output", str(tmp_path), "--seeds", "2"])
    assert "anchor, weight 1 " in capsys.readouterr().out
    report_path, picture, sweep = sorted(tmp_path.iterdir())
    assert report_path.name.startswith("cpu-toy2d-2") and report_path.suffix == ".json"
    assert picture.name == report_path.with_suffix(".png").name
    assert sweep.name.startswith("cpu-toy2d-sweep-2")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (picture, sweep))
    report = json.loads(report_path.read_text())
    assert report["machine"]["torch"] and report["plan"]["seeds"] == 2
    assert [row["way"] for row in report["rows"]] == [way.title for way in toy2d.WAYS]
    assert len(report["runs"]) == 2 * len(toy2d.WAYS)
    for row in report["rows"]:
        assert row["subject distance"] > 0 and row["subject distance ±"] > 0
        assert len(row["other noise difference by timestep"]) == 10
        assert (row["class sampling cpu seconds"] > 0) == (row["prior_weight"] > 0)
    pairs = [
        [run["other drift"] for run in report["runs"] if run["way"] == way.title]
        for way in (toy2d.ANCHOR, toy2d.PRIOR)
    ]
    mean = sum(ours - theirs for ours, theirs in zip(*pairs, strict=True)) / 2
    by_name = {row["what"]: row for row in report["anchor minus prior preservation"]}
    assert by_name["other drift"]["difference"] == pytest.approx(mean, rel=2e-3, abs=1e-4)
    assert {row["seeds"] for row in report["sweeps"]} == {2}
    assert {run["class"] for run in report["runs"]} == set(list(CLASSES)[:2])
    table = tables.BLOCKS["toy2d"](tmp_path)
    assert "| anchor, weight 1 |" in table and "in 2 of 2" in table
