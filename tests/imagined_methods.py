"""The methods of tensors that say where they are and take them elsewhere, on a GPU in thought."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.imagined_places import CPU, DEVICE, GPU, PINNED, PLACES, RefusedError, real

TO, COPY_DEEPLY = Tensor.to, Tensor.__deepcopy__
READING = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "__array__")}


def methods_of(gpu: Any) -> dict[str, Any]:
    """What tensors are to answer, by name; a mode is off inside of torch's own functions.

    Args:
        gpu: The `ImaginedGPU`.
    """

    def pin(tensor: Tensor, *_: Any) -> Tensor:
        if gpu.is_capturing:
            raise RefusedError("Tensor.pin_memory: in a capture")
        out = tensor.clone()
        PLACES.note(out, PINNED)
        return out

    def copy_deeply(tensor: Tensor, memo: Any) -> Tensor:
        out = real(COPY_DEEPLY, tensor, memo)
        PLACES.note(out, PLACES.of(tensor))
        return out

    def device(tensor: Tensor) -> torch.device:
        if tensor.is_meta:
            return torch.device("meta")
        return DEVICE if PLACES.of(tensor) == GPU else CPU

    reading = {
        name: lambda tensor, *args, name=name, **kwargs: gpu.read_all(name, tensor, *args, **kwargs)
        for name in READING
    }
    return reading | {
        "device": property(device),
        "is_cuda": property(lambda tensor: PLACES.of(tensor) == GPU),
        "is_cpu": property(lambda tensor: PLACES.of(tensor) != GPU and not tensor.is_meta),
        "get_device": lambda tensor: 0 if PLACES.of(tensor) == GPU else -1,
        "is_pinned": lambda tensor, *_: PLACES.of(tensor) == PINNED,
        "pin_memory": pin,
        "record_stream": lambda tensor, stream: None,
        "to": lambda tensor, *args, **kwargs: gpu.take(tensor, *args, **kwargs),
        "cpu": lambda tensor, *_, **__: gpu.take(tensor, CPU),
        "cuda": lambda tensor, *_, **__: gpu.take(tensor, DEVICE),
        "__deepcopy__": copy_deeply,
    }
