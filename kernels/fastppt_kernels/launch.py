"""What every kernel launch needs: configurations, and device tables of foreign tensors.

A foreign tensor lies wherever its owner put it. A launch over a list of them reads one row of a
table for each program: the addresses that the program works on. Rows hold whole addresses, worked
out here in 64 bits, so that tensors beyond 2^31 elements need no care in a kernel.
"""

import importlib.util
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# How a row tells a kernel the dtype of a tensor, in two bits; triton_foreign.py reads it.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Of what is one byte an element, where a table holds such: kernels know its dtype themselves.
BYTE_CODE = 3
_WIDTHS = torch.tensor([4, 2, 2, 1])
# The same dtypes as the signature of a kernel has their pointers.
POINTER_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# Where in a row's ``code`` the bits of a kind of access begin; below are the dtypes, two bits each.
ACCESS_SHIFT = 16
# Kinds of access: any dtypes at any addresses; any dtypes at multiples of 16 bytes; float32 at
# multiples of 16 bytes.
ACCESS_ANY, ACCESS_ALIGNED, ACCESS_ALIGNED_FLOAT32 = 0, 1, 2
# The widest load or store of a GPU thread, in bytes.
ALIGNMENT = 16
# What sizes and strides, in elements, are multiples of where a kernel's loads may be that wide.
ALIGNED_ELEMENTS = 16
# A table for each of the lists a step works on, and for the few places its gradients move between.
_MAX_TABLES = 64


@dataclass(frozen=True)
class KernelConfiguration:
    """One way in which a launcher can compile a kernel; what ``fastppt_kernels.aot`` compiles.

    Attributes:
        name: What the table calls it.
        kernel: The ``@triton.jit`` function. Its integer arguments are not specialised on (named
            in ``do_not_specialize``), or there would be configurations beyond those listed.
        signature: The Triton type of each argument by its name, in order: "*fp32", "*i64", "i32",
            "fp32", and "constexpr" for those in ``constexprs``.
        constexprs: The values of the constexpr arguments; a pointer that is not given is a
            constexpr None.
        num_warps: Warps of 32 threads (of 64 on gfx942) a program.
        num_stages: Depth of the pipeline of loads.
        has_dot: It has a ``tl.dot``, so that tensor cores could be used.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    has_dot: bool = False


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Return whether Triton's interpreter was asked for (TRITON_INTERPRET=1): tests do."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Return whether kernels work on ``tensor``: a CUDA or ROCm device, or the interpreter."""
    return (tensor.is_cuda or (is_interpreted() and tensor.device.type == "cpu")) and _has_triton()


def have_codes(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether kernels read the dtypes of all ``tensors``: float32, bfloat16, float16."""
    return {t.dtype for t in tensors if t is not None} <= DTYPE_CODES.keys()


def addresses_of(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return the address of each tensor, 0 for None."""
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


def codes_of(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return the dtype code of each tensor, 0 for None."""
    return tuple([0 if t is None else DTYPE_CODES[t.dtype] for t in tensors])


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on the device of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def split_weight(weight: float | Tensor) -> tuple[Tensor | None, float]:
    """Return a weight as the kernels take it: ``weight_ptr`` (float32 or None) and ``weight``."""
    if isinstance(weight, Tensor):
        return weight.detach().to(torch.float32), 0.0
    return None, float(weight)


def weight_arguments(weight_type: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the constexprs and the signature of ``weight_ptr`` and ``weight``.

    Args:
        weight_type: "fp32" for a float, "*fp32" for a tensor.
    """
    if weight_type == "*fp32":
        return {}, {"weight_ptr": "*fp32", "weight": "fp32"}
    return {"weight_ptr": None}, {"weight_ptr": "constexpr", "weight": "fp32"}


def chunk_table(lists: Sequence[Sequence[Tensor | None]], chunk_size: int) -> Tensor:
    """Return the device table that cuts lists of tensors into chunks, one row each.

    A row: the address of the chunk in each list (0 where the list has None), the number of its
    elements, its code, the index of its tensors in the lists. The code holds the dtypes, two bits
    for each list from the lowest, and from bit ACCESS_SHIFT the kind of access.

    The table is kept: a call with tensors at the same addresses copies nothing to the device.

    Args:
        lists: Lists of equal length, at most 8, of contiguous float32, bfloat16 and float16
            tensors; those of one index have the same number of elements. The first has no None,
            and at least one element in all.
        chunk_size: Elements a chunk, a multiple of 16 (or chunks would not keep the alignment).

    Returns:
        int64 [chunks, len(lists) + 3] on the tensors' device. Not to be written.

    Raises:
        RuntimeError: The table is not there yet, and a CUDA graph is being captured.
    """
    first = [t for t in lists[0] if t is not None]
    addresses = tuple(map(addresses_of, lists))
    codes = tuple(map(codes_of, lists))
    sizes = tuple(map(Tensor.numel, first))
    return cached_table(
        ("chunks", addresses, codes, sizes, chunk_size),
        lambda: build_chunk_rows(addresses, codes, sizes, chunk_size),
        first[0].device,
    )


def build_chunk_rows(
    addresses: Sequence[Sequence[int]],
    codes: Sequence[Sequence[int]],
    sizes: Sequence[int],
    chunk_size: int,
) -> Tensor:
    """Return the rows of :func:`chunk_table` on the host.

    Args:
        addresses: Of the tensors of each list, 0 for None.
        codes: Their dtypes, or BYTE_CODE.
        sizes: Elements of the tensors of each index.
        chunk_size: As there.
    """
    addresses_ln, codes_ln = torch.tensor(addresses), torch.tensor(codes)
    sizes_n = torch.tensor(sizes)
    index, start = split_into_chunks(sizes_n, chunk_size)
    widths_ln = _WIDTHS[codes_ln]
    aligned = (addresses_ln % ALIGNMENT == 0).all(0)
    access = torch.where(aligned, ACCESS_ALIGNED, ACCESS_ANY)
    access[aligned & (codes_ln == 0).all(0)] = ACCESS_ALIGNED_FLOAT32
    code = access << ACCESS_SHIFT
    for position, codes_n in enumerate(codes_ln):
        code |= codes_n << (2 * position)
    at = addresses_ln[:, index] + widths_ln[:, index] * start
    at[addresses_ln[:, index] == 0] = 0
    count = (sizes_n[index] - start).clamp(max=chunk_size)
    return torch.stack([*at, count, code[index], index], dim=1)


def split_into_chunks(sizes: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return the index in ``sizes`` and the first element of each chunk, in order.

    Args:
        sizes: int64 [n], the sizes of what is cut; a size of 0 has no chunk.
        chunk_size: Elements a chunk; the last one of a size may have fewer.
    """
    counts = (sizes + chunk_size - 1) // chunk_size
    index = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first_chunk = counts.cumsum(0) - counts
    return index, (torch.arange(len(index)) - first_chunk[index]) * chunk_size


@dataclass
class _Table:
    """A table on its device, and what must be waited for before another stream reads it."""

    rows: Tensor
    stream: Any = None
    copied: Any = None


# The one state of the package. A table is a pure function of its key, which holds the addresses
# themselves, so that an old one is never wrong; dropping all of them costs a copy at the next call.
_tables: OrderedDict[Hashable, _Table] = OrderedDict()
# Tables that captured graphs read at every replay: never dropped.
_captured: dict[Hashable, _Table] = {}
_lock = threading.Lock()


def cached_table(key: Hashable, build: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Return the table of ``key`` on ``device``, built and copied there if it is not kept yet.

    The copy is from pinned memory and does not wait. The least recently used of 64 tables is
    dropped; one that a CUDA graph has captured never is.

    Args:
        key: All that ``build`` depends on.
        build: Makes the rows on the host, int64.
        device: Where the table belongs.

    Raises:
        RuntimeError: The table is not there yet, and a CUDA graph is being captured.
    """
    key = (device, key)
    if device.type == "cpu":
        with _lock:
            _keep(key, _tables.get(key) or _Table(build()))
            return _tables[key].rows
    with _lock, torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
        table = _captured.get(key) or _tables.get(key)
        stream = torch.cuda.current_stream(device)
        if table is None:
            if capturing:
                raise RuntimeError(
                    "a CUDA graph is being captured, and these tensors are not where they were in "
                    "the steps before it. Take one step before the capture, and keep the gradients "
                    "in place: zero_grad(set_to_none=False)"
                )
            rows = build().pin_memory().to(device, non_blocking=True)
            table = _Table(rows, stream, stream.record_event())
        if capturing:
            # The capture waited for the device before it began.
            _captured[key] = table
            return table.rows
        if stream != table.stream:
            stream.wait_event(table.copied)
            table.rows.record_stream(stream)
        _keep(key, table)
    return table.rows


def _keep(key: Hashable, table: _Table) -> None:
    _tables[key] = table
    _tables.move_to_end(key)
    if len(_tables) > _MAX_TABLES:
        _tables.popitem(last=False)
