"""What a person sees while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

# Where no live line can be drawn (a log file, a pipe), a run prints this many plain lines.
PLAIN_LINES = 10


class ProgressLine:
    """A live line with step, loss, penalty, steps a second and the time left.

    Args:
        console: Where to; a console that is no terminal gets plain lines instead.
        total: Steps of the run.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._every = max(1, total // PLAIN_LINES)
        self._next = self._every
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  anchor {task.fields[anchor]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total, loss="-", anchor="-", rate="-")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, anchor: float, rate: float | None) -> None:
        """Show the state after a step.

        Args:
            step: Counted from 1.
            loss: The mean since the last call.
            anchor: The penalty at the step.
            rate: Steps a second, the first step and pictures apart; None while not known.
        """
        speed = f"{rate:.2f} it/s" if rate is not None else "-"
        self._progress.update(
            self._task, completed=step, loss=f"{loss:.4f}", anchor=f"{anchor:.2e}", rate=speed
        )
        if not self._console.is_terminal and (step >= self._next or step == self._total):
            self._next += self._every
            self._console.print(
                f"step {step}/{self._total}  loss {loss:.4f}  anchor {anchor:.2e}  {speed}"
            )


@contextmanager
def encoding_line(
    console: Console, num_photos: int, num_views: int
) -> Iterator[Callable[[], None]]:
    """Show how far the encoding of photos has come, while inside.

    Args:
        console: Where to; a console that is no terminal gets one plain line at the start, if there
            are augmented views: without them it is soon over.
        num_photos: Photos.
        num_views: Augmented views of each.

    Returns:
        A context, in it a function to call after each picture.
    """
    total = num_photos * (1 + num_views)
    if num_views and not console.is_terminal:
        views = f"{num_views} augmented view{'s' * (num_views > 1)}"
        console.print(f"encoding {total} pictures: {num_photos} photos with {views} each")
    columns = TextColumn("encoding"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
    # A line that is gone when all is encoded.
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("encode", total=total)
    with progress:
        yield lambda: progress.advance(task)


@contextmanager
def class_image_line(console: Console, count: int, steps: int) -> Iterator[Callable[[int], None]]:
    """Show how far the drawing of class images has come, while inside.

    Args:
        console: Where to; a console that is no terminal gets one plain line at the start.
        count: Pictures to draw.
        steps: Sampler steps of each.

    Returns:
        A context, in it a function to call with the number of pictures that are finished.
    """
    if not console.is_terminal:
        console.print(f"drawing {count} class images of {steps} steps each")
    columns = TextColumn("class images"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("draw", total=count)
    with progress:
        yield lambda finished: progress.update(task, completed=finished)
