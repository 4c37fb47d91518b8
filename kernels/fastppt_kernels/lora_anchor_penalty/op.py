"""The LoRA anchor penalty: checks, the choice of the path, and the PyTorch path.

Shape suffixes: n pairs of one shape, r rank, i in, o out.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastppt_kernels.checks import (
    NamedLists,
    check_distinct,
    check_lengths,
    check_shapes,
    check_tensors,
    check_weight,
    compute_dtype,
)
from fastppt_kernels.launch import have_codes, use_triton
from fastppt_kernels.lora_anchor_penalty.launch import kernel_configurations, launch_lora_anchor_

__all__ = ["apply_lora_anchor_", "kernel_configurations", "lora_anchor_penalty_"]


def lora_anchor_penalty_(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    down_grads: Sequence[Tensor] | None,
    up_grads: Sequence[Tensor] | None,
    weight: float | Tensor,
    *,
    anchor_downs: Sequence[Tensor | None] | None = None,
    anchor_ups: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Add the anchor's gradient in the effective form to the grads in place; return the penalty.

    dW_i = s_i B_i A_i - s_i B0_i A0_i   (A down, B up, s scale)
    penalty = weight * sum_i ||dW_i||^2

    No product B A is formed. Without an anchor (dW0 = 0):
        ||dW||^2 = s^2 tr((B^T B)(A A^T)),
        dB += 2 weight s^2 B (A A^T),   dA += 2 weight s^2 (B^T B) A.
    With an anchor, X = B - B0 and Y = A - A0 (a difference of Grams would cancel):
        ||dW||^2 = s^2 [tr(X^T X A A^T) + 2 tr(B0^T X A Y^T) + tr(B0^T B0 Y Y^T)],
        dB += 2 weight s^2 (X (A A^T) + B0 (Y A^T)),   dA += 2 weight s^2 ((B^T X) A + (B^T B0) Y).

    Source: Preserve and Personalize (arXiv 2505.19519), Algorithm 1, line 9, with the network's
    weights as its parameters; the form in A and B is our derivation.

    Args:
        downs: The A_i, [rank, in], contiguous, floating-point, all tensors on one device.
            Not written.
        ups: The B_i, [out, rank]. Not written.
        scales: The s_i, Python floats (alpha / rank in most trainers).
        down_grads: One tensor of the shape of each A_i; written. None together with
            ``up_grads``: only the penalty is computed.
        up_grads: One tensor of the shape of each B_i; written.
        weight: A float, or a 0-dim tensor on the device of ``downs``.
        anchor_downs: The A0_i, of the shapes of ``downs``; None, or a None entry, means dW0 = 0
            and reads nothing. Not written.
        anchor_ups: The B0_i, of the shapes of ``ups``, None where ``anchor_downs`` has None.

    Returns:
        0-dim tensor on the device of ``downs``: float64 if any tensor given is float64, else
        float32. Reading it on the host synchronises. Empty lists give a float32 zero on the CPU.

    Raises:
        ValueError: Lists of different length; a tensor of a wrong shape, of another device, not
            contiguous or not floating-point, or a gradient given twice (named by its index); only
            one of ``down_grads`` and ``up_grads``, or only one anchor of a pair; a weight that is
            neither a float nor such a tensor.

    Rounding: on the CPU, and where a tensor is float64, products and sums are taken in float64,
        which no tf32 or autocast setting reaches, so that the result does not depend on them and
        no global state is read or changed. The kernels take them in float32, without tf32, 512
        columns at a time: within 5e-7 of the update (norms), at any drift. The gradient is
        rounded to float32 (kept in float64 if any tensor given is float64) and added; a float16
        or bfloat16 gradient is widened, added to and rounded once. Two runs are equal bit by bit.

    Memory traffic: 4 reads or writes an element of A and B, 6 with an anchor (1 and 2 without
        grads): one pass for the Grams, which must be there before a product is added, and one for
        the gradients. The floor, factors kept in the cache between the passes, is 3 and 4. FLOPs:
        4 rank an element, 10 rank with an anchor. Scratch: see ``launch_lora_anchor_``; on the
        CPU float64 copies of some pairs at a time.
    """
    no_anchors: list[None] = [None] * len(downs)
    anchor_downs = no_anchors if anchor_downs is None else anchor_downs
    anchor_ups = no_anchors if anchor_ups is None else anchor_ups
    if (down_grads is None) != (up_grads is None):
        given, missing = ("up", "down") if down_grads is None else ("down", "up")
        raise ValueError(f"{missing}_grads: got None beside {given}_grads; pass both or neither")
    of_downs: NamedLists = {"anchor_downs": anchor_downs}
    of_ups: NamedLists = {"anchor_ups": anchor_ups}
    if down_grads is not None and up_grads is not None:
        of_downs["down_grads"] = down_grads
        of_ups["up_grads"] = up_grads
    lists: NamedLists = {"downs": downs, "ups": ups} | of_downs | of_ups
    check_lengths({"downs": downs, "ups": ups, "scales": scales, **of_downs, **of_ups})
    check_tensors(lists, holes=["anchor_downs", "anchor_ups"])
    _check_pairs(downs, ups, anchor_downs, anchor_ups)
    check_shapes("downs", downs, of_downs)
    check_shapes("ups", ups, of_ups)
    check_distinct("down_grads", down_grads)
    check_distinct("up_grads", up_grads)
    check_weight(weight, downs)
    return apply_lora_anchor_(
        downs, ups, scales, down_grads, up_grads, weight, anchor_downs, anchor_ups
    )


def _check_pairs(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    anchor_downs: Sequence[Tensor | None],
    anchor_ups: Sequence[Tensor | None],
) -> None:
    for index, (down, up) in enumerate(zip(downs, ups, strict=True)):
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"pair {index}: got downs[{index}] {tuple(down.shape)} and ups[{index}] "
                f"{tuple(up.shape)}, want [rank, in] and [out, rank] of one rank"
            )
        if (anchor_downs[index] is None) != (anchor_ups[index] is None):
            missing = "anchor_downs" if anchor_downs[index] is None else "anchor_ups"
            raise ValueError(
                f"pair {index}: {missing}[{index}] is None and the other anchor of the pair is "
                "not; pass both, or None for both (dW0 = 0)"
            )


def apply_lora_anchor_(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    down_grads: Sequence[Tensor] | None,
    up_grads: Sequence[Tensor] | None,
    weight: float | Tensor,
    anchor_downs: Sequence[Tensor | None],
    anchor_ups: Sequence[Tensor | None],
) -> Tensor:
    """Do the work of :func:`lora_anchor_penalty_` without its checks."""
    if not downs:
        return torch.zeros(())
    lists = (downs, ups, anchor_downs, anchor_ups, down_grads or (), up_grads or ())
    if use_triton(downs[0]) and all(map(have_codes, lists)):
        return launch_lora_anchor_(
            downs, ups, scales, down_grads, up_grads, weight, anchor_downs, anchor_ups
        )
    dtype = compute_dtype(t for tensors in lists for t in tensors if t is not None)
    squares = []
    with torch.no_grad():
        for indices in _batches(downs, ups, scales, anchor_downs):
            scale = scales[indices[0]]
            down_nri, up_nor = _stack(downs, indices), _stack(ups, indices)
            has_anchor = anchor_downs[indices[0]] is not None
            anchor_nri = _stack(anchor_downs, indices) if has_anchor else None
            anchor_nor = _stack(anchor_ups, indices) if has_anchor else None
            square, grams = _square_and_grams(down_nri, up_nor, anchor_nri, anchor_nor)
            squares.append(scale**2 * square)
            if down_grads is None or up_grads is None:
                continue
            # The factor goes into the small matrices, not into the gradients.
            grams = [2 * scale**2 * weight * gram for gram in grams]
            down_delta_nri = grams[0] @ down_nri
            up_delta_nor = _difference(up_nor, anchor_nor) @ grams[1]
            if anchor_nri is not None and anchor_nor is not None:
                down_delta_nri.baddbmm_(grams[2], down_nri - anchor_nri)
                up_delta_nor.baddbmm_(anchor_nor, grams[3])
            torch._foreach_add_(
                [grads[i] for grads in (down_grads, up_grads) for i in indices],
                [*down_delta_nri.to(dtype).unbind(), *up_delta_nor.to(dtype).unbind()],
            )
        return (weight * torch.stack(squares).sum()).to(dtype)


def _square_and_grams(
    down_nri: Tensor, up_nor: Tensor, anchor_nri: Tensor | None, anchor_nor: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return sum_n ||dW||^2 of scale 1, and the [n, r, r] matrices of its gradients.

    In the words of :func:`lora_anchor_penalty_`: B^T X and A A^T, then with an anchor B^T B0 and
    Y A^T.
    """
    x_nor = _difference(up_nor, anchor_nor)
    grams = [up_nor.mT @ x_nor, down_nri @ down_nri.mT]
    if anchor_nri is None or anchor_nor is None:
        return (grams[0] * grams[1]).sum(), grams
    y_nri = down_nri - anchor_nri
    grams += [up_nor.mT @ anchor_nor, y_nri @ down_nri.mT]
    square = (x_nor.mT @ x_nor) * grams[1]
    square += 2 * (anchor_nor.mT @ x_nor) * grams[3]
    square += (anchor_nor.mT @ anchor_nor) * (y_nri @ y_nri.mT)
    return square.sum(), grams


def _difference(value: Tensor, anchor: Tensor | None) -> Tensor:
    return value if anchor is None else value - anchor


def _stack(tensors: Sequence[Tensor | None], indices: Sequence[int]) -> Tensor:
    """Stack the tensors of ``indices``, which are there, in float64."""
    return torch.stack([t for i in indices if (t := tensors[i]) is not None]).double()


def _batches(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    anchor_downs: Sequence[Tensor | None],
) -> Iterator[list[int]]:
    """Yield the indices of pairs of one shape and scale, as many as the cache holds at a time."""
    # CPU: a megabyte of float64 copies at a time. Elsewhere: few launches.
    size = 1 << 15 if downs[0].device.type == "cpu" else 1 << 23
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, (down, up, scale) in enumerate(zip(downs, ups, scales, strict=True)):
        alike[down.shape, up.shape, scale, anchor_downs[index] is None].append(index)
    for indices in alike.values():
        num_elements = downs[indices[0]].numel() + ups[indices[0]].numel()
        step = max(1, size // max(1, num_elements))
        for start in range(0, len(indices), step):
            yield indices[start : start + step]
