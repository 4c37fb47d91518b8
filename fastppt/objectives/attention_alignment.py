"""Attention alignment (Adaptive Personalized Training, arXiv 2507.02687, eq. 6).

L = sum over layers of mean_B (1/H) * sum_{q,k} (sum_h A_tuned - sum_h A_base)^2

A are the maps of image tokens over text tokens; in joint attention those of the softmax over all
tokens (our choice). They are never stored by head: a layer keeps the base's sum over the heads.

Shape legend: B batch, H heads, Q image tokens, K text tokens, N tokens of either, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastppt.families.attention import TextAttention
from fastppt.families.base import Family
from fastppt.objectives.layers import Outbox, collect, match_layers
from fastppt.stage_config import AttentionAlignmentConfig
from fastppt_kernels import (
    attention_alignment_loss,
    attention_map_sum,
    joint_attention,
    joint_attention_map_sum,
)


@dataclass
class BaseMaps:
    """Stands in an attention during the base pass and remembers its maps.

    Attributes:
        map_sum: [B, Q, K] float32 (float64 of float64), the maps' sum over the heads.
    """

    map_sum: Tensor | None = None

    def see(self, query: Tensor, key: Tensor) -> None:
        """Take note of cross-attention."""
        self.map_sum = attention_map_sum(query, key)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, num_text_tokens: int) -> Tensor:
        """Compute joint attention and take note of it."""
        output, self.map_sum = joint_attention_map_sum(
            query, key, value, num_text_tokens=num_text_tokens
        )
        return output


@dataclass
class TunedMaps:
    """Stands in an attention during the tuned pass and compares its maps with the base's.

    Attributes:
        base: What stood there before.
        columns: [B, K] int64, the base's token that each token is compared with; -1: none.
        outbox: Takes the loss.
    """

    base: BaseMaps
    columns: Tensor | None = None
    outbox: Outbox = field(default_factory=Outbox)

    def see(self, query: Tensor, key: Tensor) -> None:
        """Compare cross-attention."""
        assert self.base.map_sum is not None
        loss = attention_alignment_loss(query, key, self.base.map_sum, columns=self.columns)
        self.outbox.losses = (loss,)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, num_text_tokens: int) -> Tensor:
        """Compute joint attention and compare it."""
        assert self.base.map_sum is not None
        output, loss = joint_attention(
            query,
            key,
            value,
            num_text_tokens=num_text_tokens,
            base_map_sum=self.base.map_sum,
            columns=self.columns,
        )
        self.outbox.losses = (loss,)
        return output


def aligned_attentions(
    family: Family, config: AttentionAlignmentConfig, key: str
) -> dict[str, TextAttention]:
    """Return the attentions whose maps are held, by their paths in the network.

    Args:
        family: After `Family.make_adaptable`.
        config: Which attentions.
        key: The table of the configuration, for messages.

    Raises:
        UserError: a pattern matches no attention of the image to the text.
    """
    attentions = family.text_attentions()
    names = match_layers(config.layers, attentions, family.aligned_blocks, f"{key}.layers")
    return {name: attentions[name] for name in names}


class AttentionAlignment:
    """Looks into the attentions of a network, from a base pass to the tuned pass after it.

    Args:
        attentions: Those that `aligned_attentions` finds.
    """

    def __init__(self, attentions: Sequence[TextAttention]) -> None:
        self._attentions = attentions
        self._bases = [BaseMaps() for _ in attentions]
        self._tuned = [TunedMaps(base) for base in self._bases]

    @contextmanager
    def base_pass(self) -> Iterator[None]:
        """Remember the maps of the pass inside."""
        for attention, tap in zip(self._attentions, self._bases, strict=True):
            attention.tap = tap
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def tuned_pass(self, columns: Tensor) -> Iterator[None]:
        """Compare the maps of the pass inside, backward pass included; then forget the base's.

        Args:
            columns: [B, K] int64, the base's token that each token of the text is compared with.
        """
        for attention, tap in zip(self._attentions, self._tuned, strict=True):
            tap.columns, tap.outbox, attention.tap = columns, Outbox(), tap
        try:
            yield
        finally:
            self._leave()
            for tap in self._tuned:
                tap.base.map_sum, tap.columns, tap.outbox = None, None, Outbox()

    def losses(self) -> Tensor:
        """Return each layer's part of L in the tuned forward pass, [layers], unweighted."""
        return torch.stack([loss for (loss,) in collect(self._tuned)])

    def _leave(self) -> None:
        for attention in self._attentions:
            attention.tap = None
