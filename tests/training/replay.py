"""A recorder that does on the CPU what a CUDA graph does on a GPU, so that graphs are tested there.

Every op of one run is written down with the tensors that it read and wrote, the backward pass's and
our own ops among them. A replay runs the same ops on the same memory, with every Python value as it
was then: a branch, a constant or an address that the recording holds for good shows, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

from fastppt.training.graph import Function
from fastppt_kernels.testing import ForbidHostReads


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recording(ForbidHostReads):
    """Writes down the ops that run inside; a host read raises."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.made: dict[int, Tensor] = {}
        self._written: dict[int, Tensor] = {}

    @property
    def written(self) -> list[Tensor]:
        """Tensors from before, in whose memory an op wrote."""
        return [self._written[key] for key in self._written.keys() - self.made.keys()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = super().__torch_dispatch__(func, types, args, kwargs)
        # Aliases without autograd's graph, which ends with the run.
        inputs = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        results = [out.detach() for out in tree_iter(outputs) if isinstance(out, Tensor)]
        self._write_down(func, *inputs, results)
        return outputs

    def _write_down(
        self, func: Any, args: Any, kwargs: dict[str, Any], results: list[Tensor]
    ) -> None:
        mutated = [
            tensor
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_iter(value)
        ]
        mutated += [
            tensor
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_iter(kwargs.get(argument.name))
            if tensor is not None
        ]
        known = {storage_of(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [(i, out) for i, out in enumerate(results) if storage_of(out) not in known]
        self.made |= {storage_of(out): out for _, out in fresh}
        self._written |= {storage_of(tensor): tensor for tensor in mutated}
        if not mutated and not fresh:
            # A view: its memory is that of what it is of.
            return

        def call() -> None:
            again = [t for t in tree_iter(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for index, out in fresh:
                out.copy_(again[index])

        self.calls.append(call)

    def spoil(self) -> None:
        """Overwrite all that the ops have made, as another graph in the same pool may."""
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)


class ReplayRecorder:
    """The recorder of the CPU: see the module."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators
        self.recordings: list[Recording] = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def record(self, function: Function) -> Callable[[], None]:
        with Recording() as recording:
            function()
        self.recordings.append(recording)

        @torch.no_grad()
        def replay() -> None:
            for one in self.recordings:
                one.spoil()
            for call in recording.calls:
                call()

        return replay
