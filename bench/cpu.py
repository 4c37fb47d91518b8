"""The ops on the CPU, one thread: ``python -m bench.cpu --out bench/results --suite alignment``."""

import argparse
from collections.abc import Mapping, Sequence
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
from bench.suites import (
    ADAPTIVE_DENOISING,
    ANCHOR,
    ATTENTION_ALIGNMENT,
    ATTENTION_ALIGNMENT_JOINT,
    FEATURE_ALIGNMENT,
    FEATURE_ALIGNMENT_ADDED,
    FEATURE_ALIGNMENT_CHANNELS_LAST,
    FEATURE_WORKLOADS,
    JOINT_ATTENTION,
    JOINT_ATTENTION_BF16,
    LATENT_WORKLOADS,
    SCALING,
    Suite,
    list_workload,
)

# What the machine may take about a second for a call; all layers of a model are bench.gpu's.
JOINT_WORKLOAD = "SD3-M attention at 512 px, 154 text tokens, a layer"
SUITES: Mapping[str, Sequence[tuple[Suite, str]]] = {
    "anchor": [
        (ANCHOR, name) for name in ("SDXL, rank 1", "SDXL, rank 4", "SDXL, rank 32", *SCALING)
    ],
    "alignment": [
        (ATTENTION_ALIGNMENT, "SDXL attention, a layer of each"),
        (ATTENTION_ALIGNMENT, "SD1.5 attention"),
        (ATTENTION_ALIGNMENT_JOINT, "SD3-M attention, 154 text tokens, a layer"),
        (JOINT_ATTENTION, JOINT_WORKLOAD),
        (JOINT_ATTENTION_BF16, JOINT_WORKLOAD),
        *(
            (suite, name)
            for suite in (
                FEATURE_ALIGNMENT,
                FEATURE_ALIGNMENT_CHANNELS_LAST,
                FEATURE_ALIGNMENT_ADDED,
            )
            for name in FEATURE_WORKLOADS[:2]
        ),
        *((ADAPTIVE_DENOISING, name) for name in LATENT_WORKLOADS),
    ],
}
SECONDS = 4.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    parser.add_argument("--suite", choices=SUITES, default="anchor", help="what is timed")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a workload, about")
    options = parser.parse_args(arguments)
    # More OpenMP threads than free cores make this many times slower.
    torch.set_num_threads(1)
    machine, copy = describe_machine("cpu"), copy_bandwidth("cpu")
    rows: list[Row] = []
    refusals: list[Row] = []
    for suite, name in SUITES[options.suite]:
        print(f"{suite.name} ({suite.form}), {name}")
        timed, refused = time_workload(
            suite,
            list_workload(name),
            names=suite.ways(compiled=False),
            copy_gb_per_s=copy,
            seconds=options.seconds,
        )
        print_rows(timed)
        rows += timed
        refusals += refused
    targets = list_targets(rows) if options.suite == "anchor" else []
    print_targets(targets)
    report = {"machine": machine, "copy gb/s": copy, "targets": targets, "rows": rows}
    path = options.out / f"cpu-{options.suite}-{machine['date']}.json"
    write_report(path, report | {"refused": refusals})
    print(f"written: {path}")
    for row in refusals:
        raise SystemExit(f"{row['workload']}, {row['way']}: {row['refused']}")


def list_targets(rows: list[Row]) -> list[Row]:
    """Return how many times faster the anchor is, beside what is asked of it."""
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
