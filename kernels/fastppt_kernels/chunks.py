"""Cutting lists of tensors so that what is worked on stays in a CPU's cache."""

from collections.abc import Iterator

import torch
from torch import Tensor


def cut_into_chunks(
    members: list[list[Tensor]], size: int, piece: int
) -> Iterator[list[list[Tensor]]]:
    """Cut lists of equal length and shapes alike into chunks of about ``size`` elements a list.

    A longer tensor comes in flat pieces of ``piece`` elements, if all its partners are contiguous.

    Args:
        members: The lists, say parameters, anchors and gradients.
        size: Elements of a chunk.
        piece: Elements of a piece.
    """
    start = filled = 0
    num_tensors = len(members[0])
    for index, num_elements in enumerate([tensor.numel() for tensor in members[0]]):
        if num_elements > size and all(tensors[index].is_contiguous() for tensors in members):
            if start < index:
                yield [tensors[start:index] for tensors in members]
            flat = (torch.split(tensors[index].view(-1), piece) for tensors in members)
            for pieces in zip(*flat, strict=True):
                yield [[tensor] for tensor in pieces]
            start, filled = index + 1, 0
            continue
        filled += num_elements
        if filled >= size:
            yield [tensors[start : index + 1] for tensors in members]
            start, filled = index + 1, 0
    if start < num_tensors:
        yield [tensors[start:] for tensors in members]
