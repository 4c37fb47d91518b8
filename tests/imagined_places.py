"""Where the memory of tensors and generators is on a GPU in thought: what `imagined_gpu` notes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_iter

GPU, HOST, PINNED = "the GPU", "host memory", "pinned host memory"
DEVICE, CPU = torch.device("cuda", 0), torch.device("cpu")


class RefusedError(AssertionError):
    """What a GPU or the capture of a graph would refuse, or get wrong."""


class Places:
    """Where memory is, in thought: host memory, unless noted."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[StorageWeakRef, str | None]] = {}

    def of(self, tensor: Tensor) -> str | None:
        """Return the place; None of what C++ made from nothing, which may be either."""
        return self._places.get(key_of(tensor), (None, HOST))[1]

    def note(self, tensor: Tensor, place: str | None) -> None:
        if len(self._places) > 20_000:
            self._places = {k: v for k, v in self._places.items() if not v[0].expired()}
        # A weak reference keeps the number from being given anew.
        self._places[key_of(tensor)] = StorageWeakRef(tensor.untyped_storage()), place

    def reference(self, key: int) -> StorageWeakRef:
        """Return what tells whether noted memory is still there, and keeps its number."""
        return self._places[key][0]


# Of all contexts: tensors stay where they were made.
PLACES = Places()


def key_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def tensors_in(*given: Any) -> list[Tensor]:
    return [each for each in tree_iter(given) if isinstance(each, Tensor)]


class Touched:
    """What the ops of a capture read and write."""

    def __init__(self) -> None:
        self._reads: dict[int, StorageWeakRef] = {}
        self._writes: dict[int, StorageWeakRef] = {}

    def note(self, reads: set[int], writes: set[int]) -> None:
        self._reads |= {key: PLACES.reference(key) for key in reads - self._reads.keys()}
        self._writes |= {key: PLACES.reference(key) for key in writes - self._writes.keys()}

    def alive(self) -> tuple[set[int], set[int]]:
        """Return the memory that outlives the capture."""
        reads, writes = (
            {key for key, reference in each.items() if not reference.expired()}
            for each in (self._reads, self._writes)
        )
        return reads, writes


def real(method: Any, *args: Any, **kwargs: Any) -> Any:
    """Call torch's own method; a mode would find ours again, by its name."""
    with torch._C.DisableTorchFunction():
        return method(*args, **kwargs)


class ImaginedGenerator(torch._C.Generator):
    """A generator of the CPU that says that it is of the device it was asked for on."""

    places: ClassVar[dict[int, str]] = {}

    def __new__(cls, device: Any = "cpu") -> ImaginedGenerator:
        self = super().__new__(cls, device="cpu")
        # Ops are handed another object of the same generator.
        self.places[self._cdata] = GPU if torch.device(device).type == "cuda" else HOST
        return self

    @property
    def device(self) -> torch.device:
        return DEVICE if self.places[self._cdata] == GPU else CPU
