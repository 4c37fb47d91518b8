"""A GPU in thought: CPU tensors that say they are on one, and refusals of what a GPU refuses.

torch's fake tensors cannot say "cuda" to autograd in a torch without CUDA, and have no values. Here
tensors are those of the CPU, values and all; which of them would lie on the GPU is noted by their
memory. Every op is looked at, the backward pass's among them, and so is every launch of a kernel:
tensors of host and GPU in one op raise, and so does memory that two streams touch in no order.
Within `ImaginedGPU.step`, as in a capture, what waits for the device raises too, and so does a draw
from a generator that the step does not own.

What it cannot see: what Triton kernels compute (a launch is noted and its arguments are looked at,
but nothing runs: results are whatever was in the memory), memory that a kernel reaches by addresses
in a table, memory that is freed while another stream uses it, dtypes and layouts that CUDA kernels
of torch refuse, threads (on a GPU the backward pass has one of its own), tensors that C++ makes of
nothing, which count as of either place, what attention draws, and what is done while an event is
not there yet: one that is asked for always is.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from fastppt_kernels.anchored_adamw.eight_bit import make_map_table
from tests.imagined_methods import READING, TO, methods_of
from tests.imagined_operations import SUBSTITUTES
from tests.imagined_places import (
    CPU,
    GPU,
    HOST,
    PINNED,
    PLACES,
    ImaginedGenerator,
    RefusedError,
    Touched,
    key_of,
    real,
    tensors_in,
)
from tests.imagined_streams import Order

aten = torch.ops.aten

# What reads a value, or the number of values, on the host.
READS = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_dim.default,
    aten._unique2.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
COPIES = {aten.copy_.default, aten._foreach_copy_.default}
CONSTRUCTORS = _device_constructors()
FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}


class _Ops(TorchDispatchMode):
    """Looks at every op that runs."""

    def __init__(self, gpu: ImaginedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in(args, kwargs)
        here = [PLACES.of(tensor) for tensor in given]
        self.gpu.look_at_op(func, args, kwargs, given, here)
        place = GPU if GPU in here else HOST
        if getattr(kwargs.get("device"), "type", None) == "cuda":
            kwargs, place = kwargs | {"device": CPU}, GPU
        elif not given and not self.gpu.calls_from_python:
            place = None
        outputs = SUBSTITUTES.get(func, func)(*args, **kwargs)
        known = {key_of(tensor) for tensor in given}
        fresh = [out for out in tensors_in(outputs) if key_of(out) not in known]
        for out in fresh:
            self.gpu.order.forget(key_of(out))
            if place != HOST or PLACES.of(out) != HOST:
                PLACES.note(out, place)
        self.gpu.look_at_order(func, args, kwargs, given, fresh)
        return outputs


class _Calls(TorchFunctionMode):
    """Makes tensors where they are asked for."""

    def __init__(self, gpu: ImaginedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpu.call(func, args, dict(kwargs or {}))


class ImaginedGPU(ExitStack):
    """A context in which torch has a GPU in thought.

    Attributes:
        launches: Of Triton kernels, in their order: name, grid, and arguments without the values
            of tensors.
        waits: What has made the host wait, and how often.
        num_captures: Graphs that were captured.
        num_replays: Replays of any; they compute nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
        self.waits: Counter[str] = Counter()
        self.num_captures = self.num_replays = 0
        self.order = Order(self.wait)
        self.calls_from_python = 0
        self.is_capturing = False
        self._owned: list[int] | None = None
        self._making: str | None = None
        self._moving = False
        self._touched: Touched | None = None

    def __enter__(self) -> ImaginedGPU:
        super().__enter__()
        for name, value in self._names().items():
            self.enter_context(mock.patch(name, value, create=True))
        # What the package keeps on a GPU is another's, before and after.
        make_map_table.cache_clear()
        self.callback(make_map_table.cache_clear)
        self.enter_context(_Calls(self))
        self.enter_context(_Ops(self))
        return self

    @contextmanager
    def step(self, *generators: Any) -> Iterator[None]:
        """Refuse inside what a captured step must not do; these generators are its own."""
        before, self._owned = self._owned, [each._cdata for each in generators]
        try:
            yield
        finally:
            self._owned = before

    def wait(self, what: str) -> None:
        """The host waits for the device; in a step that is refused."""
        self.waits[what] += 1
        if self._owned is not None:
            raise RefusedError(f"{what}: the host waits for the device")

    # What is asked of torch.

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        is_pinned = kwargs.pop("pin_memory", False)
        place = None
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            if device.type != "meta":
                place = GPU if device.type == "cuda" else HOST
                kwargs["device"] = CPU
        elif func in CONSTRUCTORS:
            place = HOST
        if place is None:
            return func(*args, **kwargs)
        self.calls_from_python += 1
        before, self._making = self._making, place
        try:
            out = real(func, *args, **kwargs)
        finally:
            self.calls_from_python -= 1
            self._making = before
        if func in FROM_VALUES:
            sources = [PLACES.of(tensor) for tensor in tensors_in(args, kwargs)] or [HOST]
            self.look_at_transfer(sources[0], place, False, func.__name__)
        for each in tensors_in(out):
            PLACES.note(each, PINNED if is_pinned else place)
        return out

    def take(
        self,
        tensor: Tensor,
        *args: Any,
        device: Any = None,
        dtype: torch.dtype | None = None,
        other: Tensor | None = None,
        non_blocking: bool = False,
        copy: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Tensor:
        """Do ``Tensor.to``, in all its forms."""
        left = list(args)
        if left and isinstance(left[0], Tensor):
            other = left.pop(0)
        elif left and not isinstance(left[0], torch.dtype | bool):
            device = left.pop(0)
        if left and not isinstance(left[0], bool):
            dtype = left.pop(0)
        non_blocking, copy = (*left, *(non_blocking, copy)[len(left) :])
        place = None
        if other is not None:
            place, dtype = PLACES.of(other), other.dtype
        elif device is not None:
            if torch.device(device).type == "meta":
                return real(TO, tensor, device, dtype)
            place = GPU if torch.device(device).type == "cuda" else HOST
        here = PLACES.of(tensor)
        moves = place is not None and here is not None and (place == GPU) != (here == GPU)
        if moves:
            self.look_at_transfer(here, place, non_blocking, "Tensor.to")
        copy = copy or moves
        self._moving = moves
        try:
            kept = {"copy": copy, "memory_format": memory_format}
            out = real(TO, tensor, dtype=dtype or tensor.dtype, **kept)
        finally:
            self._moving = False
        if moves:
            PLACES.note(out, place)
        return out

    def read_all(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Do what reads a whole tensor on the host."""
        place = PLACES.of(tensor)
        if place == GPU and name != "tolist":
            raise TypeError(f"Tensor.{name}: is on the GPU; use Tensor.cpu() first")
        if place == GPU:
            self.wait("Tensor.tolist")
        elif place == PINNED:
            self._touch({key_of(tensor)}, set(), f"Tensor.{name}", by_host=True)
        return real(READING[name], tensor, *args, **kwargs)

    # What torch does.

    def look_at_op(
        self, func: Any, args: Any, kwargs: Any, given: list[Tensor], here: list[str | None]
    ) -> None:
        makes = self._making == GPU or getattr(kwargs.get("device"), "type", None) == "cuda"
        if (GPU in here or makes) and torch.Tag.nondeterministic_seeded in func.tags:
            self._look_at_draw(func, [*args, *kwargs.values()])
        if GPU not in here:
            return
        by_mask = func in INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if func in READS or by_mask:
            self.wait(str(func))
        host = [t for t, place in zip(given, here, strict=True) if place in (HOST, PINNED)]
        if func in COPIES:
            non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            pairs = zip(tensors_in(args[0]), tensors_in(args[1]), strict=True)
            for target, source in pairs:
                what = str(func)
                self.look_at_transfer(PLACES.of(source), PLACES.of(target), non_blocking, what)
        elif func in INDEXING and host and PLACES.of(given[0]) == GPU:
            self.wait(f"{func} by an index in host memory")
        elif any(t.dim() for t in host) or (host and self._owned is not None):
            # A number in host memory may stand beside the GPU's tensors, but a graph would hold it.
            shapes = ", ".join(str(tuple(t.shape)) for t in host)
            raise RefusedError(
                f"{func}: tensors of the GPU and of host memory ({shapes}) in one op"
            )

    def _look_at_draw(self, func: Any, arguments: list[Any]) -> None:
        if "scaled_dot_product" in str(func):
            # It could drop out, and nobody here asks for that.
            return
        drawn_from = [each._cdata for each in arguments if isinstance(each, torch._C.Generator)]
        if any(ImaginedGenerator.places.get(key) != GPU for key in drawn_from):
            raise RefusedError(f"{func}: draws for the GPU with a generator of the CPU")
        owned = self._owned
        if owned is not None and (not drawn_from or drawn_from[0] not in owned):
            raise RefusedError(f"{func}: draws with a generator that is not the step's")

    def look_at_transfer(
        self, source: str | None, target: str | None, non_blocking: bool, what: str
    ) -> None:
        if None in (source, target) or (source == GPU) == (target == GPU):
            return
        if non_blocking and PINNED in (source, target):
            return
        self.wait(f"{what} from {source} to {target}")
        self.order.host_waits()

    def look_at_order(
        self, func: Any, args: Any, kwargs: Any, given: list[Tensor], fresh: list[Tensor]
    ) -> None:
        arguments = func._schema.arguments
        values = [*args, *(kwargs.get(a.name) for a in arguments[len(args) :])]
        written = [
            tensor
            for argument, value in zip(arguments, values, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors_in(value)
        ]
        # A view reads nothing.
        if func.is_view:
            return
        by_host = not self._moving and GPU not in [PLACES.of(t) for t in (*given, *fresh)]
        reads, writes = (
            {key_of(t) for t in tensors if PLACES.of(t) in (GPU, PINNED)}
            for tensors in (given, [*written, *fresh])
        )
        if reads or writes:
            self._touch(reads, writes, str(func), by_host=by_host)

    def _touch(self, reads: set[int], writes: set[int], what: str, *, by_host: bool) -> None:
        if self._touched is not None:
            # It happens at the replays.
            self._touched.note(reads, writes)
        elif not self.order.touch(reads, writes, by_host=by_host):
            raise RefusedError(f"{what}: touches memory that another stream still works on")

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kw: Any) -> None:
        """Note a launch of a Triton kernel, whose tensors must be on the GPU."""
        named = dict(zip((p.name for p in kernel.params), args, strict=False)) | kw
        given = tensors_in(named)
        for name, value in named.items():
            if isinstance(value, Tensor) and PLACES.of(value) in (HOST, PINNED):
                raise RefusedError(f"{kernel.__name__}: {name} is in {PLACES.of(value)}")
        keys = {key_of(tensor) for tensor in given}
        self._touch(keys, set(), kernel.__name__, by_host=False)
        kinds = {
            name: (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value
            for name, value in named.items()
        }
        size = grid(named) if callable(grid) else tuple(grid)
        self.launches.append((kernel.__name__, size, kinds))

    def _names(self) -> dict[str, Any]:
        """What is to be found under torch's and our own names."""
        gpu = self

        class Graph:
            def __init__(self, *_: Any, **__: Any) -> None:
                self.generators: list[Any] = []
                self.touched = Touched()

            def register_generator_state(self, generator: Any) -> None:
                self.generators.append(generator)

            def replay(self) -> None:
                gpu.num_replays += 1
                gpu._touch(*self.touched.alive(), "a replay", by_host=False)

        @contextmanager
        def capture(graph: Graph, pool: Any, stream: Any, **_: Any) -> Iterator[None]:
            gpu.is_capturing, gpu._touched = True, graph.touched
            try:
                with gpu.order.on(stream), gpu.step(*graph.generators):
                    yield
            finally:
                gpu.is_capturing, gpu._touched = False, None
            gpu.num_captures += 1

        properties = SimpleNamespace(
            name="a GPU in thought", major=9, minor=0, multi_processor_count=132, gcnArchName=""
        )
        cuda = gpu.order.names() | {
            "CUDAGraph": Graph,
            "graph": capture,
            "graph_pool_handle": lambda: (0, 0),
            "is_current_stream_capturing": lambda: gpu.is_capturing,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda *_: None,
            "device": lambda *_: nullcontext(),
            "get_device_name": lambda *_: properties.name,
            "get_device_capability": lambda *_: (9, 0),
            "get_device_properties": lambda *_: properties,
            "mem_get_info": lambda *_: (2**37, 2**37),
            "max_memory_allocated": lambda *_: 0,
            "reset_peak_memory_stats": lambda *_: None,
            "empty_cache": lambda: None,
            "is_bf16_supported": lambda *_: True,
            "_lazy_init": lambda: None,
        }

        def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
            gpu.launch(kernel, *args, **kwargs)

        def constructor(func: Any) -> Any:
            def make(*args: Any, **kwargs: Any) -> Any:
                if torch._C._len_torch_function_stack():
                    return func(*args, **kwargs)
                return gpu.call(func, args, kwargs)

            return make

        names = {
            # Where torch itself has called Python, as in a backward pass, the mode is off.
            f"torch.{func.__name__}": constructor(func)
            for func in CONSTRUCTORS
            if getattr(torch, func.__name__, None) is func
        }
        names |= {f"torch.cuda.{name}": value for name, value in cuda.items()}
        names |= {f"torch.Tensor.{name}": value for name, value in methods_of(gpu).items()}
        return names | {
            "torch.Generator": ImaginedGenerator,
            "triton.runtime.jit.JITFunction.run": run,
            "fastppt_kernels.launch._tables": OrderedDict(),
            "fastppt_kernels.launch._captured": {},
            # As where nobody looks: torch.library would hide from us what an operation does.
            "fastppt_kernels.operation.is_looked_at": lambda arguments: False,
        }
