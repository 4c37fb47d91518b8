"""Feature alignment (Adaptive Personalized Training, arXiv 2507.02687, eq. 4 and 5).

L_mean = sum over layers of mean_B sum_C (mean_tuned - mean_base)^2,   L_std likewise

Mean and standard deviation are over space, of each channel of each sample (our reading).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastppt.config import FeatureAlignmentConfig
from fastppt.families.base import Family
from fastppt.objectives.layers import Outbox, collect, match_layers
from fastppt_kernels import feature_alignment_loss, feature_statistics


@dataclass
class BaseStatistics:
    """Takes the features of a layer in the base pass and remembers their statistics.

    Attributes:
        channel_dim: Of the features.
        mean: [B, C] float32 (float64 of float64).
        std: Likewise.
    """

    channel_dim: int
    mean: Tensor | None = None
    std: Tensor | None = None

    def __call__(self, features: Tensor) -> None:
        """Take note of the features."""
        self.mean, self.std = feature_statistics(features, channel_dim=self.channel_dim)


@dataclass
class TunedStatistics:
    """Takes the features of a layer in the tuned pass and compares them with the base's.

    Attributes:
        base: What took them before.
        outbox: Takes the losses of mean and standard deviation.
    """

    base: BaseStatistics
    outbox: Outbox = field(default_factory=Outbox)

    def __call__(self, features: Tensor) -> None:
        """Compare the features."""
        base = self.base
        assert base.mean is not None and base.std is not None
        self.outbox.losses = feature_alignment_loss(
            features, base.mean, base.std, channel_dim=base.channel_dim
        )


@dataclass
class FeatureHook:
    """Hands a layer's features to whoever looks at them.

    Attributes:
        features_of: Finds the features in the layer's output.
        tap: Who looks; None for nobody.
    """

    features_of: Callable[[Any], Tensor]
    tap: BaseStatistics | TunedStatistics | None = None

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Be a forward hook."""
        if self.tap is not None:
            self.tap(self.features_of(output))


def aligned_layers(family: Family, config: FeatureAlignmentConfig, key: str) -> list[nn.Module]:
    """Return the layers whose features are held.

    Args:
        family: The loaded model.
        config: Which layers.
        key: The table of the configuration, for messages.

    Raises:
        UserError: a pattern matches no layer.
    """
    layers = family.feature_layers()
    names = match_layers(config.layers, layers, family.aligned_blocks, f"{key}.layers")
    return [layers[name] for name in names]


class FeatureAlignment:
    """Looks at the features of a network, from a base pass to the tuned pass after it.

    Args:
        family: Says what features are.
        layers: Those that `aligned_layers` returns; they get a hook, which does nothing outside of
            the passes.
    """

    def __init__(self, family: Family, layers: Sequence[nn.Module]) -> None:
        self._hooks = [FeatureHook(family.features_of) for _ in layers]
        self._bases = [BaseStatistics(family.feature_channel_dim) for _ in layers]
        self._tuned = [TunedStatistics(base) for base in self._bases]
        for layer, hook in zip(layers, self._hooks, strict=True):
            layer.register_forward_hook(hook)

    @contextmanager
    def base_pass(self) -> Iterator[None]:
        """Remember the statistics of the pass inside."""
        for hook, tap in zip(self._hooks, self._bases, strict=True):
            hook.tap = tap
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def tuned_pass(self) -> Iterator[None]:
        """Compare the pass inside, backward pass included; then forget the base's statistics."""
        for hook, tap in zip(self._hooks, self._tuned, strict=True):
            tap.outbox, hook.tap = Outbox(), tap
        try:
            yield
        finally:
            self._leave()
            for tap in self._tuned:
                tap.base.mean, tap.base.std, tap.outbox = None, None, Outbox()

    def losses(self) -> tuple[Tensor, Tensor]:
        """Return L_mean and L_std of the tuned forward pass, 0-dim, without their weight."""
        means, stds = zip(*collect(self._tuned), strict=True)
        return torch.stack(means).sum(), torch.stack(stds).sum()

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.tap = None
