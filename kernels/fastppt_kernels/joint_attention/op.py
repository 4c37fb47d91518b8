"""Joint attention: checks, and registration with torch.library.

Shape suffixes: B batch, H heads, N tokens of image and text, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.attention_alignment import attention_alignment_loss, attention_map_sum
from fastppt_kernels.checks import refuse_second_derivative
from fastppt_kernels.joint_attention.flash import (
    LARGEST_WIDTH,
    SHIFT_COLUMNS,
    attend,
    backpropagate_attention,
)
from fastppt_kernels.operation import operation

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
        ValueError: A tensor of a wrong shape, dtype or device (named); on a GPU a float64 query,
            or a bfloat16 or float16 query of a head dim over 254.

    Rounding: the attention as PyTorch's flash attention: sums in float32 (float64), maps and their
        gradients rounded to the inputs' dtype before they are multiplied, the results once.
        dlogsumexp enters as two numbers of that dtype, 16 bits of it in bfloat16. The loss as
        :func:`attention_alignment_loss`.

    Determinism: output and loss of two runs are equal bit by bit, on the CPU the gradients too. On
        a GPU flash attention adds up gradients in any order, unless
        ``torch.use_deterministic_algorithms(True)`` is set: it is the caller's to set.

    Memory: no [B, H, N, N] is made. Between forward and backward q, k, v, the output, the
        logsumexp [B, H, N] and what :func:`attention_alignment_loss` keeps; the backward copies
        five tensors [B, H, N, D] with 2 to 9 columns more, and the returned gradients are views of
        so many columns. Nothing is read on the host, nothing compiled.
    Memory traffic and FLOPs: those of flash attention, 4 H N^2 D forward and 10 H N^2 W backward,
        W being D + 2 rounded up to a multiple of 8 (a GPU's kernels round it up further, 72 to
        96), and those of the loss over the text keys.
    """
    scale = _check(query, key, value, num_text_tokens, scale)
    output, logsumexp = _attention_op(query, key, value, scale)
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
    output, logsumexp = _attention_op(query, key, value, scale)
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
    largest = LARGEST_WIDTH - SHIFT_COLUMNS
    if query.is_cuda and query.dtype != torch.float32 and query.shape[3] > largest:
        raise ValueError(
            f"query: got head dim {query.shape[3]} of {query.dtype} on a GPU, want at most "
            f"{largest}; use float32"
        )
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


@operation("fastppt_kernels::attention")
def _attention_op(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # On a GPU autocast would cast what flash attention is given, and so its output.
    with torch.autocast(query.device.type, enabled=False):
        return attend(query, key, value, scale)


@operation("fastppt_kernels::attention_backward")
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


# PyTorch's own operations know what their results look like, strides and all.
@_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    output, logsumexp = attend(query, key, value, scale)
    # But for the logsumexp of float64, which is float32 by what torch 2.11 says of it.
    return output, logsumexp.double() if query.dtype == torch.float64 else logsumexp


_attention_backward_op.register_fake(backpropagate_attention)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backpropagate(ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor) -> tuple[Any, ...]:
    query, key, value, output, logsumexp = ctx.saved_tensors
    grads = _attention_backward_op(
        grad_output, grad_logsumexp, query, key, value, output, logsumexp, ctx.scale
    )
    return (*grads, None)


_attention_op.register_autograd(_backpropagate, setup_context=_keep)
_attention_backward_op.register_autograd(refuse_second_derivative("joint_attention"))
