"""The attention backends: who computes softmax(Q K^T / sqrt(D)) V.

Shape legend: B batch, H heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastppt.errors import UserError

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Takes query [B, H, Q, D], key and value [B, H, K, D], and a mask [B, H, Q, K] (or what broadcasts
to it) that is added to the logits, or None; returns [B, H, Q, D]."""

HALVES = (torch.float16, torch.bfloat16)


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> Attend:
    """Return the attention backend for ``model.attention``; its package is imported here.

    Args:
        name: `sdpa`, `xformers` or `flash`.
        device: Where queries, keys and values will lie. On the meta device all backends are one,
            which has the memory of them all: no attention map is ever whole.
        dtype: Of queries, keys and values.

    Raises:
        UserError: it cannot be used here; says why, and what to install.
    """
    if device.type == "meta":
        return _outlined
    reason = why_not(name, device, dtype)
    if reason is not None:
        raise UserError(f"model.attention {name}: {reason}. Pass --attention sdpa to do without")
    return _load(name)


def attention_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Return every backend, and why it cannot be used for tensors like that; None if it can."""
    return {name: why_not(name, device, dtype) for name in ("sdpa", "xformers", "flash")}


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot be used for tensors like that, in a few words; None if it can.

    An installed package runs once, forward and backward, on a few numbers: xformers imports without
    complaint where its kernels do not fit the torch that is here.
    """
    match name:
        case "sdpa":
            return None
        case "xformers":
            reasons = _not_here("xformers", 'pip install "fastppt[xformers]"', device)
            if dtype not in (*HALVES, torch.float32):
                reasons.append(f"computes in bf16, fp16 or fp32, not in {_words(dtype)}")
        case "flash":
            install = "pip install flash-attn --no-build-isolation"
            reasons = _not_here("flash_attn", install, device)
            if dtype not in HALVES:
                reasons.append(f"computes in bf16 or fp16, not in {_words(dtype)}")
            if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
                capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
                reasons.append(f"needs a GPU of compute capability 8.0, this one has {capability}")
        case _:
            raise AssertionError(name)
    if reasons:
        return "; ".join(reasons)
    try:
        _try_out(_load(name), device, dtype)
    except (ImportError, OSError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"is installed but does not run here ({lines[0].strip()}); reinstall it"
    return None


def _not_here(package: str, install: str, device: torch.device) -> list[str]:
    reasons = []
    if find_spec(package) is None:
        reasons.append(f"not installed ({install})")
    if device.type != "cuda":
        reasons.append(f"needs a GPU, and the device is {device}")
    return reasons


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _try_out(attend: Attend, device: torch.device, dtype: torch.dtype) -> None:
    shape = (1, 1, 8, 64)
    inputs = [torch.ones(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    with torch.enable_grad():
        attend(inputs[0], inputs[1], inputs[2], None).sum().backward()


def _load(name: str) -> Attend:
    match name:
        case "xformers":
            return _xformers(import_module("xformers.ops").memory_efficient_attention)
        case "flash":
            return _flash(import_module("flash_attn").flash_attn_func)
        case _:
            return _sdpa


class _OutlinedAttention(torch.autograd.Function):
    """Shapes alone: what attention returns, and what it keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        sums = torch.promote_types(query.dtype, torch.float32)
        logsumexp = query.new_empty(query.shape[:3], dtype=sums)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _outlined(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    output: Tensor = _OutlinedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output


class OutlinedAttention(TorchFunctionMode):
    """Gives torch's own attention, whoever calls it, the memory on the meta device that it has.

    There torch would take it apart, into whole attention maps.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Outline attention; leave all else alone."""
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            return _outlined(query, key, value, None)
        return func(*args, **(kwargs or {}))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _xformers(operation: Callable[..., Tensor]) -> Attend:
    """Wrap `xformers.ops.memory_efficient_attention`, which works on [B, Q, H, D]."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        bias = None if mask is None else _aligned_bias(mask, query, key)
        output = operation(*_heads_inside(query, key, value), attn_bias=bias)
        return output.transpose(1, 2)

    return attend


def _flash(operation: Callable[..., Tensor]) -> Attend:
    """Wrap `flash_attn.flash_attn_func`, which works on [B, Q, H, D] and knows no mask."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            raise UserError(
                "model.attention flash: the model masks attention, which flash-attn cannot do; "
                "pass --attention sdpa or --attention xformers"
            )
        return operation(*_heads_inside(query, key, value)).transpose(1, 2)

    return attend


def _heads_inside(*tensors: Tensor) -> tuple[Tensor, ...]:
    """View [B, H, Q, D] as [B, Q, H, D]: how projections lie in memory, so nothing is copied."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _aligned_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask as [B, H, Q, K] in the query's dtype, its rows 16 bytes or more apart.

    xformers broadcasts nothing and refuses rows that do not begin at multiples of 16 bytes.
    """
    num_keys = key.shape[2]
    padded = query.new_zeros(*query.shape[:3], -(-num_keys // 8) * 8)
    bias = padded[..., :num_keys]
    bias.copy_(mask)
    return bias
