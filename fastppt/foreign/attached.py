"""Base and tuned passes of somebody else's network compared, in somebody else's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Real
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastppt.families.networks import AlignableNetwork, alignable_network
from fastppt.foreign.adapters import BasePasses
from fastppt.foreign.attentions import check_attention, is_looked_into, stand_in
from fastppt.foreign.recording import FeatureRecorder, MapTap, Passes, StatisticsTap
from fastppt.foreign.wrappers import unwrap
from fastppt.objectives.feature_alignment import BaseStatistics
from fastppt.objectives.layers import Outbox, Sender, match_layers
from fastppt.stage_config import AttentionAlignmentConfig, FeatureAlignmentConfig

FEATURE_WEIGHT = FeatureAlignmentConfig().weight
ATTENTION_WEIGHT = AttentionAlignmentConfig().weight

COLUMN_DTYPES = (torch.int64, torch.int32)

BasePass = Callable[[], AbstractContextManager[Any]]
"""Returns what takes the adapters out of the passes inside."""


@dataclass(frozen=True)
class AlignmentLosses:
    """The losses of one tuned pass, 0-dim and weighted, to be added to the loop's own.

    Source: Adaptive Personalized Training (arXiv 2507.02687), equations 4, 5 and 6.

    Attributes:
        attention: Of the attention maps of the text.
        feature_mean: Of the features' means over space.
        feature_std: Of their standard deviations.
    """

    attention: Tensor
    feature_mean: Tensor
    feature_std: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of the three."""
        return self.attention + self.feature_mean + self.feature_std


def attach(
    network: nn.Module,
    *,
    features: Sequence[str] | None = None,
    attentions: Sequence[str] | None = None,
    feature_weight: float = FEATURE_WEIGHT,
    attention_weight: float = ATTENTION_WEIGHT,
    columns: Tensor | None = None,
    base_weights: Mapping[str, Tensor] | None = None,
    switch: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Attached:
    """Look into a network of diffusers, so that its passes can be held to the base's.

    The network stays as it is, outputs and state dict bit for bit, until a base pass is run; in a
    base pass and in passes with gradients after it, the chosen layers are looked into. Attach after
    adapters were added, and before the first pass if the network is compiled.

    Args:
        network: A `UNet2DConditionModel` or `SD3Transformer2DModel`, as it is or wrapped by peft,
            accelerate, DistributedDataParallel or torch.compile.
        features: Patterns of the modules whose features are held, where ``*`` matches any text;
            None for those of Adaptive Personalized Training, an empty list for none.
        attentions: Likewise the attentions whose maps are held.
        feature_weight: Factor of either term of the features.
        attention_weight: Factor of the term of the attention maps.
        columns: [K] or [B, K] int64, the base's text token that each token is compared with, -1:
            none; None where both prompts have token beside token.
        base_weights: Base values, by path, of the network's own parameters that train; they are put
            in their places in a base pass, and not copied.
        switch: Returns a context manager that takes the adapters out of the passes inside, for
            adapters that are not found; nothing is searched or checked then.

    Returns:
        The handle; also a context manager that detaches at its end.

    Raises:
        ValueError: a network or a processor of an unknown kind, a network that is attached to
            already, a pattern that matches no layer, or no way to a base pass.
    """
    for key, weight in (("feature_weight", feature_weight), ("attention_weight", attention_weight)):
        if not isinstance(weight, Real) or isinstance(weight, bool) or not weight >= 0:
            raise ValueError(f"{key}: got {weight!r}, want a number >= 0; 0 pulls at nothing")
    _refuse_wrong_columns(columns)
    inner = alignable_network(unwrap(network))
    _refuse_second(inner)
    feature_layers = _chosen(features, inner.feature_layers, inner, "features")
    text_attentions = _chosen(attentions, inner.text_attentions, inner, "attentions")
    if not feature_layers and not text_attentions:
        raise ValueError(
            "features and attentions: are both empty, so nothing is held; leave one of them out"
        )
    for name, attn in text_attentions.items():
        check_attention(name, attn, is_joint=inner.is_joint)
    return Attached(
        inner,
        feature_layers,
        text_attentions,
        weights=(attention_weight, feature_weight),
        columns=columns,
        base_pass=switch or BasePasses(inner.network, base_weights),
    )


class Attached:
    """What looks into a network's layers; `attach` makes it.

    A step is a base pass, the tuned pass, and the losses::

        with attached.base():
            base_prediction = unet(noisy, timesteps, class_text).sample
        prediction = unet(noisy, timesteps, subject_text).sample
        losses = attached.losses()
        (loss_of(prediction, target) + losses.total).backward()

    Passes without gradients outside of `base`, such as those of sampling, are not looked at. With
    checkpointed blocks, of the non-reentrant kind that diffusers uses, a step's backward pass comes
    before the next base pass. In a compiled network base and tuned passes are variants of the code,
    so each is compiled once: raise ``torch._dynamo.config.recompile_limit`` where there are many.
    A copy of the network, or what is pickled of it, is not attached.
    """

    def __init__(
        self,
        network: AlignableNetwork,
        feature_layers: Mapping[str, nn.Module],
        attentions: Mapping[str, Any],
        *,
        weights: tuple[float, float],
        columns: Tensor | None,
        base_pass: BasePass,
    ) -> None:
        self._network: Any = network.network
        self._attention_weight, self._feature_weight = weights
        self._columns = columns
        self._base_pass = base_pass
        self._passes = Passes()
        self._number = 0
        self._maps: dict[str, MapTap] = {}
        self._statistics: dict[str, StatisticsTap] = {}
        self._undo: list[Callable[[], None]] = []
        for name, attn in attentions.items():
            self._maps[name] = MapTap(self._passes)
            self._undo.append(stand_in(name, attn, self._maps[name]))
        for name, layer in feature_layers.items():
            recorder = StatisticsTap(self._passes, BaseStatistics(network.feature_channel_dim))
            hook = FeatureRecorder(network.features_of, network.with_features, recorder)
            self._statistics[name] = recorder
            self._undo.append(layer.register_forward_hook(hook).remove)

    @property
    def features(self) -> list[str]:
        """Paths of the layers whose features are held."""
        return [*self._statistics]

    @property
    def attentions(self) -> list[str]:
        """Paths of the attentions whose maps are held."""
        return [*self._maps]

    @contextmanager
    def base(self, columns: Tensor | None = None) -> Iterator[None]:
        """Run the pass inside as the base: without adapters, without gradients, remembered.

        Its prediction is bit for bit that of the network without adapters, but for joint attention
        where PyTorch's own choice for the device is another kernel than flash attention: there it
        differs by rounding. The last pass inside counts.

        Args:
            columns: For the tuned pass after it, as of `attach`; None for those given there.

        Raises:
            ValueError: the handle is detached, or the pass did not reach a layer.
        """
        self._refuse_detached()
        _refuse_wrong_columns(columns)
        self._number += 1
        self._forget()
        self._passes.phase = "base"
        try:
            with torch.no_grad(), self._base_pass():
                yield
            self._refuse_unreached(
                [name for name, tap in self._maps.items() if tap.base.map_sum is None]
                + [name for name, tap in self._statistics.items() if tap.base.mean is None],
                "the base pass",
                "run the network once inside of attached.base()",
            )
            columns = self._columns if columns is None else columns
            for tap in self._maps.values():
                assert tap.base.map_sum is not None
                _refuse_foreign_columns(columns, tap.base.map_sum.shape[2])
                tap.tuned.columns = columns
        except BaseException:
            self._forget()
            raise
        self._passes.phase = "tuned"

    def losses(self) -> AlignmentLosses:
        """Return the losses of the tuned pass, which has just ended, before its backward pass.

        Raises:
            ValueError: there was no base pass, no tuned pass after it, or its losses were read.
        """
        self._refuse_detached()
        if self._passes.phase != "tuned":
            raise ValueError(
                "losses(): there was no base pass; run the network inside of attached.base(), then "
                "with gradients, then ask for the losses"
            )
        if self._passes.is_read:
            raise ValueError(
                "losses(): those of this tuned pass were read; keep what the first call returned, "
                "or begin the next step with attached.base()"
            )
        senders: list[tuple[str, Sender]] = [(name, tap.tuned) for name, tap in self._maps.items()]
        senders += [(name, tap.tuned) for name, tap in self._statistics.items()]
        self._refuse_unreached(
            [name for name, sender in senders if not sender.outbox.losses],
            "a tuned pass",
            "run the network with gradients after attached.base(), on a batch of the same size "
            "with texts of the same length, and checkpoint blocks with use_reentrant=False",
        )
        maps = [tap.tuned.outbox.losses[0] for tap in self._maps.values()]
        means = [tap.tuned.outbox.losses[0] for tap in self._statistics.values()]
        stds = [tap.tuned.outbox.losses[1] for tap in self._statistics.values()]
        # Blocks that run once more in the backward pass send their losses to nobody.
        unread = Outbox()
        for _, sender in senders:
            sender.outbox = unread
        self._passes.is_read = True
        return AlignmentLosses(
            self._term(self._attention_weight, maps),
            self._term(self._feature_weight, means),
            self._term(self._feature_weight, stds),
        )

    def detach(self) -> None:
        """Leave the network as it was; the handle is of no use afterwards."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._forget()

    def __enter__(self) -> Attached:
        """Return the handle."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def _term(self, weight: float, by_layer: list[Tensor]) -> Tensor:
        """Return the weighted sum of the layers' parts, 0 where there are none."""
        if not by_layer:
            return torch.zeros((), device=next(self._network.parameters()).device)
        term = weight * torch.stack(by_layer).sum()
        if term.requires_grad:
            number = self._number

            def check(gradient: Tensor) -> None:
                self._refuse_stale(number)

            term.register_hook(check)
        return term

    def _refuse_stale(self, number: int) -> None:
        """Refuse to compute checkpointed blocks again that would not be compared as they were."""
        if not self._network.is_gradient_checkpointing:
            return
        again = "backward(): blocks are checkpointed and so run again now, but "
        if not self._undo:
            raise ValueError(f"{again}the handle is detached; call backward() before detach()")
        if number != self._number:
            raise ValueError(
                f"{again}another base pass came in between; call backward() before the next "
                "attached.base()"
            )

    def _refuse_unreached(self, names: list[str], what: str, mend: str) -> None:
        if names:
            raise ValueError(
                f"{what} did not reach {names[0]} and {len(names) - 1} other layers; {mend}. A "
                "compiled network must be attached to before it first runs, or after "
                "torch.compiler.reset()"
            )

    def _refuse_detached(self) -> None:
        if not self._undo:
            raise ValueError(
                "attached: is detached from its network; call fastppt.attach(network) again"
            )

    def _forget(self) -> None:
        self._passes.phase, self._passes.is_read = "idle", False
        for tap in self._maps.values():
            tap.base.map_sum, tap.tuned.columns, tap.tuned.outbox = None, None, Outbox()
        for recorder in self._statistics.values():
            recorder.base.mean, recorder.base.std = None, None
            recorder.tuned.outbox = Outbox()


def _chosen(
    patterns: Sequence[str] | None, layers: Mapping[str, Any], network: AlignableNetwork, key: str
) -> dict[str, Any]:
    if isinstance(patterns, str):
        raise ValueError(f"{key}: got {patterns!r}; pass a list of patterns, [{patterns!r}]")
    names = match_layers(patterns, layers, network.aligned_blocks, key)
    return {name: layers[name] for name in names}


def _refuse_wrong_columns(columns: Any) -> None:
    if columns is None:
        return
    given: Any = type(columns).__name__
    if isinstance(columns, Tensor):
        if columns.dtype in COLUMN_DTYPES and columns.dim() in (1, 2) and columns.numel():
            return
        given = f"{columns.dtype} {tuple(columns.shape)}"
    raise ValueError(
        f"columns: got {given}, want an int64 tensor [K] or [B, K], of each text token the one of "
        "the base that it is compared with, -1 for none"
    )


def _refuse_foreign_columns(columns: Tensor | None, num_base_tokens: int) -> None:
    """Refuse columns of tokens that the base has not; on the CPU, where reading waits for none."""
    if columns is None or columns.device.type != "cpu":
        return
    least, most = int(columns.min()), int(columns.max())
    if least < -1 or most >= num_base_tokens:
        raise ValueError(
            f"columns: got {least} to {most}, but the base's text has {num_base_tokens} tokens; "
            f"want 0 to {num_base_tokens - 1}, or -1 for none"
        )


def _refuse_second(network: AlignableNetwork) -> None:
    hooks = (
        hook for layer in network.feature_layers.values() for hook in layer._forward_hooks.values()
    )
    if any(isinstance(hook, FeatureRecorder) for hook in hooks) or any(
        is_looked_into(attn) for attn in network.text_attentions.values()
    ):
        raise ValueError(
            "network: is attached to already; use the handle that attach() returned, or call its "
            "detach() first"
        )
