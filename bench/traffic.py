"""Bytes that a computation reads and writes, counted operator by operator.

Two counts. What every operator reads and writes, as if none found anything in a cache: what runs op
by op asks for. And the least that any way to run the same phase must move: what was there before
the phase and is read in it, and what it leaves behind; all between could stay in caches or inside
one kernel.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench.step_costs import ALLOCATIONS, FORMULAS

aten = torch.ops.aten

# They compare shapes, or write into their first argument without reading it.
NO_TRAFFIC = {aten.is_same_size}
WRITE_ONLY = {
    aten.copy_,
    aten.zero_,
    aten.fill_,
    aten.normal_,
    aten.uniform_,
    aten.random_,
    aten.bernoulli_,
}
# They read as many rows of their first argument as they return.
GATHERS = {aten.embedding, aten.index_select, aten.index, aten.gather}
# They write as many rows of their first argument as the last one brings.
SCATTERS = {aten.index_copy_, aten.index_put_, aten.scatter_, aten.index_add_}


@dataclass(frozen=True)
class Traffic:
    """Bytes of a phase.

    Attributes:
        ops: What its operators read and write, each by itself.
        least: What was there before and is read, and what is left behind.
    """

    ops: int
    least: int


class TrafficCounter(TorchDispatchMode):
    """Counts bytes while it is entered.

    A tensor counts with what it holds, expanded dimensions once. Views and allocations move
    nothing. Kernels that are launched past the dispatcher, as the optimizer's on a GPU, are not
    seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ops = 0
        # By address: bytes of the storages that were made in this phase and are alive.
        self._made: dict[int, int] = {}
        # By address of storages from before: their bytes, and the parts that were read, written.
        self._sizes: dict[int, int] = {}
        self._read: dict[int, dict[tuple[Any, ...], int]] = {}
        self._written: dict[int, dict[tuple[Any, ...], int]] = {}

    def take(self) -> Traffic:
        """Return the bytes since the last of these calls; a phase ends here."""
        outside = sum(
            min(sum(parts.values()), self._sizes[address])
            for seen in (self._read, self._written)
            for address, parts in seen.items()
        )
        traffic = Traffic(self._ops, outside + sum(self._made.values()))
        self._ops = 0
        for seen in (self._made, self._sizes, self._read, self._written):
            seen.clear()
        return traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if func.is_view or packet in NO_TRAFFIC:
            return result
        inputs, written = _tensors((args, kwargs)), _written_tensors(func, args, kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = [t for t in _tensors(result) if t.untyped_storage()._cdata not in given]
        for tensor in made:
            self._note_made(tensor)
        if packet in ALLOCATIONS:
            return result
        rows = None
        if packet in GATHERS:
            rows = sum(map(_num_bytes, made))
        elif packet in SCATTERS:
            rows = _num_bytes(inputs[-1])
        if packet in WRITE_ONLY or packet in SCATTERS:
            inputs = inputs[1:]
        for index, tensor in enumerate(inputs):
            self._count(tensor, self._read, rows if packet in GATHERS and index == 0 else None)
        for tensor in written:
            self._count(tensor, self._written, rows)
        self._ops += sum(map(_num_bytes, made))
        return result

    def _count(
        self, tensor: Tensor, seen: dict[int, dict[tuple[Any, ...], int]], rows: int | None
    ) -> None:
        size = _num_bytes(tensor)
        size = size if rows is None else min(size, rows)
        self._ops += size
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._made:
            self._sizes[address] = storage.nbytes()
            part = tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
            seen.setdefault(address, {})[part] = size

    def _note_made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._made[storage._cdata] = storage.nbytes()
        # The storage's Python object lives as long as the storage.
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, address: int) -> None:
        self._made.pop(address, None)


def _tensors(values: Any) -> list[Tensor]:
    """Return the tensors in arguments or results, each once."""
    tensors = (each for each in tree_leaves(values) if isinstance(each, Tensor))
    return [*{id(tensor): tensor for tensor in tensors}.values()]


def _written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operator writes, as its schema says."""
    values: list[Any] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return _tensors(values)


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes of the elements that a tensor looks at, each once."""
    held = (size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
    return math.prod(held) * tensor.element_size()


def count_traffic(call: Callable[[], object]) -> tuple[int, Traffic]:
    """Run an eager call as one phase; returns its operations, as `count_flops`, and its bytes."""
    with (
        FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops,
        TrafficCounter() as counter,
    ):
        # Alive when the phase ends: what it returns is what it was for.
        result = call()
        traffic = counter.take()
    del result
    return flops.get_total_flops(), traffic


def add_traffic(parts: Iterable[Traffic]) -> Traffic:
    """Return the sum of phases that follow one another."""
    parts = list(parts)
    return Traffic(sum(part.ops for part in parts), sum(part.least for part in parts))
