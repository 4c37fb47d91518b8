"""Times several calls in rotation, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Stopwatch = Callable[[Call], float]

MIN_ROUNDS = 5
MAX_ROUNDS = 50


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: percentiles, and those of each round."""

    p20: float
    p50: float
    p80: float
    rounds: tuple[float, ...]

    def times(self, other: "Timing") -> float:
        """Return how many times the other's milliseconds these are: the median of the rounds.

        What slows a whole round down leaves its ratio as it is.
        """
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine / others for mine, others in pairs)


def time_on_host(call: Call) -> float:
    """Return the milliseconds that a call takes on the CPU."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def time_on_gpu(call: Call) -> float:
    """Return the milliseconds from the call's start to the end of what it queued on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def stopwatch_of(device: str) -> Stopwatch:
    return time_on_gpu if device == "cuda" else time_on_host


def interleave(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    stopwatch: Stopwatch = time_on_host,
    warm_up_rounds: int = 2,
    calls_a_turn: int = 1,
) -> dict[str, Timing]:
    """Return the timing of each call.

    Every round times each call once. The round's first call shifts by one a round and its
    direction turns, so that no call always runs after the same other one.

    Args:
        calls: What to time, by name. A first call, which compiles, should lie behind.
        seconds: About what the timed rounds may take together; there are 5 to 50 of them.
        stopwatch: Returns the milliseconds of a call.
        warm_up_rounds: Untimed rounds before; the last of them says how long a round is.
        calls_a_turn: How many calls one call of ``calls`` stands for.
    """
    names = list(calls)
    round_milliseconds = 0.0
    for _ in range(warm_up_rounds):
        round_milliseconds = sum(stopwatch(calls[name]) for name in names)
    fitting = 1e3 * seconds / round_milliseconds if round_milliseconds else MAX_ROUNDS
    rounds = int(min(max(fitting, MIN_ROUNDS), MAX_ROUNDS))
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in order_of_round(names, number):
            taken[name].append(stopwatch(calls[name]) / calls_a_turn)
    return {name: summarise(milliseconds) for name, milliseconds in taken.items()}


def order_of_round(names: list[str], number: int) -> list[str]:
    shift = number // 2 % len(names)
    shifted = names[shift:] + names[:shift]
    return shifted if number % 2 == 0 else shifted[::-1]


def summarise(milliseconds: list[float]) -> Timing:
    tenths = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Timing(tenths[1], statistics.median(milliseconds), tenths[7], tuple(milliseconds))
