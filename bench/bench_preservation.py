"""What methods teach, and what they cost: ``python -m bench.bench_preservation --output DIR``.

Recipes x subjects x seeds on mini-sdxl, and a sweep of the anchor's weight. Each cell is a whole
training through fastppt and an evaluation by the judge of the mini world, and is kept as JSON, so
that a bench which was stopped goes on. At the end stand means with intervals, the papers' claims
with what the numbers say of each, and a picture of subject fidelity against drift.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console

from bench.machine import describe_machine
from bench.preservation_cells import BASE, Cell, find_cell, list_cells, run_cell
from bench.preservation_claims import answer_claims, calibrate
from bench.preservation_plan import (
    METHODS,
    NOUNS,
    STEPS,
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

WORK = Path("preservation-cells")


def run_cells(cells: Sequence[Cell], plan: Plan, work: Path, jobs: int) -> Iterator[Row]:
    """Measure cells, some at a time, each process on one thread; they come as they are done."""
    if jobs == 1:
        yield from (run_cell(cell, plan, work) for cell in cells)
        return
    # Read when a new process imports torch: more threads than free cores are many times slower.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        futures = [pool.submit(run_cell, cell, plan, work) for cell in cells]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure_all(
    plan: Plan, methods: Sequence[Method], work: Path, jobs: int, console: Console
) -> list[Row]:
    """Return all cells, those that are kept already and those that are not."""
    cells = list_cells(plan, methods)
    kept = [find_cell(cell, plan, work) for cell in cells]
    missing = [cell for cell, row in zip(cells, kept, strict=True) if row is None]
    done = [row for row in kept if row is not None]
    console.print(f"{len(cells)} cells, {len(done)} of them kept in {work}; {jobs} at a time")
    began = time.perf_counter()
    for count, row in enumerate(run_cells(missing, plan, work, jobs), start=1):
        done.append(row)
        spent = time.perf_counter() - began
        left = spent / count * (len(missing) - count)
        console.print(
            f"  {count} of {len(missing)}: {row['noun']}, {row['method']}, seed {row['seed']}: "
            f"{row['cpu seconds']:.0f} CPU s; {spent / 60:.1f} min, about {left / 60:.0f} to go"
        )
    return sorted(done, key=lambda row: (row["subject"], row["method"], row["seed"]))


def make_report(cells: Sequence[Row], plan: Plan, methods: Sequence[Method]) -> Row:
    """Return the report but for the machine: every cell, means, claims, the calibrated weight."""
    shown = [{name: value for name, value in cell.items() if name != "key"} for cell in cells]
    names = [BASE, *(method.name for method in methods)]
    return {
        "plan": describe(plan, methods),
        "intervals": "95 %, Student's t over subjects, each the mean of its seeds",
        "rows": summarise(cells, names),
        "claims": answer_claims(cells),
        "calibrated anchor weight": calibrate(cells),
        "cpu seconds": sum(cell["cpu seconds"] for cell in cells),
        "cells": shown,
    }


def choose_methods(names: Sequence[str] | None, with_sweep: bool) -> list[Method]:
    """Return the methods of these names, all where there are none, and those of the sweep.

    Raises:
        SystemExit: there is no method of a name.
    """
    known = {method.name: method for method in METHODS}
    for name in names or ():
        if name not in known:
            raise SystemExit(f"--recipes: there is no {name!r}; there are {', '.join(known)}")
    chosen = [known[name] for name in names] if names else list(METHODS)
    return [*chosen, *(sweep_methods() if with_sweep else [])]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_preservation", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of JSON and pictures")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the cells")
    subjects = range(1, len(NOUNS) + 1)
    parser.add_argument("--subjects", type=int, default=5, choices=subjects, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training, all stages")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--no-sweep", action="store_true", help="no sweep of the anchor's weight")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="few steps, for a look; not to keep")
    options = parser.parse_args(arguments)
    console, machine = Console(), describe_machine()
    plan = Plan(options.subjects, options.seeds, options.steps)
    plan = quick(plan) if options.quick else plan
    methods = choose_methods(options.recipes, not options.no_sweep)
    began = time.perf_counter()
    cells = measure_all(plan, methods, options.work, options.jobs, console)
    report = {"machine": {**machine, "threads": 1, "processes": options.jobs}}
    report |= {"seconds": time.perf_counter() - began, **make_report(cells, plan, methods)}
    name = f"{'quick-' if options.quick else ''}cpu-preservation"
    path = options.output / f"{name}-{machine['date']}.json"
    write_report(path, report)
    pictures = [path.with_suffix(".png"), path.with_name(f"{name}-indicator-{machine['date']}.png")]
    draw_trade(report["rows"], pictures[0])
    draw_indicator(cells, pictures[1])
    console.print(console_table(report["rows"]))
    console.print(claims_table(report["claims"]))
    console.print(f"calibrated anchor weight: {report['calibrated anchor weight']}")
    for written in (path, *pictures):
        console.print(f"written: {written}")


if __name__ == "__main__":
    main()
