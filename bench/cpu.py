"""The anchor penalty on the CPU: ``python -m bench.cpu --out bench/results``."""

import argparse
from pathlib import Path

import torch

from bench.machine import copy_bandwidth, describe_machine
from bench.rows import (
    Row,
    describe_target,
    find_ratio,
    print_rows,
    print_targets,
    time_workload,
    write_report,
)
from bench.suites import ANCHOR, SCALING, list_workload

WORKLOADS = ("SDXL, rank 1", "SDXL, rank 4", "SDXL, rank 32", *SCALING)
SECONDS = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    out = parser.parse_args().out
    # More OpenMP threads than free cores make this many times slower.
    torch.set_num_threads(1)
    machine, copy = describe_machine("cpu"), copy_bandwidth("cpu")
    names = ANCHOR.ways(compiled=False)
    rows: list[Row] = []
    refusals: list[Row] = []
    for name in WORKLOADS:
        print(name)
        timed, refused = time_workload(
            ANCHOR, list_workload(name), names=names, copy_gb_per_s=copy, seconds=SECONDS
        )
        print_rows(timed)
        rows += timed
        refusals += refused
    targets = list_targets(rows)
    print_targets(targets)
    report = {"machine": machine, "copy gb/s": copy, "targets": targets, "rows": rows}
    path = out / f"cpu-anchor-{machine['date']}.json"
    write_report(path, report | {"refused": refusals})
    print(f"written: {path}")
    for row in refusals:
        raise SystemExit(f"{row['workload']}, {row['way']}: {row['refused']}")


def list_targets(rows: list[Row]) -> list[Row]:
    """Return how many times faster the op is, beside what is asked of it."""
    wanted = [
        ("SDXL, rank 1", "autograd loop", 5.0),
        ("SDXL, rank 4", "autograd loop", 3.0),
        ("SDXL, rank 1", "foreach", 1.0),
        ("SDXL, rank 4", "foreach", 1.0),
    ]
    return [
        describe_target(
            f"anchor_penalty_, {workload}, times faster than {baseline}",
            target,
            find_ratio(rows, "anchor_penalty_", baseline, suite="anchor", workload=workload),
        )
        for workload, baseline, target in wanted
    ]


if __name__ == "__main__":
    main()
