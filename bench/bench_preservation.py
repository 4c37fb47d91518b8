"""What methods teach, and what they cost: ``python -m bench.bench_preservation --output DIR``.

Recipes x subjects x seeds on mini-sdxl, and sweeps of the anchor's weight. Each cell is a whole
training through fastppt and an evaluation by the judge of the mini world, on one thread, and is
kept as JSON: the same command goes on with a bench that was stopped, at any time and however. The
same command in a second process shares the cells with the first, so start one a core; whichever
ends last writes the report. It holds means with intervals, the papers' claims with what the numbers
say of each, and a picture of subject fidelity against drift.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.machine import describe_machine
from bench.preservation_cells import (
    BASE,
    Cell,
    cell_path,
    find_cell,
    hold_cell,
    list_cells,
    run_cell,
)
from bench.preservation_claims import answer_claims, calibrate, weigh_sweep
from bench.preservation_plan import (
    METHODS,
    NOUNS,
    STEPS,
    SWEEPS,
    Method,
    Plan,
    describe,
    quick,
    sweep_methods,
)
from bench.preservation_plots import draw_indicator, draw_trade
from bench.preservation_statistics import summarise
from bench.preservation_tables import claims_table, console_table
from bench.rows import Row, write_report
from fastppt.training.interrupt import Interrupted

WORK = Path("preservation-cells")


def measure_all(
    plan: Plan, methods: Sequence[Method], work: Path, console: Console
) -> list[Row] | None:
    """Measure the cells that are neither kept nor being measured by another process.

    Returns:
        All cells; None where another process is still at some of them.

    Raises:
        SystemExit: cells have failed. They keep none of the others from being measured.
    """
    cells = list_cells(plan, methods)
    paths = [cell_path(cell, plan, work) for cell in cells]
    before, began = count_files(paths), time.perf_counter()
    failed: list[Cell] = []
    console.print(f"{len(cells)} cells, {before} of them kept in {work}")
    took_one = True
    while took_one:
        # Once more from the first: what another process held when it was killed is free again.
        took_one = False
        for cell, path in zip(cells, paths, strict=True):
            if cell in failed or path.exists():
                continue
            with hold_cell(path) as held:
                # Another process may have been quicker.
                if not held or path.exists():
                    continue
                took_one = True
                try:
                    row = run_cell(cell, plan, work)
                except Exception:
                    console.print_exception()
                    failed.append(cell)
                    continue
            kept, spent = count_files(paths), time.perf_counter() - began
            left = spent / (kept - before) * (len(cells) - kept)
            console.print(
                f"  {kept} of {len(cells)}: {cell.name}: {row['cpu seconds']:.0f} CPU s; "
                f"{spent / 60:.1f} min, about {left / 60:.0f} to go"
            )
    if failed:
        raise SystemExit(f"failed, and measured anew next time: {[cell.name for cell in failed]}")
    rows = [find_cell(cell, plan, work) for cell in cells]
    found = [row for row in rows if row is not None]
    if len(found) < len(cells):
        return None
    return sorted(found, key=lambda row: (row["subject"], row["method"], row["seed"]))


def count_files(paths: Sequence[Path]) -> int:
    return sum(path.exists() for path in paths)


def make_report(cells: Sequence[Row], plan: Plan, methods: Sequence[Method]) -> Row:
    """Return the report but for the machine: every cell, means, claims, the calibrated weight."""
    names = [BASE, *(method.name for method in methods)]
    return {
        "plan": describe(plan, methods),
        "intervals": "95 %, Student's t over subjects, each the mean of its seeds",
        "rows": summarise(cells, names),
        "claims": answer_claims(cells),
        "anchor weights": {swept: weigh_sweep(cells, swept) for swept in SWEEPS},
        "calibrated anchor weights": {swept: calibrate(cells, swept) for swept in SWEEPS},
        "cpu seconds": sum(cell["cpu seconds"] for cell in cells),
        "cells": list(cells),
    }


def choose_methods(names: Sequence[str] | None, with_sweep: bool) -> list[Method]:
    """Return the methods of these names, all where there are none, and those of their sweeps.

    Raises:
        SystemExit: there is no method of a name.
    """
    known = {method.name: method for method in METHODS}
    for name in names or ():
        if name not in known:
            raise SystemExit(f"--recipes: there is no {name!r}; there are {', '.join(known)}")
    chosen = [known[name] for name in names] if names else list(METHODS)
    swept = {method.name for method in chosen} if with_sweep else set()
    return [*chosen, *(method for method in sweep_methods() if method.sweep in swept)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_preservation", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of JSON and pictures")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the cells")
    subjects = range(1, len(NOUNS) + 1)
    parser.add_argument("--subjects", type=int, default=5, choices=subjects, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11), metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training, all stages")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--no-sweep", action="store_true", help="no sweeps of the anchor's weight")
    parser.add_argument("--quick", action="store_true", help="few steps, for a look; not to keep")
    options = parser.parse_args(arguments)
    console, machine = Console(), describe_machine()
    plan = Plan(options.subjects, options.seeds, options.steps)
    plan = quick(plan) if options.quick else plan
    methods = choose_methods(options.recipes, not options.no_sweep)
    try:
        cells = measure_all(plan, methods, options.work, console)
    except (Interrupted, KeyboardInterrupt):
        raise SystemExit("ended; the same command goes on") from None
    if cells is None:
        console.print("the rest is with another process, which writes the report")
        return
    # Of the time when the cells were measured, and not of now.
    load = statistics.fmean(cell["load"] for cell in cells)
    report = {"machine": {**machine, "threads": 1, "load": round(load, 2)}}
    report |= make_report(cells, plan, methods)
    name = f"{'quick-' if options.quick else ''}cpu-preservation"
    path = options.output / f"{name}-{machine['date']}.json"
    write_report(path, report)
    pictures = [path.with_suffix(".png"), path.with_name(f"{name}-indicator-{machine['date']}.png")]
    draw_trade(report["rows"], pictures[0])
    draw_indicator(cells, pictures[1])
    console.print(console_table(report["rows"]))
    console.print(claims_table(report["claims"]))
    for swept, weight in report["calibrated anchor weights"].items():
        console.print(f"calibrated anchor weight of {swept}: {weight}")
    for written in (path, *pictures):
        console.print(f"written: {written}")


if __name__ == "__main__":
    main()
