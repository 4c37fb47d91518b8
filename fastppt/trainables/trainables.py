"""All that a run trains."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from fastppt.trainables.arena import ParameterArena
from fastppt.trainables.lora import LoraAdapters, LoraPair
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables.trainable import Trainable
from fastppt.trainables_config import NETWORK_TRAINABLES

LORA, TEXT_ENCODER_LORA, TOKENS = "lora", "text_encoder_lora", "tokens"


@dataclass(frozen=True)
class Trainables:
    """What moves in any stage of a run; made once, before the first.

    Attributes:
        parts: By name, as in the configuration and in its order.
    """

    parts: Mapping[str, Trainable] = field(default_factory=dict)

    @property
    def lora(self) -> LoraAdapters | None:
        """Adapters of the network; None where there are none."""
        part = self.parts.get(LORA)
        assert part is None or isinstance(part, LoraAdapters)
        return part

    @property
    def text_encoder_lora(self) -> LoraAdapters | None:
        """Adapters of the text encoders; None where they stay as they are."""
        part = self.parts.get(TEXT_ENCODER_LORA)
        assert part is None or isinstance(part, LoraAdapters)
        return part

    @property
    def tokens(self) -> LearnedTokens | None:
        """Embeddings of a new word; None where there is none."""
        part = self.parts.get(TOKENS)
        assert part is None or isinstance(part, LearnedTokens)
        return part

    @property
    def network(self) -> Trainable | None:
        """What moves in the network; None where nothing does."""
        return next((self.parts[name] for name in NETWORK_TRAINABLES if name in self.parts), None)

    @property
    def pairs(self) -> list[LoraPair]:
        """The adapters of the network, then those of the text encoders."""
        both = (self.lora, self.text_encoder_lora)
        return [pair for adapters in both if adapters is not None for pair in adapters.pairs]

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All trained values, views of the arenas: by trainable, then by their place in a model."""
        return {name: part.tensors for name, part in self.parts.items()}

    @property
    def num_parameters(self) -> int:
        """Trained elements of all of them, padding not counted."""
        return sum(one.numel() for part in self.tensors.values() for one in part.values())

    @property
    def arenas(self) -> dict[str, ParameterArena]:
        """The flat buffers by `part_name`."""
        return {
            part_name(name, part): arena
            for name, trainable in self.parts.items()
            for part, arena in trainable.arenas.items()
        }

    @contextmanager
    def base(self) -> Iterator[None]:
        """Run the network's passes inside as the base network."""
        with ExitStack() as stack:
            if self.network is not None:
                stack.enter_context(self.network.base())
            yield

    def refresh(self) -> None:
        """Let the model see the values as they are now, as `Trainable.refresh`."""
        for trainable in self.parts.values():
            trainable.refresh()

    def train(self, names: Collection[str]) -> None:
        """From now on compute gradients of these trainables, and of no others."""
        for name, trainable in self.parts.items():
            for arena in trainable.arenas.values():
                arena.require_grad(name in names)


def part_name(name: str, part: str) -> str:
    """Return what a part of a trainable is called: `svdiff`, or `svdiff_1d` of its part `1d`."""
    return f"{name}_{part}" if part else name
