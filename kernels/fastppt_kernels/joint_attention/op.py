"""Joint attention: checks, registration with torch.library, and the attention of a GPU.

Shape suffixes: B batch, H heads, N tokens of image and text, D head dim.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.attention_alignment import attention_alignment_loss, attention_map_sum
from fastppt_kernels.checks import compute_dtype, refuse_second_derivative
from fastppt_kernels.joint_attention.plain import attend, backpropagate_attention

__all__ = ["joint_attention", "joint_attention_map_sum"]


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_text_tokens: int,
    base_map_sum: Tensor,
    scale: float | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the attention over image and text tokens together, and its alignment loss.

    P = softmax(query key^T * scale);   output = P value;
    S = sum over the heads of P's block of image queries and text keys;
    loss = mean_B (1/H) * sum (S - S_base)^2

    The loss also pulls at every key through the softmax's logsumexp: dlogsumexp = -rowsum(P * dP)
    over the text keys, and the attention's backward takes delta = rowsum(dO * O) - dlogsumexp.

    Source: Adaptive Personalized Training (arXiv 2507.02687), equation 6, for the joint attention
    of SD3, where the block as its map is our choice.

    Args:
        query: [B, H, N, D], image tokens first, the last ``num_text_tokens`` text; float32,
            bfloat16 or float16 (float64 too on the CPU). Any strides. Not written.
        key: [B, H, N, D], of the query's dtype. Not written.
        value: [B, H, N, D], of the query's dtype. Not written.
        num_text_tokens: At least 1, fewer than N.
        base_map_sum: [B, image tokens, J], what :func:`joint_attention_map_sum` returned for the
            base. A constant: it must not require a gradient.
        scale: The factor of the products; None: D^-1/2.
        columns: As of :func:`attention_alignment_loss`.

    Returns:
        The output [B, H, N, D] in the query's dtype, and the loss, 0-dim, float32 (float64 with a
        float64 query). Differentiable once.

    Raises:
        ValueError: A tensor of a wrong shape, dtype or device (named); a float64 query on a GPU.

    Rounding: on the CPU all is taken in float32 (float64), and the results are rounded once. On a
        GPU as FlexAttention does it, and as :func:`attention_alignment_loss`.

    Memory: no [B, H, N, N] is made. On a GPU the attention is ``torch.compile`` of FlexAttention:
        its first call compiles.
    Memory traffic and FLOPs: those of flash attention, 4 H N^2 D forward and 10 H N^2 D backward,
        and of the loss over the text keys, text / N of a tenth to a half more.
    """
    scale = _check(query, key, value, num_text_tokens, scale)
    output, logsumexp = _attend(query, key, value, scale)
    num_image_tokens = query.shape[2] - num_text_tokens
    loss = attention_alignment_loss(
        query[:, :, :num_image_tokens],
        key[:, :, num_image_tokens:],
        base_map_sum,
        scale=scale,
        logsumexp=logsumexp[:, :, :num_image_tokens],
        columns=columns,
    )
    return output, loss


def joint_attention_map_sum(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_text_tokens: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the attention over image and text tokens together, and its map sum: the base side.

    Source, arguments, rounding and errors: as :func:`joint_attention`.

    Returns:
        The output [B, H, N, D] in the query's dtype, and S [B, image tokens, text tokens], float32
        (float64 with a float64 query).
    """
    scale = _check(query, key, value, num_text_tokens, scale)
    output, logsumexp = _attend(query, key, value, scale)
    num_image_tokens = query.shape[2] - num_text_tokens
    map_sum = attention_map_sum(
        query[:, :, :num_image_tokens],
        key[:, :, num_image_tokens:],
        scale=scale,
        logsumexp=logsumexp[:, :, :num_image_tokens],
    )
    return output, map_sum


def _check(
    query: Tensor, key: Tensor, value: Tensor, num_text_tokens: int, scale: float | None
) -> float:
    """Raise ValueError for what is wrong; return the scale."""
    if query.dim() != 4 or 0 in query.shape:
        raise ValueError(
            f"query: got shape {tuple(query.shape)}, want [batch, heads, tokens, head dim], "
            "none of them 0; split the heads first"
        )
    if not query.dtype.is_floating_point or (query.is_cuda and query.dtype == torch.float64):
        raise ValueError(f"query: got dtype {query.dtype}, want float32, bfloat16 or float16")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, want {tuple(query.shape)}, the shape "
                "of query"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name}: got {tensor.dtype} on {tensor.device}, want {query.dtype} on "
                f"{query.device} like query"
            )
    if not 0 < num_text_tokens < query.shape[2]:
        raise ValueError(
            f"num_text_tokens: got {num_text_tokens}, want 1 to {query.shape[2] - 1}: "
            f"query has {query.shape[2]} tokens of image and text"
        )
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if query.device.type == "cpu":
        output, logsumexp = torch.ops.fastppt_kernels.attention(query, key, value, scale)
        return output, logsumexp
    from torch.nn.attention.flex_attention import AuxRequest

    output, aux = _compiled_flex_attention()(
        query, key, value, scale=scale, return_aux=AuxRequest(lse=True)
    )
    return output, aux.lse


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Return FlexAttention compiled: not compiled it has no kernel, and makes all maps."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@torch.library.custom_op("fastppt_kernels::attention", mutates_args=(), device_types="cpu")
def _attention_op(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attend(query, key, value, scale)


@torch.library.custom_op("fastppt_kernels::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward_op(
    grad_output: Tensor,
    grad_logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return backpropagate_attention(
        grad_output, grad_logsumexp, query, key, value, output, logsumexp, scale
    )


@_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logsumexp = query.new_empty(query.shape[:3], dtype=compute_dtype([query]))
    return torch.empty_like(query), logsumexp


@_attention_backward_op.register_fake
def _(
    grad_output: Tensor,
    grad_logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backpropagate(ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.fastppt_kernels.attention_backward(
        grad_output, grad_logsumexp, *ctx.saved_tensors, ctx.scale
    )
    return (*grads, None)


_attention_op.register_autograd(_backpropagate, setup_context=_keep)
_attention_backward_op.register_autograd(refuse_second_derivative("joint_attention"))
