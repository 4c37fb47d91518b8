"""What a training step costs at each point of an axis: seconds, bytes, operations."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bench.interleave import Timing, interleave, stopwatch_of
from bench.rows import Row
from bench.scaling_axes import Axis, Point
from bench.step_costs import MemoryWatch, count_flops, product_speed
from bench.step_ways import Source, TrainerStep
from fastppt.errors import UserError
from fastppt.training.live_bytes import LiveBytes

# Steps that a turn queues on a GPU, as a run does between two looks at the metrics.
STEPS_A_TURN = 4
# Of tensors alive, counted op by op; of what the GPU's allocator has handed out.
COUNTED, ALLOCATED = "counted", "allocated"

Call = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """An axis, measured.

    Attributes:
        rows: A row for each point, by rising x.
        refused: The points that have none, and why.
        drift: Speed of a large product after the axis over that before it: how much the machine
            itself has changed. None where the points were timed in rotation, which it touches
            alike.
    """

    rows: list[Row]
    refused: list[Row]
    drift: float | None


def time_axis(
    axis: Axis,
    points: Sequence[Point],
    source: Source,
    *,
    recipe: str,
    engine: str,
    device: str,
    seconds: float,
    most_seconds: float | None = None,
) -> Measured:
    """Time the steps of all points.

    On the CPU all of them are made first and timed in rotation, so that a machine that slows down
    slows all of them. On a GPU, whose memory they would share, they are made and timed one after
    the other, and the machine's drift is reported.

    Args:
        axis: What grows.
        points: By rising value.
        source: The model, and photos.
        recipe: One of `bench.step_ways.RECIPES`.
        engine: One of the configuration's engines.
        device: "cpu" or "cuda".
        seconds: About what the timed rounds of the axis may take.
        most_seconds: No point is begun after these; None is no limit.
    """
    end = None if most_seconds is None else time.monotonic() + most_seconds
    rows: list[Row] = []
    refused: list[Row] = []
    waiting: dict[str, Call] = {}
    before = product_speed(device, source.dtype) if device == "cuda" else None
    for point in points:
        label = {"recipe": recipe, "label": point.label}
        if end is not None and time.monotonic() >= end:
            refused.append(label | {"refused": "the time was up"})
            continue
        try:
            call, costs = make_point(axis, point, source, recipe, engine, device)
        except (UserError, torch.OutOfMemoryError) as error:
            refused.append(label | {"refused": str(error).splitlines()[0]})
            continue
        rows.append(label | costs)
        if device == "cuda":
            rows[-1] |= _seconds(_time({point.label: call}, device, seconds / len(points)))
            del call
            gc.collect()
            torch.cuda.empty_cache()
        else:
            waiting[point.label] = call
    if waiting:
        timings = interleave(waiting, seconds=seconds)
        for row in rows:
            row |= _seconds(timings[row["label"]])
    drift = None if before is None else product_speed(device, source.dtype) / before
    return Measured(sorted(rows, key=lambda row: row["x"]), refused, drift)


def make_point(
    axis: Axis, point: Point, source: Source, recipe: str, engine: str, device: str
) -> tuple[Call, Row]:
    """Return what takes a step at a point, and what is counted of it.

    Peak memory is that of a step that is not the first, with all that stays for it: weights,
    adapters, moments, banks. On the CPU it is counted, and only where Python runs the ops.

    Raises:
        UserError: the model cannot be trained there.
    """
    source = replace(source, work=point.work)
    if device == "cuda":
        step, peak = _make_on_gpu(source, recipe, engine, point)
    else:
        step, peak = _make_on_cpu(source, recipe, engine, point)
    pairs = step.trainables.lora.pairs
    sizes = {
        "resolution": step.config.photos.resolution,
        "batch": point.work.batch_size,
        "rank": point.work.rank,
        "tensors": 2 * len(pairs),
        "elements": sum(pair.down.numel() + pair.up.numel() for pair in pairs),
    }
    # Time and memory follow the area.
    x = sizes["resolution"] ** 2 if axis.name == "resolution" else sizes[axis.name]
    costs = {
        "peak bytes": peak,
        "memory": None if peak is None else (ALLOCATED if device == "cuda" else COUNTED),
        "flops": count_flops(step.gradients),
    }
    return step, {"x": x} | sizes | costs


def _make_on_cpu(
    source: Source, recipe: str, engine: str, point: Point
) -> tuple[TrainerStep, int | None]:
    with LiveBytes(source.device) as alive:
        step = TrainerStep(source, recipe, engine, point.changes)
        if engine == "eager":
            step()
            # What the encoding took is not the step's.
            gc.collect()
            alive.peak = alive.live
            step()
    step()
    return step, alive.peak if engine == "eager" else None


def _make_on_gpu(source: Source, recipe: str, engine: str, point: Point) -> tuple[TrainerStep, int]:
    memory = MemoryWatch("cuda")
    step = TrainerStep(source, recipe, engine, point.changes)
    memory.forget_peak()
    step.prepare()
    for _ in range(2):
        step()
    peak, _ = memory.read()
    assert peak is not None
    return step, peak


def _time(calls: dict[str, Call], device: str, seconds: float) -> Timing:
    (name,) = calls

    def turn() -> None:
        for _ in range(STEPS_A_TURN):
            calls[name]()

    timings = interleave(
        {name: turn},
        seconds=seconds,
        stopwatch=stopwatch_of(device),
        calls_a_turn=STEPS_A_TURN,
    )
    return timings[name]


def _seconds(timing: Timing) -> Row:
    values = {"p20 s": timing.p20, "p50 s": timing.p50, "p80 s": timing.p80}
    return {name: value / 1e3 for name, value in values.items()} | {"rounds": len(timing.rounds)}
