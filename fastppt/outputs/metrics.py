"""What the metrics become: a line each in metrics.jsonl, curves in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastppt.errors import UserError
from fastppt.outputs.files import write_file

# The file is written whole each time it grows by this share, so that all the writing together is
# a small multiple of its final size, however long the run.
GROWTH = 0.1
# Significant digits of the many numbers that a step has of bins and layers.
DIGITS = 6
# What the indicator's bins are called before the slash.
GAMMA = "gamma"


class MetricsFile:
    """metrics.jsonl: one JSON object a step, gathered in memory, rewritten whole now and then.

    Args:
        path: The file.
        num_steps: Steps whose rows are kept of the file that is there; the first ones.
    """

    def __init__(self, path: Path, num_steps: int = 0) -> None:
        self._path = path
        self._lines = _first_lines(path, num_steps)
        self._num_written = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._lines)

    def rows(self) -> list[dict[str, Any]]:
        """Return what the lines say."""
        return [json.loads(line) for line in self._lines]

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; the file is brought up to date when enough have gathered.

        What is not finite, such as the gradient norm of a float16 step that was skipped, becomes
        null: JSON has no word for it. So does what a step did not compute.

        Args:
            rows: Numbers by name, or lists. A name ``gamma/bin_N`` becomes an entry of the list
                "gamma_bins", a name ``TERM/LAYER`` one of the table TERM in the table "layers".
        """
        self._lines += [json.dumps(_nest(row), allow_nan=False) for row in rows]
        if len(self._lines) >= self._num_written * (1 + GROWTH):
            self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        write_file(self._path, "".join(f"{line}\n" for line in self._lines))
        self._num_written = len(self._lines)


class Curves:
    """TensorBoard curves of the metrics.

    Args:
        folder: Where to.
        num_steps: Steps whose points are kept of the curves that are there; the first ones.

    Raises:
        UserError: TensorBoard is not installed; here and in each method, that the curves cannot be
            written.
    """

    def __init__(self, folder: Path, num_steps: int = 0) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with self._writing():
            self._writer = SummaryWriter(str(folder), purge_step=num_steps + 1)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; each metric is a curve over the steps that computed it.

        TensorBoard groups them by what stands before a slash in their names.
        """
        with self._writing():
            for row in rows:
                for name, value in row.items():
                    if name != "step" and isinstance(value, int | float) and not math.isnan(value):
                        self._writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Write what is waiting, and go on."""
        with self._writing():
            self._writer.flush()

    def close(self) -> None:
        """Write what is waiting."""
        with self._writing():
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        # What fails in the writer's thread is raised by the next call.
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: cannot be written ({error.strerror or error})"
            ) from error


def _nest(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row as JSON is to have it."""
    nested: dict[str, Any] = {}
    for name, value in row.items():
        term, _, part = name.partition("/")
        if not part:
            nested[name] = _finite(value) if isinstance(value, float) else value
        elif term == GAMMA:
            nested.setdefault("gamma_bins", []).append(_rounded(value))
        else:
            nested.setdefault("layers", {}).setdefault(term, {})[part] = _rounded(value)
    return nested


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _first_lines(path: Path, num_steps: int) -> list[str]:
    """Return the lines of the first steps of a file of metrics, as far as it has them.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    if num_steps == 0:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if json.loads(line)["step"] <= num_steps]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read as metrics ({error}); delete it to go on without its rows"
        ) from None


def check_tensorboard() -> None:
    """Refuse curves where TensorBoard is missing.

    Raises:
        UserError: says what to install.
    """
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError(
            "tensorboard is not installed: pip install 'fastppt[tensorboard]', or leave it off"
        ) from None
