"""What a step costs beside its time: operations, launches, memory; and what the machine can do."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.interleave import stopwatch_of, summarise

Call = Callable[[], object]

# Square products: large enough for a GPU's tensor cores, and for a CPU's thread not to take long.
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
PRODUCT_ROUNDS = 15

aten = torch.ops.aten

# Makes room, but writes nothing.
ALLOCATIONS = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten._reshape_alias,
    aten.lift_fresh,
}


def _product_flop(left_shape, right_shape, *args, **kwargs) -> int:
    return 2 * math.prod(left_shape) * right_shape[-1]


def _added_product_flop(total_shape, left_shape, right_shape, *args, **kwargs) -> int:
    return _product_flop(left_shape, right_shape)


def _flash_flop(query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _flash_backward_flop(grad_shape, query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)


# What torch counts of products and attentions leaves out those in place, those with an output of
# another type, and the CPU's fused attention.
FORMULAS = {
    aten.bmm: _product_flop,
    **dict.fromkeys((aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_), _added_product_flop),
    aten._scaled_dot_product_flash_attention_for_cpu: _flash_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_flop,
}


def count_flops(call: Call) -> int:
    """Return the operations of the products, convolutions and attentions of an eager call.

    A multiplication and an addition are two. The backward pass of fused attention computes its
    scores again, and that is counted.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Launches:
    """What one call launches.

    Attributes:
        kernels: Kernels that the GPU ran; on the CPU the operators that were dispatched, without
            views and allocations.
        host: Launches that the host made for them, a graph's being one; None on the CPU.
    """

    kernels: int
    host: int | None


def count_launches(call: Call, device: str) -> Launches:
    """Run a call and count. On the CPU nothing is seen inside what torch.compile made."""
    if device == "cpu":
        with _DispatchCounter() as counter:
            call()
        return Launches(counter.count, None)
    # The runtime's launches come with the GPU's activities; torch's own operators would only make
    # the many events more.
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = host = 0
    for event in profile.events():
        if event.device_type == on_gpu:
            moves = event.name.startswith(("Memcpy", "Memset"))
            kernels += not moves and not event.is_user_annotation
        else:
            host += event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"))
    return Launches(kernels, host)


class MemoryWatch:
    """Counts what is taken on the GPU from now on, in bytes; on the CPU nothing is.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        if self._on_gpu:
            _free_cache()
            self._allocated = torch.cuda.memory_allocated()
            self._reserved = torch.cuda.memory_reserved()
            torch.cuda.reset_peak_memory_stats()

    def forget_peak(self) -> None:
        """Let the peak begin at what is taken now."""
        if self._on_gpu:
            _free_cache()
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> tuple[int | None, int | None]:
        """Return the most that tensors took, and what the allocator holds now.

        The allocator holds the pools of captured graphs too.
        """
        if not self._on_gpu:
            return None, None
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - self._allocated
        _free_cache()
        return peak, torch.cuda.memory_reserved() - self._reserved


def _free_cache() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def product_speed(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """Return the TFLOP/s of a large square product: the roof that a step is held against.

    Args:
        device: "cpu" or "cuda".
        dtype: Of the matrices.
        size: Of their sides; None for that of `PRODUCT_SIZE`.
    """
    size = PRODUCT_SIZE[device] if size is None else size
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    stopwatch = stopwatch_of(device)
    for _ in range(2):
        torch.mm(left, right, out=product)
    times = [stopwatch(lambda: torch.mm(left, right, out=product)) for _ in range(PRODUCT_ROUNDS)]
    return 2 * size**3 / summarise(times).p50 / 1e9


class _DispatchCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func.overloadpacket not in ALLOCATIONS
        return func(*args, **(kwargs or {}))
