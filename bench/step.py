"""One training step, ours and diffusers', timed in one run: ``python -m bench.step``.

Each way of a workload has a network of its own with the same weights. Its first steps are compared
before anything is timed: those of an engine with eager ones, those of the diffusers-style peer with
ours on the same draws.
"""

import argparse
import gc
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.base_pass import compare_base_passes
from bench.gpu import capture
from bench.interleave import Timing, interleave, stopwatch_of
from bench.machine import describe_machine
from bench.problems import DisagreementError
from bench.rows import Row, print_targets, write_report
from bench.step_costs import MemoryWatch, count_flops, count_launches, product_speed
from bench.step_rows import (
    list_cpu_targets,
    list_gpu_targets,
    print_base_passes,
    print_steps,
)
from bench.step_ways import (
    BASE_PASS,
    MODELS,
    NETWORK,
    PEERS,
    RECIPES,
    NetworkAlone,
    Notes,
    Source,
    TrainerStep,
    Work,
    check_peer,
    compare_notes,
    make_peer,
    moves_text,
    open_source,
)
from bench.time_limit import OutOfTimeError, at_most
from bench.ways import Way
from fastppt.errors import UserError
from fastppt.mini import draw_demo_photos
from fastppt.training.engine import engines

# Steps that a turn queues on a GPU, as a run does between two looks at the metrics.
STEPS_A_TURN = 4
SECONDS = 10.0
# Part of the time of one workload in which its ways are made; the rest is for timing them.
MAKING = 0.7

# Relative errors up to which a time is reported: of the first steps' losses and gradient norms,
# and of the peer's gradients. In bfloat16 those of full-size SDXL differ by 0.03 between ours and
# diffusers' (at 128 pixels on a CPU); float32 shows what is wrong in a part.
TOLERANCES = {
    torch.float64: dict.fromkeys(("loss", "grad_norm", "gradients"), 1e-7),
    torch.float32: {"loss": 1e-4, "grad_norm": 1e-3, "gradients": 1e-3},
    torch.bfloat16: {"loss": 2e-2, "grad_norm": 0.1, "gradients": 0.2},
}

Call = Callable[[], object]


@dataclass(frozen=True)
class StepWay:
    """What takes the step: a recipe of ours, a peer or the network alone, and the engine."""

    recipe: str
    engine: str = "eager"

    def __str__(self) -> str:
        return f"{self.recipe}, {self.engine}"


def time_steps(
    work: Work,
    ways: Sequence[StepWay],
    photos: Path,
    *,
    device: str,
    seconds: float = SECONDS,
    dtype: torch.dtype | None = None,
    most_seconds: float | None = None,
) -> tuple[list[Row], list[Row]]:
    """Return a row for each way whose steps are right, and the refusals of the others.

    Whatever one way dies of, the others are timed.

    Args:
        work: What is trained.
        ways: The first that is right is the one that the others' times are compared with.
        photos: Folder with photos.
        device: "cpu" or "cuda".
        seconds: About what the timed rounds may take.
        dtype: Of the network; None for the trainer's default on the device.
        most_seconds: Of these, `MAKING` is for making the ways; those not made by then are refused.
            None is no limit.
    """
    end = None if most_seconds is None else time.monotonic() + MAKING * most_seconds
    source = open_source(work, device, photos, dtype)
    bench, roof = _Bench(source, device), product_speed(device, source.dtype)
    rows: list[Row] = []
    refusals: list[Row] = []
    turns: dict[str, Call] = {}
    laps = STEPS_A_TURN if device == "cuda" else 1
    for way in ways:
        label = bench.label(way)
        try:
            call, costs = _make_until(end, bench, way)
        except (DisagreementError, OutOfTimeError, UserError) as error:
            refusals.append(label | {"refused": str(error)})
            continue
        except Exception as error:
            traceback.print_exc()
            refusals.append(label | {"refused": f"{type(error).__name__}: {error}".splitlines()[0]})
            continue
        turns[str(way)] = _repeated(call, laps)
        rows.append(label | costs)
    if not rows:
        return [], refusals
    timings = interleave(turns, seconds=seconds, stopwatch=stopwatch_of(device), calls_a_turn=laps)
    ours = next(iter(timings.values()))
    alone = next((timings[row["way"]] for row in rows if row["recipe"] == NETWORK), None)
    for row in rows:
        row |= _timed(row, timings[row["way"]], ours, alone, roof)
    return rows, refusals


def _timed(row: Row, timing: Timing, ours: Timing, alone: Timing | None, roof: float) -> Row:
    tflop_per_s = row["flops"] / timing.p50 / 1e9
    return {
        "p20 ms": timing.p20,
        "p50 ms": timing.p50,
        "p80 ms": timing.p80,
        "rounds": len(timing.rounds),
        "times ours": timing.times(ours),
        "network share": None if alone is None else alone.times(timing),
        "tflop/s": tflop_per_s,
        "product tflop/s": roof,
        "share of product": tflop_per_s / roof,
    }


class _Bench:
    """One workload: makes its ways, checks them, counts what they cost.

    Args:
        source: Model and photos.
        device: "cpu" or "cuda".
    """

    def __init__(self, source: Source, device: str) -> None:
        self.source, self.device = source, device
        self.tolerances = TOLERANCES[source.dtype]
        self.plain = TrainerStep(source, "lora", "eager")
        self.flops = count_flops(self.plain.gradients)
        self.stock = source.make_family()
        self.base_flops = count_flops(NetworkAlone(self.stock, self.plain, backward=False))
        self.text_flops: int | None = None
        self.eager_notes: dict[str, list[Notes]] = {}

    def label(self, way: StepWay) -> Row:
        work = self.source.work
        return {
            "suite": "step",
            "model": work.model,
            "resolution": self.plain.config.photos.resolution,
            "batch": work.batch_size,
            "rank": work.rank,
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "recipe": way.recipe,
            "engine": way.engine,
            "way": str(way),
        }

    def make(self, way: StepWay) -> tuple[Call, Row]:
        """Return what takes a step, and what it costs; it is checked by then.

        The memory of the network alone is counted without its weights.

        Raises:
            DisagreementError: its first steps are not the eager ones, or not ours.
            UserError: the device lacks the engine.
        """
        if way.recipe in RECIPES:
            return self._ours(way)
        if way.recipe in PEERS:
            return self._peer(way)
        alone = NetworkAlone(self.stock, self.plain, backward=way.recipe == NETWORK)
        flops = count_flops(alone)
        memory = MemoryWatch(self.device)
        call = capture(Way(alone)).call if way.engine == "graph" else alone
        first = self._seconds(call)
        return call, self._costs(call, way, memory, first, flops, {})

    def _ours(self, way: StepWay) -> tuple[Call, Row]:
        if way.recipe not in self.eager_notes and way.engine != "eager":
            eager = TrainerStep(self.source, way.recipe, "eager")
            self.eager_notes[way.recipe] = eager.first_notes()
            del eager
        plain = self._text_flops() if moves_text(way.recipe) else self.flops
        memory = MemoryWatch(self.device)
        step = TrainerStep(self.source, way.recipe, way.engine)
        # What the encoding took is not the step's.
        memory.forget_peak()
        prepared = self._seconds(step.prepare)
        first = self._seconds(step)
        notes = step.first_notes()
        errors = compare_notes(notes, self.eager_notes.setdefault(way.recipe, notes))
        self._refuse(errors)
        flops = plain + self.base_flops * step.stage.objectives.need_base
        costs = self._costs(step, way, memory, first, flops, errors)
        return step, costs | {"capture s": prepared}

    def _text_flops(self) -> int:
        """Return the operations of a step without a base pass in which text encoders learn."""
        if self.text_flops is None:
            step = TrainerStep(self.source, "apt-base", "eager")
            self.text_flops = count_flops(step.gradients)
        return self.text_flops

    def _peer(self, way: StepWay) -> tuple[Call, Row]:
        memory = MemoryWatch(self.device)
        peer = make_peer(self.source, self.plain, **PEERS[way.recipe])
        errors = check_peer(peer, self.plain)
        self._refuse(errors)
        memory.forget_peak()
        first = self._seconds(peer)
        flops = self.flops * len(peer.rows)
        return peer, self._costs(peer, way, memory, first, flops, errors)

    def _costs(
        self,
        call: Call,
        way: StepWay,
        memory: MemoryWatch,
        first_step_s: float,
        flops: int,
        errors: dict[str, float],
    ) -> Row:
        for _ in range(2):
            call()
        peak, reserved = memory.read()
        # Nothing is seen from outside of what torch.compile made for the CPU.
        counted = self.device == "cuda" or "compile" not in way.engine
        launches = count_launches(call, self.device) if counted else None
        return {
            "flops": flops,
            "capture s": 0.0,
            "first step s": first_step_s,
            "peak bytes": peak,
            "reserved bytes": reserved,
            "kernels": None if launches is None else launches.kernels,
            "host launches": None if launches is None else launches.host,
            "errors": errors,
        }

    def _refuse(self, errors: dict[str, float]) -> None:
        for what, error in errors.items():
            if not (math.isfinite(error) and error <= self.tolerances[what]):
                raise DisagreementError(
                    f"its {what} is {error:.2g} off (allowed: {self.tolerances[what]:.2g}), "
                    "so no time is reported"
                )

    def _seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _make_until(end: float | None, bench: _Bench, way: StepWay) -> tuple[Call, Row]:
    left = None if end is None else end - time.monotonic()
    if left is not None and left <= 0:
        raise OutOfTimeError("the time was up")
    with nullcontext() if left is None else at_most(left):
        return bench.make(way)


def _repeated(call: Call, times: int) -> Call:
    def repeat() -> None:
        for _ in range(times):
            call()

    return repeat


def time_base_passes(work: Work, photos: Path, *, device: str, seconds: float) -> list[Row]:
    """Return what base and tuned pass cost one after the other, and as halves of one batch."""
    step = TrainerStep(open_source(work, device, photos), "apt", "eager")
    costs = compare_base_passes(step.step, seconds=seconds)
    return [
        {"suite": "base pass", "model": work.model, "batch": work.batch_size, "way": way}
        | {"resolution": step.config.photos.resolution, "rank": work.rank}
        | {"p20 ms": cost.timing.p20, "p50 ms": cost.timing.p50, "p80 ms": cost.timing.p80}
        | {"kept bytes": cost.kept_bytes}
        for way, cost in costs.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the steps that are asked for and leave one JSON; return the exit code."""
    options = _parse(arguments)
    # More OpenMP threads than free cores make this many times slower.
    torch.set_num_threads(1)
    machine = describe_machine(options.device)
    ways = [StepWay(recipe, engine) for recipe in options.recipe for engine in options.engine]
    if not options.ours_only:
        ways += [StepWay(recipe) for recipe in (*PEERS, NETWORK, BASE_PASS)]
    rows: list[Row] = []
    refusals: list[Row] = []
    passes: list[Row] = []
    works = [
        Work(model, batch_size, resolution, options.rank)
        for model in options.model
        for resolution in options.resolution or [None]
        for batch_size in options.batch
    ]
    with tempfile.TemporaryDirectory() as folder:
        draw_demo_photos(Path(folder))
        for work in works:
            timed, refused = time_steps(
                work, ways, Path(folder), device=options.device, seconds=options.seconds
            )
            gc.collect()
            print_steps(timed)
            rows += timed
            refusals += refused
            if options.base_pass:
                passes += time_base_passes(
                    work, Path(folder), device=options.device, seconds=options.seconds
                )
    print_base_passes(passes)
    for row in refusals:
        print(f"  {row['model']}, {row['way']}: {row['refused']}")
    list_targets = list_gpu_targets if options.device == "cuda" else list_cpu_targets
    report = {"machine": machine, "targets": list_targets(rows)}
    print_targets(report["targets"])
    if options.out is not None:
        path = options.out / f"{options.device}-step-{machine['date']}.json"
        write_report(path, report | {"rows": rows + passes, "refused": refusals})
        print(f"written: {path}")
    return 1 if refusals else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeat for several")
    parser.add_argument("--recipe", action="append", choices=[*RECIPES], help="default: all")
    parser.add_argument("--engine", action="append", help="default: all that the device has")
    parser.add_argument("--batch", action="append", type=int, help="photos in a step; default: 1")
    parser.add_argument("--resolution", action="append", type=int, help="default: the model's own")
    parser.add_argument("--rank", type=int, default=32, help="of the adapters; default: 32")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timed rounds a workload")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--ours-only", action="store_true", help="neither diffusers' step nor the network alone"
    )
    parser.add_argument(
        "--base-pass",
        action="store_true",
        help="base and tuned pass, too: one after the other against halves of one batch",
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON; default: none is written")
    options = parser.parse_args(arguments)
    options.model = options.model or ["mini-sdxl"]
    options.recipe = options.recipe or [*RECIPES]
    options.batch = options.batch or [1]
    if options.engine is None:
        found = engines(torch.device(options.device))
        options.engine = [engine for engine, reason in found.items() if reason is None]
    return options


if __name__ == "__main__":
    sys.exit(main())
