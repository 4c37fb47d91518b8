import math

import pytest

from bench.bench_preservation import make_report
from bench.preservation_cells import (
    summarise_indicator,
)
from bench.preservation_claims import (
    INDICATOR,
    MONOTONE,
    OTHER_CLASSES,
    PARTS,
    RARE,
    answer_claims,
    calibrate,
    weigh_sweep,
)
from bench.preservation_plan import (
    APT,
    APT_ATA,
    APT_ATA_RS,
    APT_BASE,
    DREAMBOOTH,
    DREAMBOOTH_PRIOR,
    LORA,
    LORA_PRIOR,
    METHODS,
    PPT_DREAMBOOTH,
    PPT_LORA,
    RARE_TOKEN,
    WITHOUT_ADAPTING,
    WITHOUT_FEATURES,
    Plan,
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
from bench.preservation_tables import preservation_table

SUBJECTS, SEEDS = range(3), range(2)
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


def made(method, *, sweep=None, weight=None, shift=0.0, indicator=None, seconds=0.0, **numbers):
    """Cells of a method on every subject and seed; they vary by subject, and a little by seed."""
    return [
        {
            "method": method,
            "subject": subject,
            "seed": seed,
            "sweep": sweep,
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


def sweep(drifts, fidelities=(0.9, 0.88, 0.86, 0.7), swept=PPT_LORA, unheld=LORA):
    """Cells of weights 0, 0.1, 1 and 10 of a method with these drifts."""
    cells = []
    for weight, drift, fidelity in zip((0.0, 0.1, 1.0, 10.0), drifts, fidelities, strict=True):
        numbers = dict.fromkeys(("parameter_distance", "class_noise", "other_noise"), drift)
        name = unheld if weight == 0 else f"{swept}, weight {weight:g}"
        cells += made(name, sweep=swept, weight=weight, subject_fidelity=fidelity, **numbers)
    return cells


def test_a_drift_that_falls_with_every_weight_is_monotone():
    row = verdict(sweep((4.0, 3.0, 2.0, 1.0)), MONOTONE)
    assert row["verdict"] == HOLDS and len(row["parts"]) == 9 + 3
    assert [part["difference"] for part in row["parts"]] == pytest.approx([-1.0] * 9 + [-3.0] * 3)
    # From end to end stands beside it.
    assert [part["verdict"] for part in row["parts"]] == [HOLDS] * 9 + [None] * 3
    assert row["beside"][f"{PPT_LORA}, parameter_distance falls throughout"] == "6 of 6"


def test_a_drift_that_rises_once_is_not_monotone():
    row = verdict(sweep((4.0, 3.0, 3.5, 1.0)), MONOTONE)
    assert row["verdict"] == FAILS
    assert [p["what"] for p in row["parts"] if p["verdict"] == FAILS] == [
        f"{PPT_LORA}, {name}, weight 1 minus 0.1"
        for name in ("parameter_distance", "class_noise", "other_noise")
    ]
    assert row["beside"][f"{PPT_LORA}, class_noise falls throughout"] == "0 of 6"
    assert verdict(sweep((4.0, 3.0, 3.0, 1.0)), MONOTONE)["verdict"] == NOT_SHOWN


def test_the_sweeps_of_both_ways_of_training_are_held_to_the_claim():
    falling, rising = (4.0, 3.0, 2.0, 1.0), (4.0, 3.0, 3.5, 1.0)

    def both(lora, whole):
        cells = sweep(whole, swept=PPT_DREAMBOOTH, unheld=DREAMBOOTH)
        return verdict([*sweep(lora), *cells], MONOTONE)

    row = both(falling, falling)
    assert row["verdict"] == HOLDS and len(row["parts"]) == 2 * (9 + 3)
    row = both(falling, rising)
    assert row["verdict"] == FAILS
    assert {p["what"].split(",")[0] for p in row["parts"] if p["verdict"] == FAILS} == {
        PPT_DREAMBOOTH
    }
    assert row["beside"][f"{PPT_LORA}, other_noise falls throughout"] == "6 of 6"
    assert row["beside"][f"{PPT_DREAMBOOTH}, other_noise falls throughout"] == "0 of 6"


def others(ours, theirs):
    numbers = [{"other_noise": drift, "other_frechet": drift} for drift in (ours, theirs)]
    return [
        *made(PPT_LORA, sweep=PPT_LORA, weight=0.01, **numbers[0]),
        *made(LORA_PRIOR, seconds=7.0, **numbers[1]),
        *made(PPT_DREAMBOOTH, sweep=PPT_DREAMBOOTH, weight=0.01, **numbers[0]),
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


def test_the_anchor_is_held_against_prior_preservation_where_as_much_is_learned():
    drifts, fidelities = (4.0, 3.0, 2.0, 1.0), (0.9, 0.8, 0.6, 0.1)
    held = [
        {**cell, "numbers": cell["numbers"] | {"other_frechet": cell["numbers"]["other_noise"]}}
        for cell in sweep(drifts, fidelities)
    ]
    whole = [cell for cell in others(1.0, 5.0) if cell["method"].endswith(DREAMBOOTH)]
    whole += made(DREAMBOOTH_PRIOR, other_noise=5.0, other_frechet=5.0)

    def against(prior, fidelity):
        cells = made(LORA_PRIOR, subject_fidelity=fidelity, other_noise=prior, other_frechet=prior)
        row = verdict([*held, *whole, *cells, *made(PPT_LORA, other_noise=0.0)], OTHER_CLASSES)
        decided = [part for part in row["parts"] if part["verdict"] is not None]
        return row["verdict"], decided[0]["what"], round(decided[0]["difference"], 6)

    found = against(2.5, 0.62)
    assert found == (HOLDS, f"other_noise, {PPT_LORA}, weight 1 minus {LORA_PRIOR}", -0.5)
    # A weight that learns nothing keeps other classes better than this, and does not count.
    found = against(1.5, 0.62)
    assert found == (FAILS, f"other_noise, {PPT_LORA}, weight 1 minus {LORA_PRIOR}", 0.5)
    # Without an anchor there is none to hold.
    assert against(3.5, 0.95)[1] == f"other_noise, {PPT_LORA}, weight 0.1 minus {LORA_PRIOR}"


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


def parts(added, taken=(1.0, 1.0)):
    """Cells of apt-base and of each part added to it, and of apt with one part taken away."""
    cells = []
    for name, drift in zip((APT_BASE, APT_ATA, APT_ATA_RS, APT), added, strict=True):
        cells += made(name, class_noise=drift, other_noise=drift)
    for method, drift in zip((WITHOUT_ADAPTING, WITHOUT_FEATURES), taken, strict=True):
        cells += made(method.name, class_noise=drift, other_noise=drift)
    return cells


def test_each_part_of_apt_must_lower_the_drift_where_it_is_added():
    row = verdict(parts((4.0, 3.0, 2.0, 1.0)), PARTS)
    assert row["verdict"] == HOLDS
    assert [part["difference"] for part in row["parts"]] == pytest.approx([-1.0] * 6 + [0.0] * 7)
    row = verdict(parts((4.0, 2.0, 3.0, 1.0)), PARTS)
    assert row["verdict"] == FAILS
    assert {part["what"] for part in row["parts"] if part["verdict"] == FAILS} == {
        f"{name}, {APT_ATA_RS} minus {APT_ATA}" for name in ("class_noise", "other_noise")
    }
    assert verdict(parts((4.0, 2.0, 2.0, 1.0)), PARTS)["verdict"] == NOT_SHOWN
    # What a part does among the others stands beside it.
    row = verdict(parts((4.0, 3.0, 2.0, 1.0), taken=(0.5, 3.0)), PARTS)
    assert row["verdict"] == HOLDS
    assert [p["difference"] for p in row["parts"][9:]] == pytest.approx([0.5, 0.5, -2.0, -2.0])


def test_the_rare_token_must_be_better_in_what_is_learned_and_in_what_is_kept():
    better = {"subject_fidelity": 0.7, "subject_context": 0.6, "class_noise": 0.5}
    assert verdict(made(RARE_TOKEN, **better) + made(DREAMBOOTH), RARE)["verdict"] == HOLDS
    worse = {**better, "class_noise": 1.5}
    assert verdict(made(RARE_TOKEN, **worse) + made(DREAMBOOTH), RARE)["verdict"] == FAILS


def weighed(drifts, fidelities):
    """Cells of the base, of LoRA and of weights 0.1, 1 and 10 with these means."""
    base = [{**cell, "seconds": {"whole": 1.0}} for cell in made("base", subject_fidelity=0.4)]
    mean = mean_over_subjects(made(LORA, other_frechet=0.0), number("other_frechet")).mean
    cells = sweep((1.0,) * 4, fidelities)
    for weight, drift in zip((0.0, 0.1, 1.0, 10.0), drifts, strict=True):
        for cell in cells:
            if cell["anchor weight"] == weight:
                cell["numbers"]["other_frechet"] += drift - mean - PLAIN["other_frechet"]
    return base + cells


def test_a_weight_is_weighed_by_what_it_keeps_and_what_it_takes_away():
    rows = weigh_sweep(weighed((4.0, 3.0, 2.0, 1.0), (0.9, 0.88, 0.86, 0.7)), PPT_LORA)
    assert [row["weight"] for row in rows] == [0.1, 1.0, 10.0]
    assert [row["kept"] for row in rows] == pytest.approx([0.96, 0.92, 0.6], abs=0.01)
    assert [row["taken"] for row in rows] == pytest.approx([0.25, 0.5, 0.75], abs=0.01)
    assert [row["balance"] for row in rows] == pytest.approx([0.397, 0.648, 0.667], abs=0.01)
    falling = weighed((4.0, 5.0, 3.9, 1.0), (0.9, 0.88, 0.86, 0.3))
    assert [row["balance"] > 0 for row in weigh_sweep(falling, PPT_LORA)] == [False, True, False]


def test_the_calibrated_weight_is_the_one_of_the_best_balance():
    drifts = (4.0, 3.0, 2.0, 1.0)
    assert calibrate(weighed(drifts, (0.9, 0.88, 0.86, 0.7)), PPT_LORA) == 10.0
    assert calibrate(weighed(drifts, (0.9, 0.88, 0.86, 0.5)), PPT_LORA) == 1.0
    # Nothing is taken away; LoRA gains nothing; there is no base.
    assert calibrate(weighed((4.0, 5.0, 5.0, 5.0), (0.9, 0.88, 0.86, 0.7)), PPT_LORA) is None
    assert calibrate(weighed(drifts, (0.3, 0.3, 0.3, 0.3)), PPT_LORA) is None
    assert calibrate(sweep(drifts), PPT_LORA) is None
    # Each sweep by its own cells.
    assert calibrate(weighed(drifts, (0.9, 0.88, 0.86, 0.7)), PPT_DREAMBOOTH) is None


def table_of(cells):
    timed = [{**cell, "cpu seconds": 1.0} for cell in cells]
    return preservation_table(make_report(timed, Plan(3, 2), METHODS[:1]), "a machine")


def test_the_table_says_what_each_weight_keeps_and_which_is_calibrated():
    table = table_of(weighed((4.0, 3.0, 2.0, 1.0), (0.9, 0.88, 0.86, 0.7)))
    assert f"| {PPT_LORA} | 0.1 | 0.96 | 0.25 | 0.40 |" in table
    assert f"| {PPT_LORA} | 10 | 0.60 | 0.75 | 0.67 |" in table
    told = f"The anchor weights that these numbers calibrate for mini-sdxl: {PPT_LORA} 10."
    assert table.endswith(told)
    assert "calibrate" not in table_of(made("base"))


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
