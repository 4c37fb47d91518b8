"""Parameters and gradients of many small tensors in two flat buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Tensors begin at multiples of this many elements: 256 bytes in float32, what the widest loads
# and cuBLAS's fastest paths ask for.
ALIGNMENT = 64


class ParameterArena:
    """One flat parameter whose storage holds many tensors, and one flat gradient.

    Autograd accumulates into views of the flat gradient, so the optimizer sees a single tensor:
    one launch, no pointer table. Padding between tensors is zero and stays zero.

    Args:
        shapes: Shape of each tensor.
        device: Where the buffers live.
        dtype: Of values and gradients.

    Attributes:
        flat: The parameter for the optimizer, [elements]; ``flat.grad`` is the flat gradient.
        tensors: One leaf parameter a shape, views of `flat`; their ``.grad`` are views of its grad.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype
    ) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self.flat = nn.Parameter(torch.zeros(sum(padded), device=device, dtype=dtype))
        self.flat.grad = torch.zeros_like(self.flat)
        self.tensors: list[nn.Parameter] = []
        start = 0
        for shape, size, room in zip(shapes, sizes, padded, strict=True):
            tensor = nn.Parameter(self.flat.detach()[start : start + size].view(shape))
            tensor.grad = self.flat.grad[start : start + size].view(shape)
            self.tensors.append(tensor)
            start += room

    @property
    def grad(self) -> Tensor:
        """The flat gradient, [elements]."""
        assert self.flat.grad is not None
        return self.flat.grad
