"""Attention with a logsumexp that has a gradient, by PyTorch's own flash attention.

PyTorch's kernels return the logsumexp but take no gradient of it. Their backward knows the output
by one number a row alone, delta = rowsum(dO * O), and dlogits = P * (dO V^T - delta); a gradient of
the logsumexp is delta - dlogsumexp in its place. Two more columns of O and dO, where V has zeros,
put it there: dO V^T stays as it is.

Source: delta, FlashAttention-2 (arXiv 2307.08691), algorithm 2; the columns are our choice. Shape
suffixes: B batch, H heads, N tokens, D head dim, W the head dim with the columns.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

# Elements that the kernels read at once: head dims and strides are multiples of it.
STEP = 8
# Columns that hold -dlogsumexp: its value in the narrow dtype, and what that leaves.
SHIFT_COLUMNS = 2
# The rest lies in its column times this, and dO has the inverse there: the rest of a number that is
# small already would vanish in float16.
REST_FACTOR = 2.0**11
# The memory-efficient kernels read the logsumexp in blocks of this many queries.
LOGSUMEXP_BLOCK = 32
# The largest head dim of the flash attention kernels of a GPU, the columns among it.
LARGEST_WIDTH = 256


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(query key^T * scale) value, and the logsumexp of the scaled products.

    Args:
        query: [B, H, N, D]. Any strides; what the kernels cannot read in place is copied.
        key: [B, H, N, D].
        value: [B, H, N, D].
        scale: The factor of the products.

    Returns:
        [B, H, N, D] in the query's dtype, and [B, H, N], float64 of a float64 query, else float32.
    """
    num_tokens, head_dim = query.shape[2:]
    query, key, value = _readable(query), _readable(key), _readable(value)
    aten = torch.ops.aten
    if query.device.type == "cpu":
        output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, scale=scale
        )
    elif query.dtype == torch.float32:
        output, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, scale=scale
        )
    else:
        output, logsumexp, *_ = aten._scaled_dot_product_flash_attention(
            query, key, value, scale=scale
        )
    return output.narrow(3, 0, head_dim), logsumexp.narrow(2, 0, num_tokens)


def backpropagate_attention(
    grad_output: Tensor,
    grad_logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    P = exp(logits - logsumexp);   delta = rowsum(dO * O) - dlogsumexp;
    dlogits = P * (dO V^T - delta);   dQ = scale dlogits K,   dK = scale dlogits^T Q,   dV = P^T dO.

    Args:
        grad_output: [B, H, N, D].
        grad_logsumexp: [B, H, N].
        query: [B, H, N, D].
        key: [B, H, N, D].
        value: [B, H, N, D].
        output: [B, H, N, D].
        logsumexp: [B, H, N].
        scale: The factor of the products.

    Returns:
        Three of [B, H, N, D], views of the first columns of [B, H, N, W].

    Memory: copies of the five tensors of D columns with W = D + 2 to D + 9 of them.
    """
    num_tokens, head_dim = query.shape[2:]
    output, grad_output = _widen(output), _widen(grad_output)
    shift, rest = split_shift(-grad_logsumexp, query.dtype)
    output.select(3, head_dim).copy_(shift)
    output.select(3, head_dim + 1).copy_(rest)
    grad_output.select(3, head_dim).fill_(1.0)
    grad_output.select(3, head_dim + 1).fill_(1 / REST_FACTOR)
    inputs = grad_output, _widen(query), _widen(key), _widen(value)
    aten = torch.ops.aten
    # The state of a dropout that there is none of.
    unread = torch.empty(2, dtype=torch.int64, device=query.device)
    if query.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, output, logsumexp, 0.0, False, scale=scale
        )
    elif query.dtype == torch.float32:
        # Past its end the kernel wants inf, of which it makes P = 0.
        missing = -num_tokens % LOGSUMEXP_BLOCK
        whole = pad(logsumexp, (0, missing), value=torch.inf)
        wanted = (True, True, True, False)
        grads = aten._scaled_dot_product_efficient_attention_backward(
            *inputs, None, output, whole, unread, unread, 0.0, wanted, scale=scale
        )
    else:
        # No packed sequences, no dropout, no causal mask.
        settings = (None, None, num_tokens, num_tokens, 0.0, False, unread, unread)
        grads = aten._scaled_dot_product_flash_attention_backward(
            *inputs, output, logsumexp.contiguous(), *settings, scale=scale
        )
    grad_query, grad_key, grad_value = (grad.narrow(3, 0, head_dim) for grad in grads[:3])
    return grad_query, grad_key, grad_value


def width_of(head_dim: int) -> int:
    """Return W, the head dim with which the backward of ``head_dim`` runs."""
    return -(-(head_dim + SHIFT_COLUMNS) // STEP) * STEP


def split_shift(shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the shift in ``dtype``, and REST_FACTOR times what that leaves of it."""
    narrow = shift.to(dtype)
    return narrow, ((shift - narrow.to(shift.dtype)) * REST_FACTOR).to(dtype)


def _readable(tensor: Tensor) -> Tensor:
    """Return [B, H, N, D] in rows that the kernels can read, with zeros up to a whole STEP."""
    missing = -tensor.shape[3] % STEP
    if missing:
        return pad(tensor, (0, missing))
    *strides, last = tensor.stride()
    if last == 1 and not any(offset % STEP for offset in (tensor.storage_offset(), *strides)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _widen(tensor: Tensor) -> Tensor:
    """Return [B, H, N, W] in the memory of [B, N, H, W]: the tensor, then zeros.

    The kernels copy an output and its gradient that lie otherwise, or misread them.
    """
    num_batches, num_heads, num_tokens, head_dim = tensor.shape
    size = (num_batches, num_tokens, num_heads, width_of(head_dim))
    wide = tensor.new_zeros(size).transpose(1, 2)
    wide.narrow(3, 0, head_dim).copy_(tensor)
    return wide
