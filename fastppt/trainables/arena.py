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

    Gradients are accumulated into views of the flat gradient, so the optimizer sees a single
    tensor: one launch, no pointer table. Padding between tensors is zero and stays zero.

    A network in a narrower dtype computes with a copy of the values, which is flat too: all of it
    is written at once, by the optimizer or by `refresh`, and no tensor is cast in any pass.

    Args:
        shapes: Shape of each tensor.
        device: Where the buffers live.
        dtype: Of values and gradients.
        working_dtype: That the network computes in; None for `dtype`. Another one costs a copy.

    Attributes:
        flat: The parameter for the optimizer, [elements]; ``flat.grad`` is the flat gradient.
        tensors: One leaf parameter a shape, views of `flat`; their ``.grad`` are views of its grad.
        working_copy: `flat` in the working dtype, for whoever writes `flat` to write too; None
            where that is the same dtype.
        working: One tensor a shape, without a gradient, in the working dtype: views of the copy,
            or of `flat` where there is none.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device,
        dtype: torch.dtype,
        working_dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self.flat = nn.Parameter(torch.zeros(sum(padded), device=device, dtype=dtype))
        self.flat.grad = torch.zeros_like(self.flat)
        same = working_dtype in (None, dtype)
        self.working_copy = None if same else self.flat.detach().to(working_dtype)
        computed_with = self.flat.detach() if self.working_copy is None else self.working_copy
        self.tensors: list[nn.Parameter] = []
        self.working: list[Tensor] = []
        start = 0
        for shape, size, room in zip(shapes, sizes, padded, strict=True):
            part = slice(start, start + size)
            tensor = nn.Parameter(self.flat.detach()[part].view(shape))
            tensor.grad = self.flat.grad[part].view(shape)
            self.tensors.append(tensor)
            self.working.append(computed_with[part].view(shape))
            start += room

    @property
    def grad(self) -> Tensor:
        """The flat gradient, [elements]."""
        assert self.flat.grad is not None
        return self.flat.grad

    def refresh(self) -> None:
        """Write the values into the working copy, if there is one."""
        if self.working_copy is not None:
            self.working_copy.copy_(self.flat.detach())
