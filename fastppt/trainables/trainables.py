"""All that a run trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastppt.families.attention import AdapterSwitch
from fastppt.trainables.arena import ParameterArena
from fastppt.trainables.lora import LoraAdapters, LoraPair
from fastppt.trainables.tokens import LearnedTokens

LORA, TEXT_ENCODER_LORA, TOKENS = "lora", "text_encoder_lora", "tokens"


@dataclass(frozen=True)
class Trainables:
    """What moves in any stage of a run; made once, before the first.

    Attributes:
        lora: Adapters of the network.
        text_encoder_lora: Adapters of the text encoders; None where they stay as they are.
        tokens: Embeddings of a new word; None where there is none.
    """

    lora: LoraAdapters
    text_encoder_lora: LoraAdapters | None = None
    tokens: LearnedTokens | None = None

    @property
    def switch(self) -> AdapterSwitch:
        """Turns the network's adapters off for a base pass."""
        return self.lora.switch

    @property
    def pairs(self) -> list[LoraPair]:
        """The adapters of the network, then those of the text encoders."""
        text = self.text_encoder_lora
        return [*self.lora.pairs, *([] if text is None else text.pairs)]

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All trained values, views of the arenas: by trainable, then by their place in a model."""
        tensors = {LORA: _by_place(self.lora)}
        if self.text_encoder_lora is not None:
            tensors[TEXT_ENCODER_LORA] = _by_place(self.text_encoder_lora)
        if self.tokens is not None:
            word, rows = self.tokens.word, self.tokens.rows
            tensors[TOKENS] = {f"{component}.{word}": row for component, row in rows.items()}
        return tensors

    @property
    def num_parameters(self) -> int:
        """Trained elements of all of them, padding not counted."""
        return sum(one.numel() for part in self.tensors.values() for one in part.values())

    @property
    def arenas(self) -> dict[str, ParameterArena]:
        """The flat buffers by the name of the trainable, as in the configuration."""
        arenas = {LORA: self.lora.arena}
        if self.text_encoder_lora is not None:
            arenas[TEXT_ENCODER_LORA] = self.text_encoder_lora.arena
        if self.tokens is not None:
            arenas[TOKENS] = self.tokens.arena
        return arenas


def _by_place(adapters: LoraAdapters) -> dict[str, Tensor]:
    return {
        f"{pair.name}.{side}": tensor
        for pair in adapters.pairs
        for side, tensor in (("lora_down", pair.down), ("lora_up", pair.up))
    }
