"""Where the tensors of LoRA pairs lie in an optimizer's parameters."""

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a tensor lies: a parameter of the group by its index, and the elements before it."""

    param: int
    offset: int
    shape: tuple[int, int]

    def of(self, values: Mapping[int, Tensor]) -> Tensor:
        """Return the view at this place of one of ``values``, contiguous, by parameter index."""
        value = values[self.param]
        if self.offset == 0 and value.shape == self.shape:
            return value
        # One call, not a slice and two views: a step makes thousands.
        return value.as_strided(
            self.shape, (self.shape[1], 1), int(value.storage_offset()) + self.offset
        )


class Pair(NamedTuple):
    """A LoRA pair by the places of its tensors: no tensors, so that copies stay right."""

    down: Place
    up: Place
    scale: float


class Pairs(list[Pair]):
    """The pairs of a group; printed as their number, for an optimizer prints its groups whole."""

    def __repr__(self) -> str:
        return f"{len(self)} pairs"


def locate_pairs(params: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Pairs:
    """Return the places in ``params`` of the tensors of ``pairs``.

    Args:
        params: The parameters of one group.
        pairs: (down, up, scale), down [rank, in] and up [out, rank]: parameters of the group, or
            contiguous views into contiguous ones.

    Raises:
        ValueError: A pair of wrong shapes or in no parameter, a tensor in two pairs, a parameter
            that no pair lies in (named by their indices).
    """
    # By storage, the parameters in the order of their first elements: a storage may hold many.
    spans: dict[tuple[int, torch.dtype], list[tuple[int, int, int]]] = {}
    for index, param in enumerate(params):
        start = int(param.storage_offset())
        spans.setdefault((param.untyped_storage().data_ptr(), param.dtype), []).append(
            (start, start + param.numel(), index)
        )
    for held in spans.values():
        held.sort()

    def locate(tensor: Tensor, what: str) -> Place:
        held = spans.get((tensor.untyped_storage().data_ptr(), tensor.dtype), [])
        start = int(tensor.storage_offset())
        nearest = bisect.bisect_right(held, start, key=lambda span: span[0]) - 1
        if nearest < 0 or start + tensor.numel() > held[nearest][1]:
            raise ValueError(
                f"{what}: lies in no parameter of the group; pass a parameter of the group "
                "or a view into one"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{what}: got strides {tensor.stride()} for shape {tuple(tensor.shape)}, "
                "want a contiguous tensor"
            )
        return Place(held[nearest][2], start - held[nearest][0], (tensor.shape[0], tensor.shape[1]))

    places = Pairs()
    seen: dict[tuple[int, int], int] = {}
    for index, (down, up, scale) in enumerate(pairs):
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"lora_pairs[{index}]: got down {tuple(down.shape)} and up {tuple(up.shape)}, "
                "want [rank, in] and [out, rank] of one rank"
            )
        pair = Pair(
            locate(down, f"lora_pairs[{index}], down"),
            locate(up, f"lora_pairs[{index}], up"),
            float(scale),
        )
        for place in (pair.down, pair.up):
            if seen.setdefault((place.param, place.offset), index) != index:
                raise ValueError(
                    f"lora_pairs[{index}]: shares a tensor with "
                    f"lora_pairs[{seen[place.param, place.offset]}]; want each tensor in one pair"
                )
        places.append(pair)
    covered = {place.param for pair in places for place in (pair.down, pair.up)}
    for index in range(len(params)):
        if index not in covered:
            raise ValueError(
                f"params[{index}]: no pair of lora_pairs lies in it; "
                "add its pair, or put it in a group of another form"
            )
    return places
