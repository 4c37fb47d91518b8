"""The anchor penalty: checks, and the PyTorch path."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastppt_kernels.checks import (
    check_distinct,
    check_lengths,
    check_shapes,
    check_tensors,
    check_weight,
    compute_dtype,
)


def anchor_penalty_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    grads: Sequence[Tensor] | None,
    weight: float | Tensor,
) -> Tensor:
    """Add the anchor's gradient to ``grads`` in place and return the penalty.

    penalty = weight * sum_i ||param_i - anchor_i||^2,   grad_i += 2 * weight * (param_i - anchor_i)

    Source: Preserve and Personalize (arXiv 2505.19519), Algorithm 1, line 9.

    Args:
        params: Contiguous tensors of any shapes and floating-point dtypes, all on one device.
            Not written.
        anchors: One contiguous tensor for each parameter, of its shape and device; None means
            zeros and reads nothing. Not written.
        grads: One contiguous tensor for each parameter, of its shape and device; written.
            None: only the penalty is computed.
        weight: A float, or a 0-dim tensor on the device of ``params`` (a captured graph sees its
            new values; a float is baked in).

    Returns:
        0-dim tensor on the device of ``params``: float64 if any tensor given is float64, else
        float32. Reading it on the host synchronises. Empty lists give a float32 zero on the CPU.

    Raises:
        ValueError: Lists of different length; a tensor of another shape or device than its
            partner, not contiguous or not floating-point, or a gradient given twice (named by its
            index); a weight that is neither a float nor such a tensor.

    Rounding: differences and sums are taken in float32 (float64 if any tensor given is float64).
        A float16 or bfloat16 gradient is widened, added to and rounded once.

    Memory traffic: 4 reads or writes an element (3 when the anchor is None; 2 and 1 without
        ``grads``); temporaries stay in the cache on the CPU.
    """
    lists: dict[str, Sequence[Tensor | None]] = {"params": params, "anchors": anchors}
    if grads is not None:
        lists["grads"] = grads
    check_lengths(dict(lists))
    check_tensors(lists, holes=["anchors"])
    check_shapes("params", params, {k: v for k, v in lists.items() if k != "params"})
    check_distinct("grads", grads)
    check_weight(weight, params)
    return apply_anchor_(params, anchors, grads, weight)


def apply_anchor_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    grads: Sequence[Tensor] | None,
    weight: float | Tensor,
) -> Tensor:
    """Do the work of :func:`anchor_penalty_` without its checks."""
    if not params:
        return torch.zeros(())
    given = [t for tensors in (params, anchors, grads or ()) for t in tensors if t is not None]
    dtype = compute_dtype(given)
    # CPU: three float32 tensors and their difference in half a megabyte of cache, and sums short
    # enough for float32 (one sum over 46 M elements is 0.2 % wrong). Elsewhere: few launches.
    size = 1 << 15 if params[0].device.type == "cpu" else 1 << 24
    squares = []
    with torch.no_grad():
        for has_anchors in (True, False):
            chosen = [i for i, anchor in enumerate(anchors) if (anchor is not None) == has_anchors]
            lists = [params, anchors if has_anchors else None, grads]
            members = [_pick(tensors, chosen) for tensors in lists if tensors is not None]
            for chunk in _chunks(members, size):
                differences = _in_dtype(chunk[0], dtype)
                if has_anchors:
                    differences = [*torch._foreach_sub(differences, _in_dtype(chunk[1], dtype))]
                flat = torch._C._nn.flatten_dense_tensors(differences)
                squares.append(torch.dot(flat, flat))
                if grads is None:
                    continue
                if isinstance(weight, Tensor):
                    torch._foreach_add_(chunk[-1], torch._foreach_mul(differences, 2 * weight))
                else:
                    torch._foreach_add_(chunk[-1], differences, alpha=2 * weight)
        return (weight * torch.stack(squares).sum()).to(dtype)


def _pick(tensors: Sequence[Tensor | None], chosen: Sequence[int]) -> list[Tensor]:
    return [t for i in chosen if (t := tensors[i]) is not None]


def _in_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def _chunks(members: list[list[Tensor]], size: int) -> Iterator[list[list[Tensor]]]:
    """Cut lists of equal length and shapes alike, into chunks of about ``size`` elements a list.

    A tensor longer than that comes in flat pieces.
    """
    start = filled = 0
    num_tensors = len(members[0])
    for index, num_elements in enumerate([tensor.numel() for tensor in members[0]]):
        if num_elements > size:
            if start < index:
                yield [tensors[start:index] for tensors in members]
            flat = (torch.split(tensors[index].view(-1), size) for tensors in members)
            for pieces in zip(*flat, strict=True):
                yield [[piece] for piece in pieces]
            start, filled = index + 1, 0
            continue
        filled += num_elements
        if filled >= size:
            yield [tensors[start : index + 1] for tensors in members]
            start, filled = index + 1, 0
    if start < num_tensors:
        yield [tensors[start:] for tensors in members]
