"""The papers' claims, answered by the cells of the preservation bench.

A claim has parts, each a difference with its 95 % interval, paired by subject and seed. A part
holds where the whole interval is on the claimed side of zero, does not hold where all of it is on
the other, and is not shown otherwise. A claim holds where all its parts do, and does not where one
does not. Intervals are not widened for the number of parts: by chance alone, one part in 40 that
is really zero lies wholly on the wrong side.
"""

import statistics
from collections.abc import Sequence
from itertools import pairwise

from bench.preservation_plan import (
    APT,
    APT_ADDED,
    APT_TAKEN,
    DREAMBOOTH,
    DREAMBOOTH_PRIOR,
    LORA_PRIOR,
    PPT_DREAMBOOTH,
    PPT_LORA,
    RARE_TOKEN,
    SWEEPS,
)
from bench.preservation_statistics import (
    NOT_SHOWN,
    Difference,
    Value,
    cells_of,
    combine,
    difference,
    mean_over_subjects,
    number,
)
from bench.rows import Row

MONOTONE = "a larger anchor weight lowers parameter and noise drift, from each weight to the next"
OTHER_CLASSES = (
    "the anchor keeps other classes better than prior preservation, without class images"
)
INDICATOR = "the overfitting indicator rises earlier and higher at low noise"
PARTS = "each part of APT lowers the drift"
RARE = "the two-stage rare token beats DreamBooth at equal steps"

DRIFTS = ("class_noise", "other_noise")
MONOTONE_NUMBERS = ("parameter_distance", *DRIFTS)
OTHER_DRIFTS = ("other_noise", "other_frechet")


def answer_claims(cells: Sequence[Row]) -> list[Row]:
    """Return a row a claim: its verdict, and the numbers that it rests on."""
    return [
        _claim(MONOTONE, _monotone(cells), falling_cells(cells)),
        _claim(OTHER_CLASSES, _other_classes(cells), _class_image_costs(cells)),
        _claim(INDICATOR, _indicator(cells), {}),
        _claim(PARTS, _parts(cells), {}),
        _claim(RARE, _rare(cells), {}),
    ]


def weigh_sweep(cells: Sequence[Row], swept: str) -> list[Row]:
    """Return what each anchor weight of a method's sweep keeps and what it takes away, by weight.

    kept = (likeness - base's) / (likeness of weight 0 - base's)
    taken = 1 - drift / drift of weight 0, by the Frechet distance of other classes
    balance = 2 kept taken / (kept + taken); 0 where either is not above 0

    Returns:
        Nothing where weight 0 gains nothing or drifts nowhere, or there are no cells of it or of
        the base.
    """
    sweep, base = sweep_of(cells, swept), cells_of(cells, "base")
    if not base or not sweep or sweep[0][0] != 0:
        return []

    def means(name: str) -> tuple[float, float]:
        mine = cells_of(cells, name)
        likeness = mean_over_subjects(mine, number("subject_fidelity")).mean
        return likeness, mean_over_subjects(mine, number("other_frechet")).mean

    start = mean_over_subjects(base, number("subject_fidelity")).mean
    learned, drifted = means(sweep[0][1])
    if learned <= start or drifted <= 0:
        return []
    rows: list[Row] = []
    for weight, name in sweep[1:]:
        likeness, drift = means(name)
        kept, taken = (likeness - start) / (learned - start), 1 - drift / drifted
        both = min(kept, taken) > 0
        balance = 2 * kept * taken / (kept + taken) if both else 0.0
        rows.append({"weight": weight, "kept": kept, "taken": taken, "balance": balance})
    return rows


def calibrate(cells: Sequence[Row], swept: str) -> float | None:
    """Return the anchor weight of the best balance in `weigh_sweep`; None where none has any."""
    rows = [row for row in weigh_sweep(cells, swept) if row["balance"] > 0]
    return max(rows, key=lambda row: row["balance"])["weight"] if rows else None


def sweep_of(cells: Sequence[Row], swept: str) -> list[tuple[float, str]]:
    """Return weights and methods of a method's sweep, by weight; 0 is without an anchor."""
    return sorted(
        {(cell["anchor weight"], cell["method"]) for cell in cells if cell["sweep"] == swept}
    )


def find_equal(cells: Sequence[Row], swept: str, other: str) -> str | None:
    """Return the method of a sweep, with an anchor, that learns most nearly as well as another.

    Returns:
        None without cells of such methods, or of the other one.
    """
    fidelity, theirs = number("subject_fidelity"), cells_of(cells, other)
    held = [name for weight, name in sweep_of(cells, swept) if weight > 0]
    if not theirs or not held:
        return None
    wanted = mean_over_subjects(theirs, fidelity).mean

    def distance(name: str) -> float:
        return abs(mean_over_subjects(cells_of(cells, name), fidelity).mean - wanted)

    return min(held, key=distance)


def falling_cells(cells: Sequence[Row]) -> Row:
    """Return in how many subjects and seeds each larger weight made a drift smaller."""
    counts: Row = {}
    for swept in SWEEPS:
        sweep = [cells_of(cells, name) for _, name in sweep_of(cells, swept)]
        if len(sweep) < 2:
            continue
        for name in MONOTONE_NUMBERS:
            tables = [
                {(cell["subject"], cell["seed"]): number(name)(cell) for cell in each}
                for each in sweep
            ]
            shared = set.intersection(*(set(table) for table in tables))
            falls = [all(b[key] < a[key] for a, b in pairwise(tables)) for key in shared]
            counts[f"{swept}, {name} falls throughout"] = f"{sum(falls)} of {len(falls)}"
    return counts


def _monotone(cells: Sequence[Row]) -> list[Row]:
    parts = []
    for swept in SWEEPS:
        sweep = sweep_of(cells, swept)
        steps = [(pair, -1) for pair in pairwise(sweep)]
        if len(sweep) > 2:
            # Beside it, from end to end: how much there is to fall.
            steps.append(((sweep[0], sweep[-1]), None))
        for ((small, one), (large, other)), wanted in steps:
            for name in MONOTONE_NUMBERS:
                what = f"{swept}, {name}, weight {large:g} minus {small:g}"
                parts.append(_part(what, difference(cells, other, one, number(name)), wanted))
    return parts


def _other_classes(cells: Sequence[Row]) -> list[Row]:
    """Held where as much is learned, as far as the sweep allows: a weight that is too large would
    keep other classes by learning nothing, and one that is too small would lose without a fault.
    """
    parts = []
    pairs: list[tuple[str, str, int | None]] = []
    for swept, prior in ((PPT_LORA, LORA_PRIOR), (PPT_DREAMBOOTH, DREAMBOOTH_PRIOR)):
        equal = find_equal(cells, swept, prior) or swept
        pairs.append((equal, prior, -1))
        if equal != swept:
            pairs.append((swept, prior, None))
    for ours, theirs, wanted in pairs:
        for name in OTHER_DRIFTS:
            apart = difference(cells, ours, theirs, number(name))
            parts.append(_part(f"{name}, {ours} minus {theirs}", apart, wanted))
        # Said beside it, and no part of the claim: holding less would be no merit if nothing were
        # learned.
        for name in ("other_all", "subject_fidelity", "class_noise"):
            apart = difference(cells, ours, theirs, number(name))
            parts.append(_part(f"{name}, {ours} minus {theirs}", apart, None))
    return parts


def _class_image_costs(cells: Sequence[Row]) -> Row:
    """Return the seconds that class images took, by method."""
    costs: Row = {}
    for name in (PPT_LORA, LORA_PRIOR, PPT_DREAMBOOTH, DREAMBOOTH_PRIOR):
        mine = cells_of(cells, name)
        if mine:
            seconds = statistics.fmean(cell["seconds"]["class images"] for cell in mine)
            costs[f"seconds for class images, {name}"] = seconds
    return costs


def _indicator(cells: Sequence[Row]) -> list[Row]:
    mine = [cell for cell in cells_of(cells, APT) if cell.get("indicator")]
    parts = []
    for what, table, wanted in (
        ("mean indicator", "mean", 1),
        ("part of the steps until it passes half", "half reached", -1),
    ):
        apart = mean_over_subjects(mine, _low_minus_high(table)) if mine else None
        parts.append(_part(f"{what}, least noise minus most", apart, wanted))
    return parts


def _low_minus_high(table: str) -> Value:
    """Return the mean over the bins of the least noise minus that over those of the most."""

    def value(cell: Row) -> float:
        bins = cell["indicator"][table]
        third = max(1, len(bins) // 3)
        return statistics.fmean(bins[:third]) - statistics.fmean(bins[-third:])

    return value


def _parts(cells: Sequence[Row]) -> list[Row]:
    """Each part as published, added to those before it; and beside it, each taken from the whole.

    Of two parts that do the same, taking one away shows nothing. What a part costs in likeness
    stands there too: it is no merit to hold a model that learns nothing.
    """
    return [
        _part(f"{name}, {ours} minus {its}", difference(cells, ours, its, number(name)), wanted)
        for pairs, names, wanted in (
            (APT_ADDED, DRIFTS, -1),
            (APT_ADDED, ("subject_fidelity",), None),
            (APT_TAKEN, DRIFTS, None),
        )
        for its, ours in pairs.values()
        for name in names
    ]


def _rare(cells: Sequence[Row]) -> list[Row]:
    """Both what is learned and what is kept: better in one at the price of the other is no win."""
    return [
        _part(
            f"{name}, {RARE_TOKEN} minus {DREAMBOOTH}",
            difference(cells, RARE_TOKEN, DREAMBOOTH, number(name)),
            wanted,
        )
        for name, wanted in (("subject_fidelity", 1), ("subject_context", 1), ("class_noise", -1))
    ]


def _part(what: str, found: Difference | None, wanted: int | None) -> Row:
    row: Row = {"what": what, "difference": None, "±": None, "verdict": None}
    if wanted is not None:
        row["verdict"] = NOT_SHOWN if found is None else found.verdict(wanted)
    if found is not None:
        row |= {"difference": found.mean, "±": found.half}
    return row


def _claim(title: str, parts: Sequence[Row], beside: Row) -> Row:
    verdicts = [part["verdict"] for part in parts if part["verdict"] is not None]
    return {"claim": title, "verdict": combine(verdicts), "parts": list(parts), "beside": beside}
