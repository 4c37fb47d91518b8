"""What a step keeps from one to the next."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastppt_kernels.anchored_adamw.staging import AnchorStream
from fastppt_kernels.launch import addresses_of

Made = TypeVar("Made")


class Launcher:
    """What an optimizer keeps between steps: on the device, so that its addresses stay."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], tuple[float, Tensor]] = {}
        self._widened: dict[tuple[int, int], Tensor] = {}
        self._aligned: dict[tuple[int, int], Tensor] = {}
        self._streams: dict[tuple[torch.device, int], AnchorStream] = {}
        self._made: dict[int, _Made] = {}

    def recall(self, number: int, tensors: Sequence[Tensor], make: Callable[[], Made]) -> Made:
        """Return what ``make`` made of the tensors, at an earlier step if they are where they were.

        It is kept from the second step on that has the same tensors, so that gradients that each
        step makes anew are not held.

        Args:
            number: Of the group, what it is known by.
            tensors: All that ``make`` makes views of.
            make: Called where there is nothing to recall.
        """
        places = addresses_of(tensors)
        last = self._made.get(number)
        # At the address alone there may be a new tensor by now.
        if last is None or last.places != places or any(map(_is_other, last.tensors, tensors)):
            self._made[number] = _Made(places, [weakref.ref(tensor) for tensor in tensors])
            return make()
        if not last.is_kept:
            last.is_kept, last.made = True, make()
        made: Made = last.made
        return made

    def forget(self) -> None:
        """Let go of what was made of tensors, and so of their memory."""
        self._made.clear()

    def widen(self, number: int, index: int, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the gradient contiguous and in ``dtype``: itself, or a copy in a kept buffer.

        Args:
            number: Of the group; with ``index``, what the buffer is known by.
            index: Of the parameter in the group.
            grad: Not written.
            dtype: At least as wide as the gradient's.
        """
        if grad.dtype == dtype and grad.is_contiguous():
            return grad
        kept = self._widened.get((number, index))
        if kept is None or (kept.shape, kept.dtype, kept.device) != (
            grad.shape,
            dtype,
            grad.device,
        ):
            kept = torch.empty(grad.shape, dtype=dtype, device=grad.device)
            self._widened[number, index] = kept
        return kept.copy_(grad)

    def align(self, number: int, index: int, grad: Tensor, param: Tensor) -> Tensor:
        """Return the gradient walked as its parameter is: itself, or a copy in a kept buffer.

        Args:
            number: Of the batch; with ``index``, what the buffer is known by.
            index: Of the parameter in the batch.
            grad: Not written.
            param: Gives the strides.
        """
        if grad.stride() == param.stride():
            return grad
        kept = self._aligned.get((number, index))
        if kept is None or (kept.stride(), kept.dtype, kept.device) != (
            param.stride(),
            grad.dtype,
            param.device,
        ):
            kept = torch.empty_like(param, dtype=grad.dtype)
            self._aligned[number, index] = kept
        return kept.copy_(grad)

    def place(self, number: int, name: str, value: float | Tensor, device: torch.device) -> Tensor:
        """Return the option as a 0-dim float32 tensor on the device.

        Args:
            number: Of the batch; with ``name``, what the option is known by.
            name: Of the option.
            value: A float is written to the device only when it is another than at the last step.
                A float32 tensor there is returned itself.
            device: Where the kernels run.
        """
        if isinstance(value, Tensor):
            return value.detach().to(device, torch.float32)
        last, kept = self._kept.get((number, name), (None, None))
        if kept is None or kept.device != device:
            last, kept = None, torch.empty((), device=device)
        if last == value:
            return kept
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A graph's write happens at its replays: what is kept for steps outside stays apart.
            return torch.full((), value, device=device)
        self._kept[number, name] = (value, kept.fill_(value))
        return kept

    def stream_of(self, device: torch.device, num_bytes: int) -> AnchorStream:
        """Return the buffers that anchors from the host come through, of this size.

        All that there were stay: a captured step may read them.
        """
        key = (device, num_bytes)
        if key not in self._streams:
            self._streams[key] = AnchorStream(device, num_bytes)
        return self._streams[key]


@dataclass
class _Made:
    """What was made of tensors at these places; kept or not."""

    places: tuple[int, ...]
    tensors: list[weakref.ref[Tensor]]
    is_kept: bool = False
    made: Any = None


def _is_other(reference: weakref.ref[Tensor], tensor: Tensor) -> bool:
    return reference() is not tensor
