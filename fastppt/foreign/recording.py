"""What looks into the layers of a foreign network, which runs its passes when it likes.

A base pass is remembered, the tuned pass after it is compared. Blocks that are checkpointed run
once more in the backward pass, and must then do just what they did before: so whether a layer looks
depends on nothing that changes between the two.

Shape legend: B batch, H heads, Q image tokens, N tokens of image and text, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastppt.objectives.attention_alignment import BaseMaps, TunedMaps
from fastppt.objectives.feature_alignment import (
    BaseStatistics,
    FeatureHook,
    TunedStatistics,
)
from fastppt.objectives.layers import Outbox


@dataclass
class Passes:
    """Which pass the layers of a network are in.

    Attributes:
        phase: Nothing yet, the base pass, or after it.
        is_read: Whether the losses of the tuned pass were read.
    """

    phase: Literal["idle", "base", "tuned"] = "idle"
    is_read: bool = False

    @property
    def are_seen(self) -> bool:
        """Say whether layers look: in a base pass, and in passes with gradients after it."""
        return self.phase == "base" or (self.phase == "tuned" and torch.is_grad_enabled())

    @property
    def must_not_raise(self) -> bool:
        """Say whether what does not go with the base pass is left alone.

        Once the losses are read nothing is asked of a pass. Compiled code raises nothing: what is
        missing shows where the losses are read.
        """
        return self.is_read or torch.compiler.is_compiling()

    def compare(self, outbox: Outbox, shape: torch.Size, base_shape: torch.Size) -> bool:
        """Say whether a layer compares what it sees, of a shape, with what the base had.

        Raises:
            ValueError: the tuned pass does not go with the base pass, or is the second one.
        """
        if self.phase != "tuned" or not torch.is_grad_enabled():
            return False
        if self.must_not_raise:
            return shape == base_shape
        if outbox.losses:
            raise ValueError(
                "the network ran a second pass with gradients since attached.base(); read "
                "attached.losses() right after the tuned pass, before backward(), and give each "
                "tuned pass a base pass of its own"
            )
        if shape != base_shape:
            raise ValueError(
                f"the tuned pass has {tuple(shape)} (batch, image tokens) where the base pass had "
                f"{tuple(base_shape)}; run both on the same noisy latents"
            )
        return True


@dataclass
class MapTap:
    """Stands in an attention for as long as the network is attached to.

    Attributes:
        passes: Shared by all layers.
        base: Remembers the base's maps.
        tuned: Compares with them.
    """

    passes: Passes
    base: BaseMaps = field(default_factory=BaseMaps)
    tuned: TunedMaps = field(init=False)

    def __post_init__(self) -> None:
        self.tuned = TunedMaps(self.base)

    def see(self, query: Tensor, key: Tensor) -> None:
        """Take note of cross-attention [B, H, Q, D]."""
        if self.passes.phase == "base":
            self.base.see(query, key)
        elif self._compares(query, query.shape[2], key.shape[2]):
            self.tuned.see(query, key)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, num_text_tokens: int) -> Tensor:
        """Compute joint attention [B, H, N, D], and take note of it."""
        if self.passes.phase == "base":
            return self.base.attend(query, key, value, num_text_tokens)
        if self._compares(query, query.shape[2] - num_text_tokens, num_text_tokens):
            return self.tuned.attend(query, key, value, num_text_tokens)
        return F.scaled_dot_product_attention(query, key, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be left behind where the network is copied or pickled."""
        return type(None), ()

    def _compares(self, query: Tensor, num_image_tokens: int, num_text_tokens: int) -> bool:
        map_sum, columns = self.base.map_sum, self.tuned.columns
        if map_sum is None:
            return False
        shape = torch.Size((query.shape[0], num_image_tokens))
        if not self.passes.compare(self.tuned.outbox, shape, map_sum.shape[:2]):
            return False
        wanted = map_sum.shape[2] if columns is None else columns.shape[-1]
        if num_text_tokens == wanted:
            return True
        if self.passes.must_not_raise:
            return False
        given = f"the subject prompt has {num_text_tokens} text tokens and "
        if columns is None:
            raise ValueError(
                f"{given}the class prompt {wanted}; pad both to one length, or pass columns=, the "
                "class prompt's token that each of the subject's is compared with"
            )
        raise ValueError(
            f"columns: got shape {tuple(columns.shape)}, but {given}columns say of each which "
            "token of the class prompt it is compared with; want one a token, -1 for none"
        )


@dataclass
class StatisticsTap:
    """Looks at the features of a layer for as long as the network is attached to.

    Attributes:
        passes: Shared by all layers.
        base: Remembers the base's statistics.
        tuned: Compares with them.
    """

    passes: Passes
    base: BaseStatistics
    tuned: TunedStatistics = field(init=False)

    def __post_init__(self) -> None:
        self.tuned = TunedStatistics(self.base)

    def __call__(self, features: Tensor) -> Tensor:
        """Take note of the features; returns them as the network is to read them."""
        if self.passes.phase == "base":
            return self.base(features)
        mean = self.base.mean
        if mean is None:
            return features
        if self.passes.compare(self.tuned.outbox, features.shape[:1], mean.shape[:1]):
            return self.tuned(features)
        return features


class FeatureRecorder(FeatureHook):
    """The forward hook of a layer of a foreign network.

    Args:
        features_of: Finds the features in the layer's output.
        with_features: Puts others in their place.
        recorder: Who looks at them.
    """

    def __init__(
        self,
        features_of: Callable[[Any], Tensor],
        with_features: Callable[[Any, Tensor], Any],
        recorder: StatisticsTap,
    ) -> None:
        super().__init__(features_of, with_features)
        self.recorder = recorder

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        """Be a forward hook."""
        if not self.recorder.passes.are_seen:
            return output
        return self.with_features(output, self.recorder(self.features_of(output)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Be left behind where the network is copied or pickled."""
        return _no_hook, ()


def _no_hook() -> Callable[[nn.Module, Any, Any], None]:
    return _leave_output


def _leave_output(layer: nn.Module, inputs: Any, output: Any) -> None:
    """Be the hook of a copy, which changes nothing."""
