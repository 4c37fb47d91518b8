"""Joint attention of image and text tokens, with places for adapters.

Source: MMDiT, Esser et al., arXiv 2403.03206, figure 2.

Shape legend: B batch, Q image tokens, K text tokens, N tokens of either, C channels, H heads,
D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fastppt.families.attention import AttentionTap, Projections
from fastppt.families.backends import Attend


@dataclass
class JointAttention:
    """Processor for diffusers' `Attention` in joint blocks, the stock one while adapters are off.

    Image and text have projections of their own; all tokens attend to all tokens. A second
    attention of a block, which some models have, sees the image alone. The last block drops its
    text after the attention: what the text's query finds there is never read. It is still computed,
    because fewer rows would round differently, but it has no place for an adapter.

    Attributes:
        from_image: Query, key and value of the image.
        from_text: Key, value and query of the text (in the last block without the query); None in
            attention over the image alone.
        out: Output of the image.
        out_text: Output of the text; None where it is dropped, and over the image alone.
        groups: Its projections, those that share an input together, in the order of the module's.
        tap: Who looks at the image's attention to the text, and then does the attention's work too,
            whichever backend there is: nobody else gives the softmax's sum away.
    """

    from_image: Projections
    from_text: Projections | None
    out: Projections
    out_text: Projections | None
    attend: Attend
    groups: tuple[Projections, ...] = field(init=False)
    tap: AttentionTap | None = None

    def __post_init__(self) -> None:
        every = (self.from_image, self.from_text, self.out, self.out_text)
        self.groups = tuple(group for group in every if group is not None)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Attend from and to image [B, Q, C] and text [B, K, C].

        ``attention_mask`` is part of diffusers' call; joint blocks give none.

        Returns:
            The image [B, Q, C] where it is alone; else image and text (None in the last block).
        """
        assert attention_mask is None
        num_image_tokens = hidden_states.shape[1]
        query, key, value = (_split_heads(attn, x) for x in self.from_image(hidden_states))
        query, key = _normalized(attn.norm_q, query), _normalized(attn.norm_k, key)
        if self.from_text is not None:
            assert encoder_hidden_states is not None
            text_key, text_value, *adaptable_query = self.from_text(encoder_hidden_states)
            (text_query,) = adaptable_query or [attn.add_q_proj(encoder_hidden_states)]
            text_query, text_key, text_value = (
                _split_heads(attn, x) for x in (text_query, text_key, text_value)
            )
            query = torch.cat([query, _normalized(attn.norm_added_q, text_query)], dim=2)
            key = torch.cat([key, _normalized(attn.norm_added_k, text_key)], dim=2)
            value = torch.cat([value, text_value], dim=2)
        if self.tap is None:
            mixed = self.attend(query, key, value, None)
        else:
            mixed = self.tap.attend(query, key, value, query.shape[2] - num_image_tokens)
        mixed = mixed.transpose(1, 2).flatten(2)
        (image,) = self.out(mixed[:, :num_image_tokens])
        if self.from_text is None:
            return image
        if self.out_text is None:
            return image, None
        (text,) = self.out_text(mixed[:, num_image_tokens:])
        return image, text


def make_joint_adaptable(network: nn.Module, attend: Attend) -> list[JointAttention]:
    """Give every attention of a network of joint blocks a processor with places for adapters.

    Args:
        network: A diffusers transformer of `JointTransformerBlock`; its attention processors are
            replaced, its weights not touched.
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


def _adaptable(name: str, attn: Attention, attend: Attend) -> JointAttention:
    # What joint blocks never have, and the processor therefore leaves out.
    assert attn.spatial_norm is None and attn.group_norm is None and not attn.norm_cross
    assert attn.rescale_output_factor == 1.0 and not attn.residual_connection
    assert attn.to_out[1].p == 0.0

    def projections(*parts: str) -> Projections:
        linears = tuple(attn.get_submodule(part) for part in parts)
        assert all(isinstance(linear, nn.Linear) for linear in linears)
        return Projections(tuple(f"{name}.{part}" for part in parts), linears)

    from_image, out = projections("to_q", "to_k", "to_v"), projections("to_out.0")
    if attn.added_kv_proj_dim is None:
        return JointAttention(from_image, None, out, None, attend)
    if attn.context_pre_only:
        from_text = projections("add_k_proj", "add_v_proj")
        return JointAttention(from_image, from_text, out, None, attend)
    from_text = projections("add_k_proj", "add_v_proj", "add_q_proj")
    return JointAttention(from_image, from_text, out, projections("to_add_out"), attend)


def _split_heads(attn: Attention, tokens: Tensor) -> Tensor:
    """Return [B, N, C] as [B, H, N, D]."""
    heads: Tensor = tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return heads


def _normalized(norm: Callable[[Tensor], Tensor] | None, tokens: Tensor) -> Tensor:
    """Return queries or keys [B, H, N, D] normalised over D, where the model does that."""
    return tokens if norm is None else norm(tokens)
