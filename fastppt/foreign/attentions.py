"""Attentions of foreign networks that hand query and key on while a pass is looked at.

A stand-in takes the place of an attention's processor. It calls the module's own projections, so it
finds whatever adapters there are. Passes that nobody looks at run the processor that was there.

Shape legend: B batch, H heads, Q image tokens, K text tokens, N tokens of both, C channels, D head
dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor

from fastppt.families.attention import AdaptableAttention
from fastppt.families.joint_attention import JointAttention
from fastppt.foreign.recording import MapTap

CROSS_PROCESSORS = (AttnProcessor2_0, AttnProcessor, XFormersAttnProcessor, SlicedAttnProcessor)
"""They compute one thing in different ways; a tuned pass computes it the first's way, and differs
from the others' by rounding."""
JOINT_PROCESSORS = (JointAttnProcessor2_0,)


def check_attention(name: str, attn: Attention, *, is_joint: bool) -> None:
    """Refuse an attention whose query and key cannot be had.

    Raises:
        ValueError: its processor is not known here, its projections are fused, or it does more
            than project and attend.
    """
    processor = attn.processor
    if attn.fused_projections:
        raise ValueError(
            f"{name}: its projections are fused; call unfuse_qkv_projections() on the network "
            "before fastppt.attach()"
        )
    stock = JOINT_PROCESSORS if is_joint else CROSS_PROCESSORS
    own = JointAttention if is_joint else AdaptableAttention
    # Classes derived from these may do anything in between.
    if type(processor) not in (*stock, own):
        names = ", ".join(kind.__name__ for kind in stock)
        raise ValueError(
            f"{name}: its processor is a {type(processor).__name__}, and query and key are known "
            f"of {names}; call network.set_attn_processor({stock[0].__name__}()) before "
            "fastppt.attach(), or leave this layer out by attentions=[...]"
        )
    extras = _extras(attn, is_joint)
    if extras:
        raise ValueError(
            f"{name}: it has {', '.join(extras)}, which is not known here; leave this layer out by "
            "attentions=[...]"
        )


def _extras(attn: Attention, is_joint: bool) -> list[str]:
    """Return what an attention does that a stand-in leaves out."""
    modules = ["spatial_norm", "group_norm", "norm_cross"]
    if not is_joint:
        modules += ["norm_q", "norm_k"]
    extras = [part for part in modules if getattr(attn, part) is not None]
    if attn.residual_connection:
        extras.append("residual_connection=True")
    if attn.rescale_output_factor != 1:
        extras.append(f"rescale_output_factor={attn.rescale_output_factor}")
    if not attn.scale_qk:
        extras.append("scale_qk=False")
    return extras


@dataclass
class CrossStandIn:
    """Stands in for the processor of a cross-attention.

    Attributes:
        name: Path of the attention.
        stock: The processor that was there.
        tap: Sees query and key.
    """

    name: str
    stock: Any
    tap: MapTap

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from the image [B, Q, C] to the text [B, K, C].

        A base pass is the stock processor's own, which projects query and key once more; a tuned
        pass computes what AttnProcessor2_0 does.
        """
        are_seen = self.tap.passes.are_seen
        if are_seen:
            _refuse_mask(self.name, attention_mask)
            query = _heads(attn, attn.to_q(hidden_states))
            key = _heads(attn, attn.to_k(encoder_hidden_states))
            self.tap.see(query, key)
        if not are_seen or self.tap.passes.phase == "base":
            output: Tensor = self.stock(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
            )
            return output
        value = _heads(attn, attn.to_v(encoder_hidden_states))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return _project_out(attn, mixed.transpose(1, 2).flatten(2))

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the processor that was there where the network is copied or pickled."""
        return _itself, (self.stock,)


@dataclass
class JointStandIn:
    """Stands in for the processor of a joint attention of image and text.

    While a pass is looked at, attention and its map come from one operation, which rounds as
    PyTorch's flash attention does.

    Attributes:
        name: Path of the attention.
        stock: The processor that was there.
        tap: Does the attention's work.
    """

    name: str
    stock: Any
    tap: MapTap

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend from and to image [B, Q, C] and text [B, K, C], as JointAttnProcessor2_0 does."""
        if not self.tap.passes.are_seen:
            outputs: tuple[Tensor, Tensor] = self.stock(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
            )
            return outputs
        _refuse_mask(self.name, attention_mask)
        num_image_tokens, num_text_tokens = hidden_states.shape[1], encoder_hidden_states.shape[1]
        image, text = hidden_states, encoder_hidden_states
        value = torch.cat(
            [_heads(attn, attn.to_v(image)), _heads(attn, attn.add_v_proj(text))], dim=2
        )
        query = _joined(
            _normalized(attn.norm_q, _heads(attn, attn.to_q(image))),
            _normalized(attn.norm_added_q, _heads(attn, attn.add_q_proj(text))),
            value.dtype,
        )
        key = _joined(
            _normalized(attn.norm_k, _heads(attn, attn.to_k(image))),
            _normalized(attn.norm_added_k, _heads(attn, attn.add_k_proj(text))),
            value.dtype,
        )
        mixed = self.tap.attend(query, key, value, num_text_tokens).transpose(1, 2).flatten(2)
        out_image, out_text = mixed[:, :num_image_tokens], mixed[:, num_image_tokens:]
        if not attn.context_pre_only:
            out_text = attn.to_add_out(out_text)
        return _project_out(attn, out_image), out_text

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the processor that was there where the network is copied or pickled."""
        return _itself, (self.stock,)


def stand_in(name: str, attn: Attention, tap: MapTap) -> Callable[[], None]:
    """Have a tap look into an attention that `check_attention` passed.

    Returns:
        What takes it out again.
    """
    stock = attn.processor
    if isinstance(stock, AdaptableAttention | JointAttention):
        # Ours have a place for it.
        stock.tap = tap

        def empty() -> None:
            stock.tap = None

        return empty
    is_joint = attn.added_kv_proj_dim is not None
    placed = JointStandIn(name, stock, tap) if is_joint else CrossStandIn(name, stock, tap)
    attn.processor = placed

    def restore() -> None:
        # Unless it was exchanged since.
        if attn.processor is placed:
            attn.processor = stock

    return restore


def is_looked_into(attn: Attention) -> bool:
    """Say whether a tap is in an attention."""
    processor = attn.processor
    if isinstance(processor, AdaptableAttention | JointAttention):
        return isinstance(processor.tap, MapTap)
    return isinstance(processor, CrossStandIn | JointStandIn)


def _refuse_mask(name: str, attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            f"{name}: got an attention mask, and maps are known without one; call the network "
            "without encoder_attention_mask, or leave this layer out by attentions=[...]"
        )


def _heads(attn: Attention, tokens: Tensor) -> Tensor:
    """Return [B, N, C] as [B, H, N, D]."""
    heads: Tensor = tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return heads


def _normalized(norm: Callable[[Tensor], Tensor] | None, tokens: Tensor) -> Tensor:
    """Return queries or keys [B, H, N, D] normalised over D, where the model does that."""
    return tokens if norm is None else norm(tokens)


def _joined(image: Tensor, text: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tokens of both, image first, in a dtype.

    Under autocast norms give float32, and PyTorch's attention then rounds what it is given.
    """
    return torch.cat([image, text], dim=2).to(dtype)


def _project_out(attn: Attention, mixed: Tensor) -> Tensor:
    output: Tensor = attn.to_out[1](attn.to_out[0](mixed))
    return output


def _itself(processor: Any) -> Any:
    return processor
