"""Embeddings of a new word (Textual Inversion, arXiv 2208.01618)."""

from __future__ import annotations

from fastppt.trainables.arena import ParameterArena


class LearnedTokens:
    """The rows of a new word in the embedding tables of the text encoders, in one arena.

    Attributes:
        arena: The flat buffers that hold them.
    """

    arena: ParameterArena
