"""Attention with places for adapters, and the switch that takes adapters out of a pass.

Shape legend: B batch, Q image tokens, K keys (text tokens, or Q in self-attention), C channels,
H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fastppt.families.backends import Attend


@dataclass
class AdapterSwitch:
    """Says whether a pass is tuned (adapters on) or base (adapters off).

    One switch serves a whole network. It is a plain Python flag, so a base pass does no adapter
    work at all: no multiplication by zero, no extra launch.
    """

    enabled: bool = True

    @contextmanager
    def base(self) -> Iterator[None]:
        """Run the passes inside as the base network."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


class ProjectionAdapter(Protocol):
    """Adds to linear projections of one shared input."""

    switch: AdapterSwitch

    def __call__(self, inputs: Tensor, linears: tuple[nn.Linear, ...]) -> tuple[Tensor, ...]:
        """Return the adapted projection of each linear."""


@dataclass
class Projections:
    """Linear projections that share an input, with or without an adapter.

    Attributes:
        names: Full module paths of the linears.
        linears: The frozen projections of the base network.
        adapter: What is added to them while its switch is on.
    """

    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    adapter: ProjectionAdapter | None = None

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Project [..., C] inputs; one output a linear."""
        if self.adapter is None or not self.adapter.switch.enabled:
            return tuple(linear(inputs) for linear in self.linears)
        return self.adapter(inputs, self.linears)


@dataclass
class AdaptableAttention:
    """Processor for diffusers' `Attention`, equal to the stock one while adapters are off.

    Self-attention projects query, key and value from one input; cross-attention projects the
    query from the image and key and value from the text.

    Attributes:
        groups: Its projections, those that share an input together, in the order of the module's.
    """

    from_image: Projections
    from_text: Projections | None
    out: Projections
    attend: Attend
    groups: tuple[Projections, ...] = field(init=False)

    def __post_init__(self) -> None:
        inner = () if self.from_text is None else (self.from_text,)
        self.groups = (self.from_image, *inner, self.out)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return [B, Q, C]; ``temb`` is part of diffusers' call and not used."""
        if self.from_text is None:
            query, key, value = self.from_image(hidden_states)
        else:
            assert encoder_hidden_states is not None
            (query,) = self.from_image(hidden_states)
            key, value = self.from_text(encoder_hidden_states)
        query, key, value = (
            tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for tensor in (query, key, value)
        )
        if attention_mask is not None:
            batch_size, num_keys = key.shape[0], key.shape[2]
            attention_mask = attn.prepare_attention_mask(attention_mask, num_keys, batch_size)
            attention_mask = attention_mask.unflatten(0, (batch_size, attn.heads))
        mixed = self.attend(query, key, value, attention_mask)
        (output,) = self.out(mixed.transpose(1, 2).flatten(2))
        return output


def make_adaptable(network: nn.Module, attend: Attend) -> list[AdaptableAttention]:
    """Give every attention of a UNet a processor with places for adapters.

    Args:
        network: A diffusers UNet; its attention processors are replaced, its weights not touched.
        attend: The attention backend.

    Returns:
        The processors in the order of the network's modules.
    """
    processors = []
    for name, attn in network.named_modules():
        if isinstance(attn, Attention):
            processor = _adaptable(name, attn, attend)
            attn.set_processor(processor)
            processors.append(processor)
    return processors


def _adaptable(name: str, attn: Attention, attend: Attend) -> AdaptableAttention:
    # What transformer blocks never have, and the processor therefore leaves out.
    assert attn.spatial_norm is None and attn.group_norm is None and not attn.norm_cross
    assert attn.norm_q is None and attn.norm_k is None and not attn.residual_connection
    assert attn.rescale_output_factor == 1.0 and attn.to_out[1].p == 0.0

    def projections(*parts: str) -> Projections:
        linears = tuple(attn.get_submodule(part) for part in parts)
        assert all(isinstance(linear, nn.Linear) for linear in linears)
        return Projections(tuple(f"{name}.{part}" for part in parts), linears)

    if attn.is_cross_attention:
        return AdaptableAttention(
            projections("to_q"), projections("to_k", "to_v"), projections("to_out.0"), attend
        )
    joint = projections("to_q", "to_k", "to_v")
    return AdaptableAttention(joint, None, projections("to_out.0"), attend)
