"""How many bytes of tensors are alive, counted operator by operator.

On the meta device, where tensors have shapes and no memory, this says what a computation will take
on a real one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is entered, until they are freed.

    A storage counts once, however many tensors look at it; those that were there before do not
    count. What an operator takes for itself while it runs is not seen.

    Args:
        device: Storages elsewhere do not count.

    Attributes:
        live: Bytes alive now.
        peak: The most that `live` has been; may be set back to it.
        kept: The most that autograd kept at a time in the last `kept_for_backward`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.kept = 0
        self._device = device.type
        # By address, all storages that have been seen and are alive; whether they count.
        self._seen: dict[int, bool] = {}
        self._kept: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count what it made."""
        kwargs = kwargs or {}
        self._see((args, kwargs), is_new=False)
        result = func(*args, **kwargs)
        self._see(result, is_new=True)
        return result

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Return the bytes of these tensors that are counted in `live`."""
        storages = (tensor.untyped_storage() for tensor in tensors)
        counted = {s._cdata: s.nbytes() for s in storages if self._seen.get(s._cdata, False)}
        return sum(counted.values())

    @contextmanager
    def kept_for_backward(self) -> Iterator[None]:
        """Count in `kept` what autograd keeps of what is computed inside.

        Only storages that were made inside count: no weights, no banks.
        """
        before = set(self._seen)

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if self._seen.get(storage._cdata, False) and storage._cdata not in before:
                self._kept[storage._cdata] = storage.nbytes()
                self.kept = max(self.kept, sum(self._kept.values()))
            # The tensor itself may be the output of the node that keeps it: each would hold the
            # other.
            return tensor.detach()

        self.kept = 0
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield

    def _see(self, values: Any, *, is_new: bool) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor) or tensor.device.type != self._device:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._seen:
                continue
            self._seen[storage._cdata] = is_new
            # The storage's Python object lives as long as the storage.
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes()).atexit = False
            if is_new:
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)

    def _forget(self, address: int, num_bytes: int) -> None:
        self._kept.pop(address, None)
        if self._seen.pop(address):
            self.live -= num_bytes
