"""The LoRA anchor penalty in PyTorch: many pairs of one shape at a time.

Shape suffixes: n pairs of one shape, r rank, i in, o out.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppt_kernels.checks import compute_dtype

# Rows of a product that are summed in float32.
GRAM_ROWS = 256
# What PyTorch calls products that are taken as they are; "none" where nobody has said anything.
EXACT = ("none", "ieee")


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one shape and scale: views of their tensors, each with a dimension of 1 in front.

    Attributes:
        scale: The s of all of them.
        downs: [1, r, i] each; so are ``anchor_downs`` and ``down_grads``.
        ups: [1, o, r] each, likewise.
        anchor_downs: Empty where dW0 = 0; so is ``anchor_ups``.
        down_grads: Empty where only the penalty is wanted; so is ``up_grads``.
    """

    scale: float
    downs: Sequence[Tensor]
    ups: Sequence[Tensor]
    anchor_downs: Sequence[Tensor]
    anchor_ups: Sequence[Tensor]
    down_grads: Sequence[Tensor]
    up_grads: Sequence[Tensor]


def gather_pairs(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    down_grads: Sequence[Tensor] | None,
    up_grads: Sequence[Tensor] | None,
    anchor_downs: Sequence[Tensor | None],
    anchor_ups: Sequence[Tensor | None],
) -> list[PairBatch]:
    """Return the pairs in batches, of as many as the cache holds at a time.

    Nothing is copied: what is gathered once serves as long as the tensors lie where they are.
    """
    if not downs:
        return []

    def views(tensors: Sequence[Tensor | None] | None, indices: Sequence[int]) -> list[Tensor]:
        chosen = () if tensors is None else (tensors[i] for i in indices)
        return [tensor[None] for tensor in chosen if tensor is not None]

    return [
        PairBatch(
            scales[indices[0]],
            *(views(each, indices) for each in (downs, ups, anchor_downs, anchor_ups)),
            *(views(each, indices) for each in (down_grads, up_grads)),
        )
        for indices in _alike(downs, ups, scales, anchor_downs)
    ]


def pull_pairs_(batches: Sequence[PairBatch], weight: float | Tensor) -> Tensor:
    """Add the gradient of each pair to its ``down_grads`` and ``up_grads``; return the penalty."""
    lists = [
        tensors
        for each in batches
        for tensors in (each.downs, each.ups, each.anchor_downs, each.anchor_ups)
    ]
    lists += [tensors for each in batches for tensors in (each.down_grads, each.up_grads)]
    dtype = compute_dtype(tensor for tensors in lists for tensor in tensors)
    # Where PyTorch may take float32 products in fewer bits, they are taken in float64.
    is_exact = torch.backends.mkldnn.matmul.fp32_precision in EXACT  # type: ignore[attr-defined]
    wide = dtype if is_exact else torch.float64
    squares = []
    with torch.no_grad(), torch.autocast(batches[0].downs[0].device.type, enabled=False):
        for batch in batches:
            down_nri, up_nor = _join(batch.downs, wide), _join(batch.ups, wide)
            has_anchor = bool(batch.anchor_downs)
            anchor_nri = _join(batch.anchor_downs, wide) if has_anchor else None
            anchor_nor = _join(batch.anchor_ups, wide) if has_anchor else None
            square, grams = _square_and_grams(down_nri, up_nor, anchor_nri, anchor_nor)
            squares.append(batch.scale**2 * square)
            if not batch.down_grads:
                continue
            # The factor goes into the small matrices, not into the gradients.
            grams = [2 * batch.scale**2 * weight * gram for gram in grams]
            down_delta_nri = grams[0] @ down_nri
            up_delta_nor = _difference(up_nor, anchor_nor) @ grams[1]
            if anchor_nri is not None and anchor_nor is not None:
                down_delta_nri.baddbmm_(grams[2], down_nri - anchor_nri)
                up_delta_nor.baddbmm_(anchor_nor, grams[3])
            torch._foreach_add_(
                [*batch.down_grads, *batch.up_grads],
                [*down_delta_nri.to(dtype).split(1), *up_delta_nor.to(dtype).split(1)],
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
    down_nir = down_nri.mT
    grams = [_gram(up_nor, x_nor), _gram(down_nir, down_nir)]
    if anchor_nri is None or anchor_nor is None:
        return (grams[0] * grams[1]).sum(), grams
    y_nir = down_nir - anchor_nri.mT
    grams += [_gram(up_nor, anchor_nor), _gram(y_nir, down_nir)]
    square = _gram(x_nor, x_nor) * grams[1]
    square += 2 * _gram(anchor_nor, x_nor) * grams[3]
    square += _gram(anchor_nor, anchor_nor) * _gram(y_nir, y_nir)
    return square.sum(), grams


def _gram(left_nkr: Tensor, right_nkr: Tensor) -> Tensor:
    """Return left^T right, [n, r, r], summed over so many rows at a time in float32.

    Long sums of both signs cancel: in one go that of 10,240 rows is wrong by 2e-6.
    """
    if left_nkr.dtype == torch.float64 or left_nkr.shape[1] <= GRAM_ROWS:
        return left_nkr.mT @ right_nkr
    parts = zip(left_nkr.split(GRAM_ROWS, 1), right_nkr.split(GRAM_ROWS, 1), strict=True)
    return torch.stack([left.mT @ right for left, right in parts]).double().sum(0).float()


def _difference(value: Tensor, anchor: Tensor | None) -> Tensor:
    return value if anchor is None else value - anchor


def _join(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Join [1, x, y] tensors to [n, x, y]."""
    return torch.cat(list(tensors)).to(dtype)


def _alike(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    anchor_downs: Sequence[Tensor | None],
) -> Iterator[list[int]]:
    """Yield the indices of pairs of one shape and scale, as many as the cache holds at a time."""
    # CPU: half a megabyte of copies and as much of gradients at a time. Elsewhere: few launches.
    size = 1 << 17 if downs[0].device.type == "cpu" else 1 << 23
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, (down, up, scale) in enumerate(zip(downs, ups, scales, strict=True)):
        alike[down.shape, up.shape, scale, anchor_downs[index] is None].append(index)
    for indices in alike.values():
        num_elements = downs[indices[0]].numel() + ups[indices[0]].numel()
        step = max(1, size // max(1, num_elements))
        for start in range(0, len(indices), step):
            yield indices[start : start + step]
