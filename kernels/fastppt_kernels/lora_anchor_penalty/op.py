"""The LoRA anchor penalty: checks, and the choice of the path."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastppt_kernels.checks import (
    NamedLists,
    check_distinct,
    check_lengths,
    check_shapes,
    check_tensors,
    check_weight,
)
from fastppt_kernels.launch import have_codes, use_triton
from fastppt_kernels.lora_anchor_penalty.launch import kernel_configurations, launch_lora_anchor_
from fastppt_kernels.lora_anchor_penalty.plain import PairBatch, gather_pairs, pull_pairs_

__all__ = ["LoraAnchor", "kernel_configurations", "lora_anchor_penalty_"]


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

    Rounding: products and sums are taken in float32, whatever autocast says, or in float64 where a
        tensor is float64; long sums in pieces, of 512 columns in the kernels, which take no tf32,
        and of 256 on the CPU. There, where PyTorch is allowed fewer bits for float32 products, they
        are taken in float64. Within 5e-7 of the update (norms), at any drift. The gradient is
        rounded to float32 (kept in float64 if any tensor given is float64) and added; a float16 or
        bfloat16 gradient is widened, added to and rounded once. Two runs are equal bit by bit.

    Memory traffic: 4 reads or writes an element of A and B, 6 with an anchor (1 and 2 without
        grads): one pass for the Grams, which must be there before a product is added, and one for
        the gradients. The floor, factors kept in the cache between the passes, is 3 and 4. FLOPs:
        4 rank an element, 10 rank with an anchor. Scratch: see ``launch_lora_anchor_``; on the
        CPU copies of some pairs at a time.
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
    pairs = LoraAnchor(downs, ups, scales, down_grads, up_grads, anchor_downs, anchor_ups)
    return pairs.pull_(weight)


class LoraAnchor:
    """The pairs of :func:`lora_anchor_penalty_`, gathered once for as long as they stay in place.

    Nothing is checked here.

    Args:
        downs: As there, and so the others.
    """

    def __init__(
        self,
        downs: Sequence[Tensor],
        ups: Sequence[Tensor],
        scales: Sequence[float],
        down_grads: Sequence[Tensor] | None,
        up_grads: Sequence[Tensor] | None,
        anchor_downs: Sequence[Tensor | None],
        anchor_ups: Sequence[Tensor | None],
    ) -> None:
        self._tensors = (downs, ups, scales, down_grads, up_grads)
        self._anchors = (anchor_downs, anchor_ups)
        lists = (downs, ups, anchor_downs, anchor_ups, down_grads or (), up_grads or ())
        # None where kernels do the work.
        self._batches: list[PairBatch] | None = None
        if not (downs and use_triton(downs[0]) and all(map(have_codes, lists))):
            self._batches = gather_pairs(*self._tensors, *self._anchors)

    def pull_(self, weight: float | Tensor) -> Tensor:
        """Add the gradient of the values as they are now; return the penalty."""
        if self._batches is None:
            return launch_lora_anchor_(*self._tensors, weight, *self._anchors)
        return pull_pairs_(self._batches, weight) if self._batches else torch.zeros(())


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
