"""A moving average of what a stage trains: what it shows, saves and hands on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fastppt.trainables.trainables import Trainables

CHUNK = 2**24
"""Elements that are averaged at a time: what values in 16 bits are widened to stays this small."""


class MovingAverage:
    """Exponential moving averages of the values in some arenas.

    With n updates before it, an update makes

        decay_n = min(decay, (1 + n) / (10 + n))
        average <- average + (1 - decay_n) (value - average)

    Source: the average of Polyak and Juditsky (1992) in the form that diffusion models are sampled
    with (Ho et al., arXiv 2006.11239, appendix B); the warm-up is that of TensorFlow's
    ExponentialMovingAverage. It begins as the values with which the stage begins.

    Args:
        trainables: All that the run trains.
        names: The arenas that the stage trains.
        decay: The stage's `ema_decay`, in (0, 1).

    Attributes:
        averages: By arena, flat like it, in float32 or wider.
        num_updates: 0-dim float64 on the device, n; steps that were skipped do not count. In
            float32 a decay near one would leave a share that is off in its fourth digit.
    """

    def __init__(self, trainables: Trainables, names: Iterable[str], decay: float) -> None:
        self._trainables = trainables
        self._arenas = {name: trainables.arenas[name] for name in names}
        self.decay = decay
        self.averages = {
            name: arena.flat.detach().to(
                torch.promote_types(arena.flat.dtype, torch.float32), copy=True
            )
            for name, arena in self._arenas.items()
        }
        device = next(iter(self.averages.values())).device
        self.num_updates = torch.zeros((), device=device, dtype=torch.float64)

    @torch.no_grad()
    def update_(self, skipped: Tensor) -> None:
        """Take in the values after an update of theirs. Nothing is read on the host.

        Args:
            skipped: 0-dim bool on the device, whether there was none: all stays as it is then.
        """
        warmed_up = (1 + self.num_updates) / (10 + self.num_updates)
        share = (1 - warmed_up.clamp(max=self.decay)) * ~skipped
        for name, average in self.averages.items():
            values = self._arenas[name].flat.detach()
            for mean, part in zip(average.split(CHUNK), values.split(CHUNK), strict=True):
                mean.lerp_(part.to(mean.dtype), share.to(mean.dtype))
        self.num_updates.add_(~skipped)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the model be its average inside; the values wait in host memory meanwhile."""
        aside = {
            name: arena.flat.detach().to("cpu", copy=True) for name, arena in self._arenas.items()
        }
        try:
            self._write(self.averages)
            yield
        finally:
            self._write(aside)

    def hand_on(self) -> None:
        """Make the average the values, for good."""
        self._write(self.averages)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, arena in self._arenas.items():
            arena.flat.copy_(values[name])
        self._trainables.refresh()
