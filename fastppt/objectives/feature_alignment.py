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

from fastppt.families.base import Family
from fastppt.objectives.layers import Outbox, collect, match_layers
from fastppt.stage_config import FeatureAlignmentConfig
from fastppt_kernels import align_features, feature_statistics


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

    def __call__(self, features: Tensor) -> Tensor:
        """Take note of the features; returns them."""
        self.mean, self.std = feature_statistics(features, channel_dim=self.channel_dim)
        return features


@dataclass
class TunedStatistics:
    """Takes the features of a layer in the tuned pass and compares them with the base's.

    Attributes:
        base: What took them before.
        outbox: Takes the losses of mean and standard deviation.
    """

    base: BaseStatistics
    outbox: Outbox = field(default_factory=Outbox)

    def __call__(self, features: Tensor) -> Tensor:
        """Compare the features; returns them as the network is to read them.

        Their gradient by the losses is then added in the pass that computes it.
        """
        base = self.base
        assert base.mean is not None and base.std is not None
        aligned, *losses = align_features(
            features, base.mean, base.std, channel_dim=base.channel_dim
        )
        self.outbox.losses = tuple(losses)
        return aligned


@dataclass
class FeatureHook:
    """Hands a layer's features to whoever looks at them, and has the network go on with theirs.

    Attributes:
        features_of: Finds the features in the layer's output.
        with_features: Puts others in their place.
        tap: Who looks; None for nobody.
    """

    features_of: Callable[[Any], Tensor]
    with_features: Callable[[Any, Tensor], Any]
    tap: BaseStatistics | TunedStatistics | None = None

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        """Be a forward hook."""
        if self.tap is None:
            return output
        return self.with_features(output, self.tap(self.features_of(output)))


def aligned_layers(
    family: Family, config: FeatureAlignmentConfig, key: str
) -> dict[str, nn.Module]:
    """Return the layers whose features are held, by their paths in the network.

    Args:
        family: The loaded model.
        config: Which layers.
        key: The table of the configuration, for messages.

    Raises:
        UserError: a pattern matches no layer.
    """
    layers = family.feature_layers()
    names = match_layers(config.layers, layers, family.aligned_blocks, f"{key}.layers")
    return {name: layers[name] for name in names}


class FeatureAlignment:
    """Looks at the features of a network, from a base pass to the tuned pass after it.

    Args:
        family: Says what features are.
        layers: Those that `aligned_layers` finds; they get a hook, which does nothing outside of
            the passes.
    """

    def __init__(self, family: Family, layers: Sequence[nn.Module]) -> None:
        self._hooks = [FeatureHook(family.features_of, family.with_features) for _ in layers]
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
        """Return each layer's part of L_mean and of L_std, [layers] both, unweighted.

        They are those of the tuned forward pass.
        """
        means, stds = zip(*collect(self._tuned), strict=True)
        return torch.stack(means), torch.stack(stds)

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.tap = None
