"""From what a trainer prints to the phases of a race: its progress bars, and when they moved."""

import codecs
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.race_results import MemoryKind, Phase, Round, StepTimes
from fastppt.errors import UserError

# A bar as tqdm draws it into a file: "Steps:  10%|█   | 50/500 [00:30<04:30,  1.66it/s, ...]".
BAR = re.compile(
    r"(?:(?P<name>.*?):? +|^)\d+%\|[^|]*\| *(?P<count>\d+)/(?P<total>\d+) "
    r"\[[\d:]+<[\d:?]+, *(?P<rate>[\d.]+|\?)(?P<unit>it/s|s/it)"
)
LINE_END = re.compile(r"[\r\n]")


@dataclass(frozen=True)
class Bar:
    """One drawing of a progress bar.

    Attributes:
        name: Its description.
        count: Of how much is done.
        total: What there is to do.
        rate: Steps a second, as the trainer prints it; None before the first.
        at_s: When it was read, in seconds since the trainer's process began.
    """

    name: str
    count: int
    total: int
    rate: float | None
    at_s: float


class BarReader:
    """Finds bars in output as it comes, in pieces of any length.

    tqdm ends a line before it draws and not after: a bar is found as soon as its rate is there.

    Args:
        begins: Pattern of what is printed when all has been imported; None: nothing is.

    Attributes:
        begun_s: When that was read, in seconds since the trainer's process began; None before.
    """

    def __init__(self, begins: str | None = None) -> None:
        self.begun_s: float | None = None
        self._begins = begins
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._line = ""
        self._is_found = False

    def read(self, piece: bytes, at_s: float) -> list[Bar]:
        """Return the bars of which the end is in this piece.

        Args:
            piece: What was printed since the last one.
            at_s: When it was read, in seconds since the trainer's process began.
        """
        bars = []
        first, *others = LINE_END.split(self._decoder.decode(piece))
        for number, text in enumerate((first, *others)):
            if number:
                self._line, self._is_found = "", False
            self._line += text
            if self._begins and self.begun_s is None and re.search(self._begins, self._line):
                self.begun_s = at_s
            found = BAR.search(self._line)
            if found and not self._is_found:
                self._is_found = True
                bars.append(_bar(found, at_s))
        return bars


def _bar(found: re.Match[str], at_s: float) -> Bar:
    rate = None
    # A rate of 0.00 is one that two digits cannot tell.
    if found["rate"] != "?" and float(found["rate"]) > 0:
        rate = float(found["rate"])
        rate = rate if found["unit"] == "it/s" else 1 / rate
    name = (found["name"] or "").strip()
    return Bar(name, int(found["count"]), int(found["total"]), rate, at_s)


@dataclass(frozen=True)
class Log:
    """What was seen of one run of a trainer.

    Attributes:
        bars: In the order in which they were drawn.
        done_s: From the start of its process to the last that it printed or wrote. What the
            process takes to end is no part of the job, as its start is none.
        start_s: What the interpreter and the imports take; None: it cannot be told.
        peak_memory_bytes: The most that it took.
        memory_kind: Of what.
    """

    bars: Sequence[Bar]
    done_s: float
    start_s: float | None
    peak_memory_bytes: int
    memory_kind: MemoryKind


def read_round(
    log: Log, steps: int, *, training: str, class_images: str | None, counts_from: int = 1
) -> Round:
    """Return the phases of a run: the training bar parts first step, training and save.

    first_step is from that bar's first drawing, at 0, to its first step; save from its last step to
    the last that was printed or written; class_images from the first drawing of their bar to the
    last image; other is all before, with loading and encoding, less ``log.start_s``.

    Args:
        log: Of the run.
        steps: How many were asked for.
        training: Pattern of the training bar's whole name.
        class_images: That of the class images' bar; None: there are none.
        counts_from: The count that the training bar shows when the first step is done.

    Raises:
        UserError: there is no such bar, or it is of another number of steps.
    """
    bars = _bars_named(log.bars, training)
    last = bars[-1]
    if last.total != steps or last.count != steps - 1 + counts_from:
        raise UserError(
            f"the trainer's bar {last.name!r} ended at {last.count} of {last.total} steps, and "
            f"{steps} were asked for; see its output"
        )
    moved = _moves(bars)
    step_s = _step_times(moved)
    (begun, _), (first_at, first_count) = moved[0], moved[1]
    # Steps may have been drawn together: what the others of them took is training.
    others = first_count - counts_from
    typical = 0.0 if step_s is None else step_s.p50
    first_step_s = max(0.0, first_at - begun - others * typical)
    end = moved[-1][0]
    phases: dict[Phase, float] = {
        "first_step": first_step_s,
        "training": end - begun - first_step_s,
        "save": log.done_s - end,
        "other": begun,
    }
    batch_s = None
    if class_images is not None:
        drawn = _moves(_bars_named(log.bars, class_images))
        batch_s = _step_times(drawn)
        phases["class_images"] = drawn[-1][0] - drawn[0][0]
        phases["other"] -= phases["class_images"]
    # It may have been measured on another run, and longer.
    start_s = None if log.start_s is None else min(log.start_s, phases["other"])
    phases["other"] -= start_s or 0.0
    return Round(
        start_s=start_s,
        phases=phases,
        steps=steps,
        step_s=step_s,
        batch_s=batch_s,
        peak_memory_bytes=log.peak_memory_bytes,
        memory_kind=log.memory_kind,
    )


def printed_rate(bars: Sequence[Bar], training: str) -> float | None:
    """Return the steps a second that the training bar showed at its last step.

    What it shows later, when it is closed, is the mean over all that was done until then: the
    saving of the model, and more. None where it showed none.
    """
    found = _bars_named(bars, training)
    first_of_last = [bar.count for bar in found].index(found[-1].count)
    rates = [bar.rate for bar in found[: first_of_last + 1] if bar.rate is not None]
    return rates[-1] if rates else None


def _bars_named(bars: Sequence[Bar], pattern: str) -> list[Bar]:
    found = [bar for bar in bars if re.fullmatch(pattern, bar.name)]
    if not found:
        names = ", ".join(sorted({repr(bar.name) for bar in bars})) or "none"
        raise UserError(
            f"no progress bar called {pattern!r} was printed (there were: {names}); "
            "is the checkout of the version that bench/peers/README.md names?"
        )
    return found


def _moves(bars: Sequence[Bar]) -> list[tuple[float, int]]:
    """Return the bar's first drawing, and then when each count was first seen.

    Of counts that were read together, only the last is there.
    """
    if bars[0].count != 0 or bars[-1].count == 0:
        raise UserError(
            f"the bar {bars[0].name!r} went from {bars[0].count} to {bars[-1].count} of "
            f"{bars[0].total}, so nothing can be timed from it; see the trainer's output"
        )
    moved = [(bars[0].at_s, 0)]
    for bar in bars[1:]:
        if bar.count <= moved[-1][1]:
            continue
        if len(moved) > 1 and bar.at_s == moved[-1][0]:
            moved.pop()
        moved.append((bar.at_s, bar.count))
    return moved


def _step_times(moved: Sequence[tuple[float, int]]) -> StepTimes | None:
    """Return percentiles of the steps after the first; of those drawn together, their mean."""
    seconds: list[float] = []
    for (before, few), (after, many) in pairwise(moved[1:]):
        seconds += [(after - before) / (many - few)] * (many - few)
    if len(seconds) < 2:
        return None
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return StepTimes(p20=tenths[1], p50=statistics.median(seconds), p80=tenths[7])
