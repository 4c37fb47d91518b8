"""Attention with places for adapters, and the switch that takes adapters out of a pass.

Shape legend: B batch, Q image tokens, K keys (text tokens, or Q in self-attention), C channels,
H heads, D head dim; n linears of input width I and output width O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
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

    @property
    def switch(self) -> AdapterSwitch:
        """Says whether it does."""

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Return the n adapted projections [..., O] of [..., I] inputs.

        Args:
            inputs: What all of them project.
            weight: [n*O, I], the frozen weights of the n linears, one below the other.
            bias: [n*O], or None.
        """


@dataclass
class Projections:
    """Linear projections that share an input, with or without an adapter.

    Attributes:
        names: Full module paths of the linears.
        linears: The projections of the base network.
        adapter: What is added to them while its switch is on; put there by `adapt`.
    """

    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    adapter: ProjectionAdapter | None = field(init=False, default=None)

    def adapt(self, adapter: ProjectionAdapter) -> None:
        """Give the projections an adapter, and make one matrix of their frozen weights.

        The linears' own parameters become views of it, under their own names, so that the network
        is saved, loaded into and read as before; one product instead of one a linear runs with the
        adapter and in base passes. A network that is moved or cast must be adapted anew.
        """
        self.adapter = adapter
        self._weight = _fuse([linear.weight for linear in self.linears])
        biases = [linear.bias for linear in self.linears]
        self._bias = None if biases[0] is None else _fuse(biases)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Project [..., I] inputs; one output [..., O] a linear."""
        if self.adapter is None:
            return tuple(linear(inputs) for linear in self.linears)
        if self.adapter.switch.enabled:
            return self.adapter(inputs, self._weight, self._bias)
        return part(F.linear(inputs, self._weight, self._bias), len(self.linears))


def part(outputs: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """Return what lies side by side in [..., n*O] as n views [..., O]."""
    # One alone as it is: the backward of a chunk is a copy.
    return (outputs,) if num_parts == 1 else outputs.chunk(num_parts, dim=-1)


def _fuse(parameters: Sequence[Tensor]) -> Tensor:
    """Return the parameters in one storage, which they become views of; one alone stays."""
    if len(parameters) == 1:
        return parameters[0].detach()
    assert len({parameter.shape for parameter in parameters}) == 1
    fused = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, view in zip(parameters, fused.chunk(len(parameters)), strict=True):
        parameter.data = view
    return fused


class AttentionTap(Protocol):
    """Looks into an attention of the image to the text, as the passes go by."""

    def see(self, query: Tensor, key: Tensor) -> None:
        """Take note of cross-attention: query [B, H, Q, D] and key [B, H, K, D] of the text."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, num_text_tokens: int) -> Tensor:
        """Compute joint attention, [B, H, N, D] all, the last ``num_text_tokens`` the text's."""


class TextAttention(Protocol):
    """An attention of the image to the text that can be looked into.

    Attributes:
        tap: Who looks; None for nobody, which costs nothing.
    """

    tap: AttentionTap | None


@dataclass
class AdaptableAttention:
    """Processor for diffusers' `Attention`, equal to the stock one while adapters are off.

    Self-attention projects query, key and value from one input; cross-attention projects the
    query from the image and key and value from the text.

    Attributes:
        groups: Its projections, those that share an input together, in the order of the module's.
        tap: Who looks into cross-attention; it changes nothing.
    """

    from_image: Projections
    from_text: Projections | None
    out: Projections
    attend: Attend
    groups: tuple[Projections, ...] = field(init=False)
    tap: AttentionTap | None = None

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
        if self.tap is not None:
            self.tap.see(query, key)
        if attention_mask is not None:
            batch_size, num_keys = key.shape[0], key.shape[2]
            attention_mask = attn.prepare_attention_mask(attention_mask, num_keys, batch_size)
            attention_mask = attention_mask.unflatten(0, (batch_size, attn.heads))
        mixed = self.attend(query, key, value, attention_mask)
        (output,) = self.out(mixed.transpose(1, 2).flatten(2))
        return output


def text_attentions(network: nn.Module) -> dict[str, TextAttention]:
    """Return the processors that attend from image to text, by the path of their module."""
    attentions = {
        name: module.processor
        for name, module in network.named_modules()
        if isinstance(module, Attention)
    }
    return {
        name: processor for name, processor in attentions.items() if processor.from_text is not None
    }


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
