"""The one command for a machine with a GPU: ``python -m bench.gpu --out bench/results``.

The gpu-marked tests first; after a red one nothing is measured, unless that is asked for. Then the
ops, the optimizer and whole steps against what a trainer would write, on the GPU, until the time is
up; what no longer fits is listed as not measured. One JSON is left, written anew after every
workload. If the tests were not green its name begins with "red-", and no table is made from it.

A fault that spoils the GPU for the process costs one workload: a fresh process measures the rest.

``--group race`` measures whole jobs instead (`bench.race_gpu`), each model's in a file of its own.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu_state import free_memory, is_spoiled, without_collection
from bench.gpu_targets import MAIN_ATTENTION, MAIN_WORKLOAD, list_targets
from bench.gpu_tests import TRAINER_NEEDS, run_gpu_tests
from bench.machine import copy_bandwidth, describe_machine
from bench.race_gpu import GpuRace, list_race_targets, list_races
from bench.rows import (
    WARM_UP_CALLS,
    Row,
    print_rows,
    print_targets,
    time_workload,
    write_report,
)
from bench.step_plans import FIRST_PLANS, LAST_PLANS, StepPlan
from bench.step_rows import list_gpu_targets
from bench.suites import (
    ADAPTIVE_DENOISING_BF16,
    ANCHOR,
    ATTENTION_ALIGNMENT_BF16,
    ATTENTION_ALIGNMENT_FP16,
    ATTENTION_ALIGNMENT_JOINT_BF16,
    COMPILE,
    FEATURE_ALIGNMENT_BF16,
    FEATURE_ALIGNMENT_BF16_ADDED,
    FEATURE_ALIGNMENT_BF16_CHANNELS_LAST,
    FEATURE_WORKLOADS,
    JOINT_ATTENTION_BF16,
    JOINT_ATTENTION_FP16,
    LATENT_WORKLOADS,
    LORA_ANCHOR,
    LORA_ANCHOR_ANCHORED,
    OPTIMIZER,
    OPTIMIZER_EFFECTIVE,
    OPTIMIZER_HOST,
    SCALING,
    Suite,
    list_workload,
)
from bench.time_limit import OutOfTimeError, at_most
from bench.ways import Way

TOTAL_SECONDS = 510.0
# Of these, at most, for the tests.
TEST_SECONDS = 270.0
# The timed rounds of one mode of one workload.
SECONDS = 2.0
# Less than this is left for no workload.
LEAST_SECONDS = 10.0
LEAST_COMPILE_SECONDS = 60.0
# What a fresh process takes to import torch, before it looks at the clock.
FRESH_SECONDS = 10.0

ADAPTERS = ("SDXL, rank 4", "SDXL, rank 128", "SD3-M, rank 32", "SD1.5, rank 32")
JOINT_LAYERS = tuple(f"SD3-M attention, {num_text} text tokens, a layer" for num_text in (154, 333))


@dataclass(frozen=True)
class Plan:
    """A suite on a workload. ``compiled``: torch.compile and ours, nothing else."""

    suite: Suite
    workload: str
    compiled: bool = False

    def names(self, mode: str) -> list[str]:
        """Return the ways of a mode: the autograd loop is not captured."""
        names = self.suite.ways(compiled=self.compiled)
        if self.compiled:
            names = [n for n in names if self.suite.is_ours(n) or n.startswith(COMPILE)]
        if mode == "captured":
            names = [n for n in names if not n.startswith("autograd loop")]
        return names

    @property
    def least_seconds(self) -> float:
        return LEAST_COMPILE_SECONDS if self.compiled else LEAST_SECONDS

    @property
    def most_seconds(self) -> float:
        return TOTAL_SECONDS

    def modes(self, modes: Sequence[str]) -> Sequence[str]:
        """Return in which of the modes it is run."""
        return modes

    def time(
        self, mode: str, device: str, copy_gb_per_s: float, seconds: float
    ) -> tuple[list[Row], list[Row]]:
        """Return the rows, and the refusals of what disagrees; all or nothing in ``seconds``."""
        return time_workload(
            self.suite,
            list_workload(self.workload),
            names=self.names(mode),
            copy_gb_per_s=copy_gb_per_s,
            seconds=SECONDS,
            device=device,
            mode=mode,
            capture=capture if mode == "captured" else None,
        )

    def show(self, rows: Sequence[Row]) -> None:
        print_rows(rows)

    def __str__(self) -> str:
        kind = ", torch.compile" if self.compiled else ""
        return f"{self.suite.name} ({self.suite.form}), {self.workload}{kind}"


# The most wanted first, for the time may be up before the last. After so many the steps begin.
NUM_MOST_WANTED = 2
PLANS = (
    Plan(OPTIMIZER, MAIN_WORKLOAD),
    Plan(ATTENTION_ALIGNMENT_BF16, MAIN_ATTENTION),
    Plan(OPTIMIZER_EFFECTIVE, MAIN_WORKLOAD),
    Plan(ANCHOR, MAIN_WORKLOAD),
    Plan(LORA_ANCHOR, MAIN_WORKLOAD),
    Plan(LORA_ANCHOR_ANCHORED, MAIN_WORKLOAD),
    Plan(OPTIMIZER, "SD1.5 full"),
    Plan(OPTIMIZER_HOST, "SD1.5 full"),
    *(Plan(OPTIMIZER, workload) for workload in ADAPTERS),
    Plan(OPTIMIZER, "SD1.5, rank 32", compiled=True),
    Plan(JOINT_ATTENTION_BF16, JOINT_LAYERS[0]),
    Plan(JOINT_ATTENTION_BF16, JOINT_LAYERS[0], compiled=True),
    Plan(JOINT_ATTENTION_BF16, JOINT_LAYERS[1]),
    Plan(JOINT_ATTENTION_BF16, JOINT_LAYERS[1], compiled=True),
    Plan(ATTENTION_ALIGNMENT_BF16, "SD1.5 attention"),
    Plan(ATTENTION_ALIGNMENT_JOINT_BF16, "SD3-M attention, 154 text tokens"),
    Plan(ATTENTION_ALIGNMENT_JOINT_BF16, "SD3-M attention, 333 text tokens"),
    Plan(ATTENTION_ALIGNMENT_FP16, MAIN_ATTENTION),
    Plan(JOINT_ATTENTION_FP16, JOINT_LAYERS[0]),
    Plan(ATTENTION_ALIGNMENT_BF16, MAIN_ATTENTION, compiled=True),
    *(
        Plan(suite, name)
        for suite in (
            FEATURE_ALIGNMENT_BF16,
            FEATURE_ALIGNMENT_BF16_CHANNELS_LAST,
            FEATURE_ALIGNMENT_BF16_ADDED,
        )
        for name in FEATURE_WORKLOADS[:2]
    ),
    Plan(FEATURE_ALIGNMENT_BF16, FEATURE_WORKLOADS[2]),
    *(Plan(ADAPTIVE_DENOISING_BF16, name) for name in LATENT_WORKLOADS),
    Plan(FEATURE_ALIGNMENT_BF16, FEATURE_WORKLOADS[0], compiled=True),
    Plan(ADAPTIVE_DENOISING_BF16, LATENT_WORKLOADS[0], compiled=True),
    Plan(ANCHOR, "SD1.5 full"),
    *(Plan(suite, name) for name in ADAPTERS for suite in (ANCHOR, LORA_ANCHOR)),
    *(Plan(suite, name) for suite in (ANCHOR, OPTIMIZER) for name in SCALING),
    *(Plan(OPTIMIZER_EFFECTIVE, name) for name in ADAPTERS),
    Plan(ANCHOR, MAIN_WORKLOAD, compiled=True),
    Plan(LORA_ANCHOR, MAIN_WORKLOAD, compiled=True),
    Plan(OPTIMIZER, MAIN_WORKLOAD, compiled=True),
)


def has_trainer() -> bool:
    """Say whether the trainer's packages are there, and peft."""
    return all(importlib.util.find_spec(name) for name in (*TRAINER_NEEDS, "peft"))


def trainer_plans() -> tuple[Plan, ...]:
    """Return the plans that need the trainer's packages, and peft; none where these are not."""
    if not has_trainer():
        return ()
    from bench.lora import LAYER, LAYERS, LORA_BF16

    return Plan(LORA_BF16, LAYERS), Plan(LORA_BF16, LAYER, compiled=True)


def list_plans() -> tuple[Plan | StepPlan, ...]:
    """Return all plans in their order; what is not here is said."""
    others = trainer_plans()
    if not others:
        print("steps and adapters are not measured: pip install -e '.[test]' for their packages")
        return PLANS
    wanted, rest = PLANS[:NUM_MOST_WANTED], PLANS[NUM_MOST_WANTED:]
    return (*wanted, *FIRST_PLANS, *others, *rest, *LAST_PLANS)


# What may be measured, and how the name of its JSON begins; tables are made of "gpu" alone.
GROUPS = {"speed": "gpu", "race": "race-gpu"}
# What a slower or smaller GPU may meet, and what is no fault.
TOO_LARGE = (OutOfTimeError, torch.OutOfMemoryError)
# Why a workload has not been begun.
NOT_REACHED = "the time was up"


class SpoiledError(Exception):
    """The GPU is of no more use to this process, and workloads are left."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it all; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    parser.add_argument("--group", choices=[*GROUPS], default="speed", help="what is measured")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all of it")
    parser.add_argument(
        "--even-if-red", action="store_true", help="measure although the GPU tests are not green"
    )
    go_on_help = (
        "measure what this report has not reached: the command does it itself after a fault"
    )
    parser.add_argument("--go-on", type=Path, metavar="REPORT", help=go_on_help)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("bench.gpu: unset TRITON_INTERPRET, which runs no kernel on a GPU", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            "bench.gpu: torch sees no GPU here, so there is nothing to measure; "
            "run it on a machine with one, or `make bench` for the CPU",
            file=sys.stderr,
        )
        return 2
    is_race = options.group == "race"
    if is_race and not has_trainer():
        print(
            "bench.gpu: a race needs the trainer's packages: pip install -e '.[test]'",
            file=sys.stderr,
        )
        return 2
    end = time.monotonic() + options.seconds
    # Before the tests: what cannot be imported is known at once.
    plans = list_races(options.out) if is_race else list_plans()
    path, report = read_report(options.go_on) if options.go_on else test_first(options)
    is_red = bool(report["tests"]["stop"])
    if is_red and not options.even_if_red:
        print(f"nothing is measured without --even-if-red; written: {path}")
        return 1
    if is_race and is_red:
        plans = list_races(options.out, is_red=True)
    targets = list_race_targets if is_race else list_all_targets
    try:
        if "copy gb/s" not in report:
            report |= {"copy gb/s": copy_bandwidth("cuda")}
        report = measure(plans, report, path, end, targets=targets)
    except SpoiledError as error:
        print(f"{error}; a fresh process measures the rest", flush=True)
        return go_on(options, path, end)
    print_targets(report["targets"])
    for row in [*report["refused"], *report["not measured"]]:
        print(f"  {row}")
    print(f"written: {path}")
    # What disagrees with the reference is refused without a word on it.
    found = [*report["refused"], *report["not measured"]]
    return 1 if is_red or any(entry.get("failed", True) for entry in found) else 0


def test_first(options: argparse.Namespace) -> tuple[Path, Row]:
    """Run the tests; return the report that they begin, as written, and where."""
    tests = run_gpu_tests(min(TEST_SECONDS, options.seconds / 2))
    print(f"gpu tests ({tests['folder']}): {tests['passed']} passed, {tests['failed']} failed")
    machine = describe_machine("cuda")
    name = re.sub(r"[^a-z0-9]+", "-", str(machine["gpu"]).lower()).strip("-")
    file_name = f"{GROUPS[options.group]}-{name}-{machine['date']}.json"
    if tests["stop"]:
        path = options.out / f"red-{file_name}"
        print(f"{tests['output']}\nbench.gpu: {tests['stop']}", flush=True)
    else:
        path = options.out / file_name
        tests = {key: value for key, value in tests.items() if key != "output"}
    report = {"machine": machine, "tests": tests}
    write_report(path, report)
    return path, report


def read_report(path: Path) -> tuple[Path, Row]:
    return path, json.loads(path.read_text())


def go_on(options: argparse.Namespace, path: Path, end: float) -> int:
    """Become a fresh process that measures what the report has not reached."""
    left = max(end - time.monotonic() - FRESH_SECONDS, 0.0)
    command = [sys.executable, "-m", "bench.gpu", "--out", str(options.out)]
    command += ["--group", options.group, "--seconds", f"{left:.1f}"]
    command += ["--go-on", str(path), *["--even-if-red"] * options.even_if_red]
    os.execv(sys.executable, command)


def measure(
    plans: Sequence[Plan | StepPlan | GpuRace],
    report: Row,
    path: Path,
    end: float,
    *,
    device: str = "cuda",
    modes: Sequence[str] = ("captured", "eager"),
    targets: Callable[[Sequence[Row]], list[Row]] | None = None,
) -> Row:
    """Work through the plans until ``end``, of time.monotonic(); return the report, as written.

    A report that holds rows already is gone on with: plans that it has reached are left out.

    Raises:
        SpoiledError: a plan has spoiled the GPU for this process; the report as written says which.
    """
    rows: list[Row] = report.get("rows", [])
    refused: list[Row] = report.get("refused", [])
    not_measured: list[Row] = report.get(
        "not measured",
        [
            {"plan": str(plan), "mode": mode, "why": NOT_REACHED, "failed": False}
            for plan in plans
            for mode in plan.modes(modes)
        ],
    )
    waiting = {(e["plan"], e["mode"]): e for e in not_measured if e["why"] == NOT_REACHED}
    for plan in plans:
        for mode in plan.modes(modes):
            left = end - time.monotonic()
            entry = waiting.get((str(plan), mode))
            fault = None
            if entry is not None and left >= plan.least_seconds:
                print(f"{plan}, {mode}", flush=True)
                try:
                    seconds = min(left, plan.most_seconds)
                    with at_most(seconds):
                        free_memory(device)
                        timed, refusals = plan.time(mode, device, report["copy gb/s"], seconds)
                # Whatever one workload dies of, the others are still worth their time, and the
                # report names it.
                except Exception as error:
                    if not isinstance(error, TOO_LARGE):
                        traceback.print_exc()
                    fault = f"{type(error).__name__}: {error}".splitlines()[0]
                    entry |= {"why": fault, "failed": not isinstance(error, TOO_LARGE)}
                    print(f"  not measured: {fault}", flush=True)
                else:
                    plan.show(timed)
                    rows += timed
                    refused += refusals
                    not_measured.remove(entry)
                    # A way that died, which the others of its plan have outlived.
                    fault = refusals[-1]["refused"] if refusals else None
            wanted = (targets or list_all_targets)(rows)
            report |= {"targets": wanted, "rows": rows, "refused": refused}
            report |= {"not measured": not_measured}
            write_report(path, report)
            is_left = any(entry["why"] == NOT_REACHED for entry in not_measured)
            if fault is not None and is_left and is_spoiled(device):
                raise SpoiledError(f"{plan}, {mode} has spoiled the GPU for its process ({fault})")
    return report


def capture(way: Way) -> Way:
    """Return a way that replays a CUDA graph of one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            way.call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its own stream the current one.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        without_collection(),
        torch.cuda.graph(graph),
    ):
        result = way.call()

    def replay() -> object:
        graph.replay()
        return result

    return Way(replay, way.rewind)


def list_all_targets(rows: Sequence[Row]) -> list[Row]:
    """Return what is asked of ops and steps, beside what was measured."""
    return list_targets(rows) + list_gpu_targets(rows)


if __name__ == "__main__":
    sys.exit(main())
