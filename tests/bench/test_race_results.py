import json

import pytest

from bench.race_ratios import compare, make_report
from bench.race_results import (
    CACHED,
    PHASES,
    STEP,
    TOTAL,
    Entrant,
    RaceSettings,
    Round,
    StepTimes,
    read_race,
    write_race,
)
from fastppt.config_io import RECIPES, load_recipe

SETTINGS = RaceSettings(
    model="mini-sdxl",
    family="sdxl",
    resolution=64,
    batch_size=1,
    precision="float32",
    rank=4,
    steps=10,
    class_images=4,
    sampler_steps=2,
    guidance_scale=5.0,
    num_photos=5,
    seed=0,
    rounds=2,
    threads=1,
)
PEER, LORA_PRIOR, PPT_EAGER, PPT_GRAPH = "peer", "lora-prior, eager", "ppt, eager", "ppt, graph"


def make_round(training, step=None, **phases):
    times = None if step is None else StepTimes(p20=step, p50=step, p80=step)
    return Round(phases={"training": training, **phases}, steps=10, step_s=times)


def make_entrant(name, rounds, kind="ours", **fields):
    return Entrant(
        name=name, kind=kind, rounds=rounds, **{"engine": "eager", "prior": False} | fields
    )


@pytest.fixture
def entrants():
    """Class images of 60 s and 40 s a training, 30 without them, 15 and 5 for another method."""
    return [
        make_entrant(
            PEER,
            [make_round(40.0, 4.0, class_images=60.0)] * 2,
            kind="diffusers",
            prior=True,
        ),
        make_entrant(
            LORA_PRIOR,
            [make_round(30.0, 3.0, class_images=50.0)] * 2,
            recipe="lora-prior",
            prior=True,
        ),
        make_entrant(PPT_EAGER, [make_round(16.0, 1.5), make_round(14.0, 1.5)], recipe="ppt-lora"),
        make_entrant(PPT_GRAPH, [make_round(5.0, 0.5)] * 2, recipe="ppt-lora", engine="graph"),
    ]


def test_a_race_that_was_written_is_read_again(entrants, tmp_path):
    path = tmp_path / "results" / "race.json"
    report = make_report({"cpu": "one"}, SETTINGS, entrants, "python -m bench.race")
    write_race(path, report)
    found = read_race(path)
    assert found.entrants == report.entrants and found.settings == SETTINGS
    assert [(r.of, r.against, r.what) for r in found.ratios] == [
        (r.of, r.against, r.what) for r in report.ratios
    ]
    assert json.loads(path.read_text())["kind"] == "race"


def test_what_is_no_race_is_refused_by_file_and_key(entrants, tmp_path):
    path = tmp_path / "race.json"
    with pytest.raises(ValueError, match=r"race\.json: no such file"):
        read_race(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"race\.json: not JSON"):
        read_race(path)
    write_race(path, make_report({}, SETTINGS, entrants))
    table = json.loads(path.read_text())
    table["entrants"][1]["rounds"][0]["phases"]["lunch"] = 1.0
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"race\.json: not a race: entrants\.1\.rounds\.0\.phases"):
        read_race(path)


def test_phases_are_in_the_order_of_a_job_and_add_up():
    found = Round(phases=dict.fromkeys(reversed(PHASES), 1.0), steps=3)
    assert tuple(found.phases) == PHASES
    assert found.seconds(TOTAL) == 7.0 and found.seconds(CACHED) == 6.0
    assert found.seconds(STEP) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"phases": {"load": 1.0}}, "phases.training is missing"),
        ({"peak_memory_bytes": 5}, "go together"),
        ({"extrapolated": ["save"]}, "no phase 'save'"),
        ({"taken_from": {"class_images": "x"}}, "no phase 'class_images'"),
        ({"phases": {"training": -1.0}}, "greater than or equal to 0"),
    ],
)
def test_a_round_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Round(**{"phases": {"training": 1.0}, "steps": 3} | fields)


def test_two_entrants_of_one_name_are_refused(entrants):
    with pytest.raises(ValueError, match="two are called 'peer'"):
        make_report({}, SETTINGS, [entrants[0], *entrants])


def test_a_ratio_is_the_baselines_seconds_over_ones_own_round_by_round(entrants):
    peer, _, eager, graph = entrants
    total = compare(eager, peer, TOTAL)
    assert (total.low, total.high) == (pytest.approx(100 / 16), pytest.approx(100 / 14))
    assert total.value == pytest.approx((100 / 16 + 100 / 14) / 2)
    cached = compare(eager, peer, CACHED)
    assert (cached.low, cached.high) == (pytest.approx(40 / 16), pytest.approx(40 / 14))
    assert compare(graph, peer, STEP).value == pytest.approx(8.0)


def test_a_single_round_reaches_as_far_as_its_steps_and_batches_do():
    times = StepTimes(p20=0.9, p50=1.0, p80=1.2)
    alone = make_round(10.0, class_images=20.0).model_copy(update={"step_s": times})
    # Training reaches from 9 to 12 s, class images from 10 to 30.
    batches = StepTimes(p20=2.0, p50=4.0, p80=6.0)
    found = alone.model_copy(update={"batch_s": batches})
    assert found.reach(TOTAL) == pytest.approx((19.0, 42.0))
    assert found.reach(CACHED) == pytest.approx((9.0, 12.0))
    assert found.reach(STEP) == (0.9, 1.2)
    assert alone.reach(TOTAL) is None and make_round(10.0).reach(CACHED) is None

    peer = make_entrant("peer", [found], kind="diffusers", prior=True)
    mine = make_entrant("mine", [make_round(5.0).model_copy(update={"step_s": times})])
    ratio = compare(mine, peer, TOTAL)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((19 / 6, 6.0, 42 / 4.5))
    twice = make_entrant("mine", mine.rounds * 2), make_entrant("peer", [found] * 2)
    assert compare(*twice, TOTAL).low == pytest.approx(6.0)


def test_a_slow_round_leaves_its_ratio_as_it_is(entrants):
    peer = make_entrant(PEER, [make_round(40.0), make_round(80.0)], kind="diffusers", prior=True)
    mine = make_entrant("mine", [make_round(10.0), make_round(20.0)])
    ratio = compare(mine, peer, TOTAL)
    assert (ratio.low, ratio.value, ratio.high) == (4.0, 4.0, 4.0)


def test_an_entrant_of_fewer_rounds_is_compared_by_its_median(entrants):
    peer = make_entrant("other", [make_round(36.0)], kind="external", prior=True)
    ratio = compare(entrants[2], peer, TOTAL)
    assert (ratio.low, ratio.high) == (pytest.approx(36 / 16), pytest.approx(36 / 14))


def test_steps_that_one_of_the_two_did_not_time_have_no_ratio(entrants):
    untimed = make_entrant("untimed", [make_round(1.0, 0.1), make_round(1.0)])
    assert compare(untimed, entrants[0], STEP) is None
    assert compare(untimed, entrants[0], TOTAL) is not None


def test_only_others_with_prior_preservation_are_what_ratios_are_against(entrants):
    plain = make_entrant("plain peer", [make_round(20.0)] * 2, kind="diffusers")
    external = make_entrant("other", [make_round(20.0)] * 2, kind="external", prior=True)
    report = make_report({}, SETTINGS, [*entrants, plain, external])
    assert {ratio.against for ratio in report.ratios} == {PEER, "other"}
    assert not any(ratio.of == ratio.against for ratio in report.ratios)
    assert {r.of for r in report.ratios if r.against == PEER} == {
        *(LORA_PRIOR, PPT_EAGER, PPT_GRAPH, "plain peer", "other")
    }


def test_trainer_method_and_engine_make_up_the_whole(entrants):
    report = make_report({}, SETTINGS, entrants)
    (step,) = [d for d in report.decomposition if (d.recipe, d.what) == ("ppt-lora", STEP)]
    assert step.trainer.value == pytest.approx(4 / 3)
    assert step.method.value == pytest.approx(2.0)
    assert step.engine.value == pytest.approx(3.0)
    assert step.eager.value == pytest.approx(step.trainer.value * step.method.value)
    assert step.whole.value == pytest.approx(step.eager.value * step.engine.value)
    assert step.whole.of == PPT_GRAPH


def test_what_an_engine_adds_to_itself_is_nothing_and_has_no_spread():
    def spread(seconds):
        times = StepTimes(p20=0.9 * seconds, p50=seconds, p80=1.2 * seconds)
        return [Round(phases={"training": 10 * seconds}, steps=10, step_s=times)]

    peer = make_entrant(PEER, spread(4.0), kind="diffusers", prior=True)
    own = make_entrant(PPT_EAGER, spread(2.0), recipe="ppt-lora")
    parts = make_report({}, SETTINGS, [peer, own]).decomposition
    assert parts and all(part.whole.low < part.whole.high for part in parts)
    assert {(part.engine.low, part.engine.value, part.engine.high) for part in parts} == {(1, 1, 1)}


def test_a_decomposition_needs_the_diffusers_job_and_an_eager_run(entrants):
    peer, prior, eager, graph = entrants
    assert make_report({}, SETTINGS, [prior, eager, graph]).decomposition == []
    assert make_report({}, SETTINGS, [peer, graph]).decomposition == []
    alone = make_report({}, SETTINGS, [peer, eager, graph]).decomposition
    assert [each.recipe for each in alone] == ["ppt-lora"] * 3
    assert all(each.method is None and each.trainer is None for each in alone)


def test_every_counterpart_is_a_recipe_with_class_images():
    from bench.race_ratios import OF_RARE_TOKEN, WITH_CLASS_IMAGES

    assert set(WITH_CLASS_IMAGES) < set(RECIPES)
    for name in {*WITH_CLASS_IMAGES.values(), *OF_RARE_TOKEN.values()}:
        stages = load_recipe(name)[1]["stage"]
        assert all("prior_preservation" in stage["objectives"] for stage in stages)
