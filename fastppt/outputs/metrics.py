"""What the metrics become: a line each in metrics.jsonl, curves in TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fastppt.errors import UserError
from fastppt.outputs.files import write_file

# The file is written whole each time it grows by this share, so that all the writing together is
# a small multiple of its final size, however long the run.
GROWTH = 0.1


class MetricsFile:
    """metrics.jsonl: one JSON object a step, gathered in memory, rewritten whole now and then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []
        self._num_written = 0

    def append(self, rows: list[dict[str, float]]) -> None:
        """Add rows; the file is brought up to date when enough have gathered.

        What is not finite, such as the gradient norm of a float16 step that was skipped, becomes
        null: JSON has no word for it. So does what a step did not compute.
        """
        for row in rows:
            finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
            self._lines.append(json.dumps(finite, allow_nan=False))
        if len(self._lines) >= self._num_written * (1 + GROWTH):
            self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        write_file(self._path, "".join(f"{line}\n" for line in self._lines))
        self._num_written = len(self._lines)


class Curves:
    """TensorBoard curves of the metrics.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def append(self, rows: list[dict[str, float]]) -> None:
        """Add rows; each metric is a curve over the steps that computed it."""
        for row in rows:
            for name, value in row.items():
                if name != "step" and not math.isnan(value):
                    self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()


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
