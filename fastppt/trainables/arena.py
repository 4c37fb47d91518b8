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

    The tensors may stand beside a network, whose layers then write the gradients, or be the
    network's own parameters, which `take_over` makes views of the working tensors.

    Args:
        shapes: Shape of each tensor.
        device: Where the buffers live.
        dtype: Of the values.
        working_dtype: That the network computes in; None for `dtype`. Another one costs a copy.
        grad_dtype: Of the gradients; None for `dtype`.

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
        *,
        grad_dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self.flat = nn.Parameter(torch.zeros(sum(padded), device=device, dtype=dtype))
        self._give_grad(self.flat, torch.zeros_like(self.flat, dtype=grad_dtype))
        same = working_dtype in (None, dtype)
        self.working_copy = None if same else self.flat.detach().to(working_dtype)
        computed_with = self.flat.detach() if self.working_copy is None else self.working_copy
        self.tensors: list[nn.Parameter] = []
        self.working: list[Tensor] = []
        start = 0
        for shape, size, room in zip(shapes, sizes, padded, strict=True):
            part = slice(start, start + size)
            tensor = nn.Parameter(self.flat.detach()[part].view(shape))
            self._give_grad(tensor, self.grad[part].view(shape))
            self.tensors.append(tensor)
            self.working.append(computed_with[part].view(shape))
            start += room
        self._leaves: Sequence[nn.Parameter] = self.tensors

    @property
    def grad(self) -> Tensor:
        """The flat gradient, [elements]."""
        assert self.flat.grad is not None
        return self.flat.grad

    def take_over(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the values of a network's parameters, and make them views of what is here.

        Their memory is free then. Autograd adds to their gradients, views of the flat one, in
        place.

        Args:
            parameters: One for each of the shapes, in the working dtype.
        """
        for parameter, tensor, working in zip(parameters, self.tensors, self.working, strict=True):
            tensor.detach().copy_(parameter.detach())
            working.copy_(parameter.detach())
            parameter.data = working
            assert tensor.grad is not None
            self._give_grad(parameter, tensor.grad)
        self._leaves = parameters

    def require_grad(self, wanted: bool) -> None:
        """Say whether passes compute gradients of the values."""
        for parameter in (self.flat, *self._leaves):
            parameter.requires_grad_(wanted)

    @staticmethod
    def _give_grad(parameter: nn.Parameter, grad: Tensor) -> None:
        parameter.grad_dtype = grad.dtype
        parameter.grad = grad

    def refresh(self) -> None:
        """Write the values into the working copy, if there is one."""
        if self.working_copy is not None:
            self.working_copy.copy_(self.flat.detach())
