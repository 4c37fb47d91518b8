"""All that a run trains."""

from __future__ import annotations

from dataclasses import dataclass

from fastppt.families.attention import AdapterSwitch
from fastppt.trainables.arena import ParameterArena
from fastppt.trainables.lora import LoraAdapters
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
    def arenas(self) -> dict[str, ParameterArena]:
        """The flat buffers by the name of the trainable, as in the configuration."""
        arenas = {LORA: self.lora.arena}
        if self.text_encoder_lora is not None:
            arenas[TEXT_ENCODER_LORA] = self.text_encoder_lora.arena
        if self.tokens is not None:
            arenas[TOKENS] = self.tokens.arena
        return arenas
