import random

import pytest

from bench.race_compare import BETTER, CHANCE, UNTOLD, WITHIN, WORSE, compare_races, judge
from bench.race_spreads import Spread, spread_of
from tests.bench.report_races import (
    LORA_PRIOR,
    MACHINE,
    PEER,
    PPT_EAGER,
    PPT_GRAPH,
    make_entrants,
    make_race,
)


def verdicts(changes):
    return {(change.name, change.what): change.verdict for change in changes}


def test_a_slower_step_is_worse_in_its_phase_its_job_and_its_ratios_and_nowhere_else():
    comparison = compare_races(make_race(make_entrants(ppt_step=0.06)), make_race())
    found = {(change.name, change.what) for change in comparison.worse}
    numbers = {(PPT_EAGER, what) for what in ("training, s", "whole job, s", "step, ms")}
    ratios = {
        (f"{PPT_EAGER} against {PEER}", f"{what}, times as fast")
        for what in ("total", "class images cached", "step")
    }
    assert found == numbers | ratios
    step = next(c for c in comparison.worse if c.what == "step, ms")
    assert step.times == pytest.approx(1.2)
    assert (step.old.median, step.new.median) == pytest.approx((50.0, 60.0))
    assert comparison.machine == pytest.approx(1.0)


def test_a_faster_step_is_better():
    comparison = compare_races(make_race(make_entrants(ppt_step=0.04)), make_race())
    assert comparison.worse == []
    assert verdicts(comparison.numbers)[PPT_EAGER, "step, ms"] == BETTER
    ratio = f"{PPT_EAGER} against {PEER}", "step, times as fast"
    assert verdicts(comparison.ratios)[ratio] == BETTER


def test_what_lies_within_the_spread_is_no_change():
    # The rounds of both reach over 5 %.
    comparison = compare_races(make_race(make_entrants(ppt_step=0.052)), make_race())
    assert verdicts(comparison.numbers)[PPT_EAGER, "step, ms"] == WITHIN


def test_a_slower_machine_changes_seconds_and_no_ratio():
    comparison = compare_races(make_race(make_entrants(pace=1.5)), make_race())
    assert comparison.machine == pytest.approx(1.5)
    assert verdicts(comparison.numbers)[PEER, "training, s"] == WORSE
    assert set(verdicts(comparison.ratios).values()) == {WITHIN}


@pytest.mark.parametrize(
    ("old", "new", "more_is_better", "said"),
    [
        ((1.0, 0.9, 1.1), (1.3, 1.25, 1.35), False, WORSE),
        ((1.0, 0.9, 1.1), (1.3, 1.25, 1.35), True, BETTER),
        ((1.0, 0.9, 1.1), (0.7, 0.65, 0.75), True, WORSE),
        # The larger of both ranges counts, whichever it is of.
        ((1.0, 0.8, 1.2), (1.3, 1.25, 1.35), False, WITHIN),
        ((1.0, 0.95, 1.05), (1.3, 1.1, 1.5), False, WITHIN),
        # No spread at all, and hardly a change.
        ((1.0, 1.0, 1.0), (1.009, 1.009, 1.009), False, WITHIN),
        ((1.0, 1.0, 1.0), (1.02, 1.02, 1.02), False, WORSE),
    ],
)
def test_a_change_is_more_than_the_larger_range_and_one_percent(old, new, more_is_better, said):
    spreads = [Spread(*numbers, is_known=True) for numbers in (old, new)]
    assert judge(*spreads, more_is_better=more_is_better) == said


@pytest.mark.parametrize("rounds", CHANCE)
def test_so_many_unchanged_numbers_are_called_worse_by_chance(rounds):
    generator, tries = random.Random(0), 4000

    def draw():
        return spread_of([generator.gauss(100, 5) for _ in range(rounds)])

    worse = sum(judge(draw(), draw(), more_is_better=False) == WORSE for _ in range(tries))
    assert worse / tries == pytest.approx(CHANCE[rounds], abs=0.012, rel=0.1)


def test_what_became_worse_begins_with_the_largest_change():
    comparison = compare_races(make_race(make_entrants(ppt_step=0.1)), make_race())
    factors = [max(c.times, 1 / c.times) for c in comparison.worse]
    assert factors == sorted(factors, reverse=True) and factors[0] == pytest.approx(2.0)


def test_of_one_round_only_the_step_can_be_told():
    old = make_race(make_entrants(rounds=[1.0]), rounds=1)
    new = make_race(make_entrants(rounds=[1.0], ppt_step=0.1), rounds=1)
    comparison = compare_races(new, old)
    found = verdicts(comparison.numbers)
    assert comparison.by_chance is None
    assert found.pop((PPT_EAGER, "step, ms")) == WORSE
    # 95 % to 110 % of the median lies between the percentiles of the same step.
    for name in (PEER, LORA_PRIOR, PPT_GRAPH):
        assert found.pop((name, "step, ms")) == WITHIN
    assert set(found.values()) == {UNTOLD}


def test_class_images_that_were_sampled_once_have_no_spread():
    race = make_race()
    peer = race.entrant(PEER)
    first = peer.rounds[0].phases["class_images"]
    rounds = [peer.rounds[0]] + [
        each.model_copy(
            update={
                "phases": each.phases | {"class_images": first},
                "taken_from": {"class_images": PEER},
            }
        )
        for each in peer.rounds[1:]
    ]
    entrants = [peer.model_copy(update={"rounds": rounds}), *race.entrants[1:]]
    once = make_race(entrants, sampling_rounds=1)
    found = verdicts(compare_races(once, once).numbers)
    assert found[PEER, "class images, s"] == found[PEER, "whole job, s"] == UNTOLD
    assert found[PEER, "class images cached, s"] == found[PEER, "training, s"] == WITHIN
    ratios = verdicts(compare_races(once, once).ratios)
    assert ratios[f"{PPT_EAGER} against {PEER}", "total, times as fast"] == UNTOLD
    assert ratios[f"{PPT_EAGER} against {PEER}", "step, times as fast"] == WITHIN


def test_races_of_other_work_are_refused_by_the_settings_that_differ():
    with pytest.raises(ValueError, match=r"differ in resolution 128 and 64; steps 100 and 200; "):
        compare_races(make_race(), make_race(resolution=128, steps=100))
    compare_races(make_race(rounds=2, seed=1), make_race())


def test_races_without_a_common_entrant_are_refused():
    old, new = make_race(make_entrants()[:1]), make_race(make_entrants()[2:])
    with pytest.raises(ValueError, match="no entrant in common"):
        compare_races(new, old)


def test_what_only_one_race_has_and_where_machines_and_settings_differ_is_said():
    entrants = make_entrants()
    entrants[2] = entrants[2].model_copy(update={"settings": {"optimizer": "AdamW"}})
    new = make_race(entrants[1:], machine=MACHINE | {"torch": "2.14.0", "load": 3})
    comparison = compare_races(new, make_race(make_entrants()[:3]))
    assert comparison.only_old == [PEER] and comparison.only_new == [PPT_GRAPH]
    assert comparison.machine_keys == {"torch": ("2.13.0", "2.14.0")}
    assert comparison.given == [PPT_EAGER]
    assert comparison.machine is None
