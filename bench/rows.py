"""From a suite and a workload to rows: checked first, then timed in rotation."""

import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.gpu_state import is_spoiled
from bench.interleave import interleave, stopwatch_of
from bench.problems import DisagreementError, Problem
from bench.suites import ARENA, COMPILE, Suite, Workload
from bench.time_limit import OutOfTimeError
from bench.ways import Way

Row = dict[str, object]

# Sets of tensors that a GPU's timing goes round, so that none is in the cache when its turn comes.
MAX_SETS = 8
CACHES_A_ROUND = 4
WARM_UP_CALLS = 3
# Replays are queued this many at a time: inside a captured step none waits for its launch.
REPLAYS_A_TURN = 16


def time_workload(
    suite: Suite,
    workload: Workload,
    *,
    names: Sequence[str],
    copy_gb_per_s: float,
    seconds: float,
    device: str = "cpu",
    mode: str = "eager",
    capture: Callable[[Way], Way] | None = None,
) -> tuple[list[Row], list[Row]]:
    """Return a row for each way that agrees with the reference, and the refusals of the others.

    A way that dies is refused too, with what it died of: `failed` says whether that is a fault, and
    not a lack of memory. One that spoils the GPU for the process ends the workload without rows.
    If nothing else is known of any way, the last one's error is raised.

    Args:
        suite: What is done.
        workload: On which tensors.
        names: The ways, ours first: ratios are to the first that agrees.
        copy_gb_per_s: What the machine copies, measured in the same run.
        seconds: About what the timed rounds may take.
        device: "cpu" or "cuda".
        mode: How the rows call it: "eager", or "captured" with a ``capture``.
        capture: Returns a way that replays what the given one does.
    """
    num_sets = _num_sets(suite.num_bytes(workload), names) if device == "cuda" else 1
    sets = [_ProblemSet(suite, workload, device, seed) for seed in range(num_sets)]
    wanted = suite.wanted(sets[0].problem(names[0]))
    laps = 1 if capture is None else math.ceil(REPLAYS_A_TURN / num_sets)
    turns, extras, refusals = {}, {}, []
    for name in names:
        try:
            turns[name], extras[name] = _prepare(suite, name, sets, wanted, device, capture, laps)
        except DisagreementError as disagreement:
            refusals.append(_label(suite, workload, name, mode) | {"refused": str(disagreement)})
        # Whatever one way dies of, the others are timed.
        except Exception as error:
            if _is_out_of_time(error):
                raise OutOfTimeError("the time was up") from error
            if name == names[-1] and not turns and not refusals:
                raise
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            failed = not isinstance(error, torch.OutOfMemoryError)
            label = _label(suite, workload, name, mode)
            refusals.append(label | {"refused": why, "failed": failed})
            if is_spoiled(device):
                return [], refusals
    if not turns:
        return [], refusals
    timings = interleave(
        turns, seconds=seconds, stopwatch=stopwatch_of(device), calls_a_turn=num_sets * laps
    )
    ours = next(iter(turns))
    rows = []
    for name, timing in timings.items():
        gb_per_s = suite.num_bytes(workload) / timing.p50 / 1e6
        rows.append(
            _label(suite, workload, name, mode)
            | {"p20 ms": timing.p20, "p50 ms": timing.p50, "p80 ms": timing.p80}
            | {"rounds": len(timing.rounds), "sets": num_sets, "gb/s": gb_per_s}
            | {"share of copy": gb_per_s / copy_gb_per_s}
            | {"times ours": timing.times(timings[ours])}
            | extras[name]
        )
    return rows, refusals


def _is_out_of_time(error: BaseException | None) -> bool:
    """Say whether it comes of the time that was up: torch.compile makes an error of its own."""
    while error is not None and not isinstance(error, OutOfTimeError):
        error = error.__cause__ or error.__context__
    return error is not None


def _prepare(
    suite: Suite,
    name: str,
    sets: Sequence["_ProblemSet"],
    wanted: object,
    device: str,
    capture: Callable[[Way], Way] | None,
    laps: int,
) -> tuple[Callable[[], None], Row]:
    """Return a way's turn, over all sets and so many times, and what is known of it by then.

    Raises:
        DisagreementError: its result is not the reference's.
    """
    if name.startswith(COMPILE):
        torch.compiler.reset()
    problem = sets[0].problem(name)
    start = time.perf_counter()
    made = suite.makers[name](problem)
    made.call()
    _synchronize(device)
    first_call_s = time.perf_counter() - start
    extra_bytes = _extra_bytes(made, device)
    if capture is not None:
        made = capture(made)
    error = suite.check(name, problem, made, wanted)
    ways = [made, *(suite.makers[name](s.problem(name)) for s in sets[1:])]
    if capture is not None:
        ways[1:] = map(capture, ways[1:])
    known = {"error": error, "first call s": first_call_s, "extra bytes": extra_bytes}
    return _turn(ways * laps), known


def find_ratio(rows: Sequence[Row], way: str, baseline: str, **labels: object) -> float | None:
    """Return how many times faster ``way`` is than ``baseline``; None where one has no row."""
    mine, theirs = find_row(rows, way=way, **labels), find_row(rows, way=baseline, **labels)
    return theirs["times ours"] / mine["times ours"] if mine and theirs else None


def find_row(rows: Sequence[Row], **labels: object) -> Row | None:
    matching = (r for r in rows if all(r.get(key) == value for key, value in labels.items()))
    return next(matching, None)


def describe_target(
    what: str, target: float, measured: float | None, *, at_most: bool = False
) -> Row:
    met = None
    if measured is not None:
        met = measured <= target if at_most else measured >= target
    return {"what": what, "target": target, "measured": measured, "met": met}


def print_rows(rows: Sequence[Row]) -> None:
    for row in rows:
        print(
            f"  {row['way']:<48} {row['mode']:<9} {row['p50 ms']:9.3f} ms "
            f"({row['p20 ms']:.3f} to {row['p80 ms']:.3f})  {row['gb/s']:7.1f} GB/s "
            f"{row['share of copy']:6.1%} of a copy  x{row['times ours']:.2f}"
        )


def print_targets(targets: Sequence[Row]) -> None:
    for row in targets:
        verdict = {True: "met", False: "missed", None: "not measured"}[row["met"]]
        measured = "" if row["measured"] is None else f"{row['measured']:.2f}, "
        print(f"  {row['what']}: {measured}target {row['target']}: {verdict}")


def write_report(path: Path, report: Row) -> None:
    """Write JSON whose numbers have four digits: more are noise. A file is never half a report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(_rounded(report), indent=1) + "\n")
    unfinished.replace(path)


class _ProblemSet:
    """The problems of one workload and seed: made when a way first asks for it."""

    def __init__(self, suite: Suite, workload: Workload, device: str, seed: int) -> None:
        self._make = suite.make_problem
        self._arguments = workload.shapes, device
        self._seed = seed
        self._made: dict[bool, Problem] = {}

    def problem(self, way: str) -> Problem:
        arena = way.endswith(ARENA)
        if arena not in self._made:
            kind = {"arena": True} if arena else {}
            self._made[arena] = self._make(*self._arguments, seed=self._seed, **kind)
        return self._made[arena]


def _num_sets(num_bytes: int, names: Sequence[str]) -> int:
    """Enough sets to fill the cache several times; a compiled way knows one set only."""
    if any(name.startswith(COMPILE) for name in names):
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MAX_SETS, math.ceil(CACHES_A_ROUND * cache / num_bytes)))


def _turn(ways: Sequence[Way]) -> Callable[[], None]:
    calls = [way.call for way in ways]

    def turn() -> None:
        for call in calls:
            call()

    return turn


def _extra_bytes(way: Way, device: str) -> int | None:
    """Return the most memory that a call takes beside what it works on; None off the GPU."""
    if device != "cuda":
        return None
    call = way.letting_go or way.call
    call()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _label(suite: Suite, workload: Workload, way: str, mode: str) -> Row:
    return {
        "suite": suite.name,
        "form": suite.form,
        "workload": workload.name,
        "way": way,
        "mode": mode,
        "tensors": len(workload.shapes),
        "elements": workload.num_elements,
        "bytes": suite.num_bytes(workload),
        "flops": suite.num_flops(workload),
    }


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
