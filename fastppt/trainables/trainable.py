"""What every trainable can do, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from fastppt.trainables.arena import ParameterArena


class Trainable(Protocol):
    """A set of parameters that moves, in one arena or a few."""

    @property
    def arenas(self) -> Mapping[str, ParameterArena]:
        """The flat buffers of its values, by the part that each is of; "" is the main one.

        Each is a parameter group of the optimizer, with a learning rate of its own: the parts are
        those of `TrainableConfig.rates` that have values.
        """

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All trained values, views of the arenas, by their place in the model."""

    def refresh(self) -> None:
        """Let the model see the values as they are now.

        Whoever writes values calls this after, but for the optimizer, whose update writes both.
        """

    def base(self) -> AbstractContextManager[None]:
        """Run the passes inside as if nothing had been trained.

        Nothing is copied and nothing is read on the host: it may be part of a captured step.
        """
