"""The network's own weights, all of them or some.

Sources: DreamBooth (Ruiz et al., arXiv 2208.12242), which trains the whole network; Custom
Diffusion (Kumari et al., arXiv 2212.04488), which trains the keys and values of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastppt.config_types import Storage
from fastppt.trainables.arena import ParameterArena
from fastppt.trainables.targets import match_targets


@dataclass(frozen=True)
class _Place:
    """Where a module has a parameter that is trained, and the pretrained one."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    pretrained: nn.Parameter


class NetworkWeights:
    """Parameters of a network, moved into one arena.

    The network keeps its `nn.Parameter` objects. They become views: of the arena's working copy
    where values have another dtype than the network, else of the values themselves. So do their
    gradients, which autograd adds up where they are.

    Gradients have the network's dtype. In float16 they have float32, because they are to be divided
    by the loss scale, and float16 has nothing below 6e-8. Those of several passes are added in that
    dtype.

    Args:
        network: The pretrained network.
        targets: Patterns of the parameters that move; None for all.
        master_weights: Values of ``dtype``, and a copy for a network of another one. Else the
            network's dtype for the values.
        kept: Where the pretrained weights are kept, for an anchor and base passes; None for
            nowhere.
        dtype: Of master weights; float32 unless arithmetic is being checked.
        key: The trainable's table in the configuration, for messages.

    Attributes:
        arena: The flat buffers of values and gradients.
        pretrained: [elements], laid out like the arena, in the network's dtype: the weights that
            the run began with, whatever the stage. In pinned host memory, where kept there for a
            GPU. None where they are not kept.
        rounds_stochastically: Updates are to be rounded at random, since nothing holds what
            rounding to the nearest would lose.

    Raises:
        UserError: a target matches no parameter; the nearest are named.
    """

    def __init__(
        self,
        network: nn.Module,
        targets: Sequence[str] | None,
        *,
        master_weights: bool = True,
        kept: Storage | None = None,
        dtype: torch.dtype = torch.float32,
        key: str = "stage.0.trainables.full",
    ) -> None:
        parameters = dict(network.named_parameters())
        self._names = match_targets(targets, [*parameters], "parameter", key)
        moving = [parameters[name] for name in self._names]
        device, own_dtype = moving[0].device, moving[0].dtype
        shapes = [tuple(parameter.shape) for parameter in moving]
        self.arena = ParameterArena(
            shapes,
            device,
            dtype if master_weights else own_dtype,
            own_dtype,
            grad_dtype=torch.float32 if own_dtype == torch.float16 else own_dtype,
        )
        self.rounds_stochastically = self.arena.flat.dtype.itemsize == 2
        self.pretrained: Tensor | None = None
        self._places: list[_Place] = []
        self.arena.take_over(moving)
        if kept is not None:
            self.pretrained = self._copy_values(own_dtype, kept)
        if kept == "device":
            self._places = self._find_places(network, moving)

    @property
    def arenas(self) -> dict[str, ParameterArena]:
        """The one arena."""
        return {"": self.arena}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All trained values, views of the arena, by their paths in the network."""
        values = (tensor.detach() for tensor in self.arena.tensors)
        return dict(zip(self._names, values, strict=True))

    def refresh(self) -> None:
        """Let the network see the values as they are now, as `LoraAdapters.refresh`."""
        self.arena.refresh()

    @contextmanager
    def base(self) -> Iterator[None]:
        """Run the passes inside with the pretrained weights.

        As `torch.func.functional_call` does: parameters are exchanged in the modules, nothing is
        copied. Where no pretrained weights are kept, the run asks the base only before any of these
        weights moves, and the network is as it is.
        """
        for place in self._places:
            place.module._parameters[place.name] = place.pretrained
        try:
            yield
        finally:
            for place in self._places:
                place.module._parameters[place.name] = place.parameter

    def _copy_values(self, dtype: torch.dtype, kept: Storage) -> Tensor:
        """Return the values in the network's dtype, which all of them have by now."""
        values = self.arena.flat.detach()
        on_gpu = values.device.type == "cuda"
        if kept == "device" or not on_gpu:
            return values.to(dtype, copy=True)
        copy = torch.empty(values.shape, dtype=dtype, pin_memory=True)
        # By way of the working copy where there is one: a cast on the way would take memory.
        source = values if self.arena.working_copy is None else self.arena.working_copy
        return copy.copy_(source)

    def _find_places(self, network: nn.Module, moving: Sequence[nn.Parameter]) -> list[_Place]:
        assert self.pretrained is not None
        pretrained = {}
        for parameter, tensor in zip(moving, self.arena.tensors, strict=True):
            # Laid out like the arena.
            part = self.pretrained.as_strided(
                tensor.shape, tensor.stride(), tensor.storage_offset()
            )
            pretrained[parameter] = nn.Parameter(part, requires_grad=False)
        return [
            _Place(module, name, parameter, pretrained[parameter])
            for module in network.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter in pretrained
        ]
