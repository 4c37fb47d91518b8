"""Means, intervals and paired differences over the cells of the preservation bench.

Seeds of one subject are not independent of one another: what one subject makes easy or hard, it
makes so for all of them. So each subject counts once, as the mean of its seeds, and intervals are
Student's t over subjects.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.rows import Row
from bench.student import mean_and_interval

HOLDS, FAILS, NOT_SHOWN = "holds", "does not hold", "not shown"

Value = Callable[[Row], float]


@dataclass(frozen=True)
class Difference:
    """A mean over subjects, and half its 95 % interval; None of a single subject."""

    mean: float
    half: float | None

    def verdict(self, wanted: int) -> str:
        """Say whether the whole interval lies on the wanted side of zero: 1 above, -1 below."""
        if self.half is None or abs(self.mean) <= self.half:
            return NOT_SHOWN
        return HOLDS if self.mean * wanted > 0 else FAILS


def number(name: str) -> Value:
    """Return what reads a measure of a cell."""
    return lambda cell: cell["numbers"][name]


def cells_of(cells: Sequence[Row], method: str) -> list[Row]:
    """Return the cells of a method, by subject and seed."""
    mine = [cell for cell in cells if cell["method"] == method]
    return sorted(mine, key=lambda cell: (cell["subject"], cell["seed"]))


def mean_over_subjects(cells: Sequence[Row], value: Value) -> Difference:
    """Return the mean of a value, and the interval of Student's t over subjects' means."""
    by_subject: dict[int, list[float]] = {}
    for cell in cells:
        by_subject.setdefault(cell["subject"], []).append(value(cell))
    return Difference(*mean_and_interval([statistics.fmean(each) for each in by_subject.values()]))


def difference(cells: Sequence[Row], one: str, other: str, value: Value) -> Difference | None:
    """Return by how much a value of one method is above another's, on the same subject and seed.

    Returns:
        None where no subject and seed has both.
    """
    theirs = {(cell["subject"], cell["seed"]): cell for cell in cells_of(cells, other)}
    pairs = [
        (cell, theirs[cell["subject"], cell["seed"]])
        for cell in cells_of(cells, one)
        if (cell["subject"], cell["seed"]) in theirs
    ]
    if not pairs:
        return None
    apart = [{"subject": ours["subject"], "apart": value(ours) - value(its)} for ours, its in pairs]
    return mean_over_subjects(apart, lambda pair: pair["apart"])


def summarise(cells: Sequence[Row], methods: Sequence[str]) -> list[Row]:
    """Return a row a method: of each number and time the mean, and half its 95 % interval."""
    rows = []
    for name in methods:
        mine = cells_of(cells, name)
        if not mine:
            continue
        row: Row = {"method": name, "cells": len(mine)}
        row |= {label: mine[0][label] for label in ("sweep", "anchor weight")}
        for table in ("numbers", "seconds"):
            row[table] = {
                measure: _as_row(mean_over_subjects(mine, _reader(table, measure)))
                for measure in mine[0][table]
            }
        rows.append(row)
    return rows


def combine(verdicts: Sequence[str]) -> str:
    """Return the verdict on a claim: it holds where all its parts do, and fails where one does."""
    if not verdicts:
        return NOT_SHOWN
    if FAILS in verdicts:
        return FAILS
    return HOLDS if all(verdict == HOLDS for verdict in verdicts) else NOT_SHOWN


def _as_row(found: Difference) -> Row:
    return {"mean": found.mean, "±": found.half}


def _reader(table: str, name: str) -> Value:
    def read(cell: Row) -> float:
        value: float = cell[table][name]
        assert math.isfinite(value), f"{cell['method']}: {name} is {value}"
        return value

    return read
