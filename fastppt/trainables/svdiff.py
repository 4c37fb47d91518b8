"""Shifts of the singular values of the network's weights.

    W = U diag(s) V^T,   W' = U diag(relu(s + d)) V^T

of each matrix, d being trained from zero; a convolution's weight [O, I, h, w] is the matrix
[O, I h w]. A vector, which the weight of a norm is, is shifted itself: w' = w + d.

Source: SVDiff, Han et al., arXiv 2303.11305, equation 2. That vectors are shifted element by
element is our reading: their published learning rate is that of weights, not that of shifts.

The frozen weight stays, and what a shift changes is added to the layer's output:

    y = x W^T + ((x V) * m) U^T,   m = relu(s + d) - s = max(d, -s)

So a pass without shifts is the base, bit for bit, and so is one with shifts of zero. To form W'
once a pass instead would round each shift to the last digit of the weight: bfloat16 has 8 bits, and
what one step adds is below them. Of a step of a UNet with 2.6 G weights at 1024 pixels, batch 1,
the layers' products, counted, are 28.2 TFLOP this way, 30.6 with W' formed, and 12.0 without shifts
(0.9 G weights at 512 pixels: 3.1, 6.0, 1.4); the more pictures in a batch, the more speaks for
forming. U and V are kept in the network's dtype: 1.43 times as many values as the weights
(1.26 times).

Shape legend: O output width, I input width (of a convolution: times its window), k the smaller of
both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from fastppt.errors import UserError
from fastppt.families.attention import AdapterSwitch
from fastppt.trainables.arena import ParameterArena
from fastppt.trainables.targets import match_targets
from fastppt.trainables_config import SvdiffConfig

MATRICES = (nn.Linear, nn.Conv2d)
VECTORS = (nn.GroupNorm, nn.LayerNorm, RMSNorm)
VECTOR_PART = "1d"

# In files, by the module's path: the shift of its weight, and the singular values that it shifts.
SHIFT, SINGULAR_VALUES = ".delta", ".singular_values"
# What metadata call the dtype of the weights that were decomposed.
BASE_DTYPE = "base_dtype"
# How far, as part of the largest, a singular value may be from the one that was shifted. In the
# same weights they differ by the rounding of the file, 6e-8; weights rounded otherwise have other
# singular vectors where values lie close together, long before their values differ by much.
SAME_WEIGHTS = 1e-5


class SpectralShifts:
    """The shifts of all chosen weights of a network, in two arenas.

    A layer's weight is decomposed here, in float64, from the weight as it is: the same weights give
    the same shifts their meaning again, so nothing but shifts is kept of a run. Singular values
    below the rounding of float32 are taken for zero; relu has no slope there, so they stay it.

    Args:
        network: Frozen; its layers get a forward hook each, its weights are not touched.
        config: Its targets are patterns of weights, such as ``*.attn2.*``.
        unread: Paths of layers whose output nothing reads; they are left out.
        device: Where shifts and gradients live; the network's.
        dtype: Of shifts and gradients; float32 unless arithmetic is being checked.
        key: The trainable's table in the configuration, for messages.

    Attributes:
        arenas: The shifts of matrices, and those of vectors as part `1d`; a part that the targets
            leave without weights is not there.
        switch: Turns all of them off for a base pass.

    Raises:
        UserError: a target matches no weight; the nearest are named.
    """

    def __init__(
        self,
        network: nn.Module,
        config: SvdiffConfig,
        *,
        unread: Sequence[str] = (),
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        key: str = "stage.0.trainables.svdiff",
    ) -> None:
        self.switch = AdapterSwitch()
        layers: dict[str, Any] = {
            f"{path}.weight": module
            for path, module in network.named_modules()
            if isinstance(module, MATRICES + VECTORS) and module.weight is not None
            if path not in unread
        }
        chosen = match_targets(config.targets, [*layers], "weight", key)
        matrices = {name: layers[name] for name in chosen if isinstance(layers[name], MATRICES)}
        vectors = {name: layers[name] for name in chosen if name not in matrices}
        self.arenas: dict[str, ParameterArena] = {}
        self._matrices: dict[str, _MatrixShift] = {}
        self._vectors: dict[str, _VectorShift] = {}
        if matrices:
            shapes = [(min(_as_matrix(layer.weight).shape),) for layer in matrices.values()]
            arena = self.arenas[""] = ParameterArena(shapes, device, dtype)
            for (name, layer), shift in zip(matrices.items(), arena.tensors, strict=True):
                self._matrices[name] = _MatrixShift.of(layer, shift, self.switch)
                layer.register_forward_hook(self._matrices[name])
        if vectors:
            shapes = [tuple(layer.weight.shape) for layer in vectors.values()]
            arena = self.arenas[VECTOR_PART] = ParameterArena(shapes, device, dtype)
            for (name, layer), shift in zip(vectors.items(), arena.tensors, strict=True):
                self._vectors[name] = _VectorShift(shift, self.switch)
                layer.register_forward_hook(self._vectors[name])
        self._base_dtype = layers[chosen[0]].weight.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The shifts, [k] of a matrix and [O] of a vector, by the path of their weight."""
        every: dict[str, Any] = {**self._matrices, **self._vectors}
        return {name: layer.shift.detach() for name, layer in every.items()}

    @property
    def basis(self) -> list[Tensor]:
        """U, V^T and the singular values of all matrices, which are kept beside the weights."""
        layers = self._matrices.values()
        return [part for layer in layers for part in (layer.left, layer.right, layer.floors)]

    def refresh(self) -> None:
        """Do nothing: the network's passes read the shifts themselves."""

    def base(self) -> AbstractContextManager[None]:
        """Run the passes inside without the shifts: by a flag, so at no cost."""
        return self.switch.base()

    def file_tensors(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `merge_shifts_` reads: tensors and metadata for a safetensors file.

        Args:
            dtype: Of the shifts; the singular values are float32.
        """
        tensors = {
            name.removesuffix(".weight") + SHIFT: shift.to("cpu", dtype)
            for name, shift in self.tensors.items()
        }
        for name, layer in self._matrices.items():
            values = -layer.floors
            tensors[name.removesuffix(".weight") + SINGULAR_VALUES] = values.to("cpu").float()
        return tensors, {BASE_DTYPE: str(self._base_dtype).removeprefix("torch.")}


@torch.no_grad()
def merge_shifts_(
    network: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write W' into the weights of a network that knows nothing of shifts.

    W' - W is formed in float64 from the weight rounded as training had it, and added to the weight
    as it is here.

    Args:
        network: Of diffusers, with the weights that the shifts were trained on. Written.
        tensors: Of `SpectralShifts.file_tensors`.
        metadata: Likewise.

    Raises:
        UserError: a weight is not there, has another shape or other singular values than the one
            that was trained. Weights before it are written then.
    """
    base_dtype = getattr(torch, metadata.get(BASE_DTYPE, ""), None)
    if not isinstance(base_dtype, torch.dtype):
        raise UserError(f"its metadata have no {BASE_DTYPE}; was it written by fastppt?")
    layers = dict(network.named_modules())
    for key, shift in tensors.items():
        if not key.endswith(SHIFT):
            continue
        path = key.removesuffix(SHIFT)
        layer = layers.get(path)
        if not isinstance(layer, MATRICES + VECTORS) or layer.weight is None:
            raise UserError(f"{path}: there is no such weight; it was trained on another model")
        weight = layer.weight
        wide_shift = shift.to(weight.device, torch.float64)
        if isinstance(layer, VECTORS):
            _check_shape(path, shift, weight.shape)
            change = wide_shift
        else:
            left, values, right = decompose(weight.to(base_dtype))
            _check_shape(path, shift, values.shape)
            _check_values(path, values, tensors.get(path + SINGULAR_VALUES), base_dtype)
            change = (left * torch.maximum(wide_shift, -values)) @ right
        weight.copy_(weight.double() + change.view(weight.shape))


@torch.no_grad()
def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [O, k], s [k] and V^T [k, I] of a weight, the largest singular value first.

    By the eigenvectors of the smaller of W W^T and W^T W, all in float64: a fraction of the work of
    an SVD, and s as exact as a float32 SVD has it at least. Singular values below the rounding of
    float32 are zero, and so are their rows of V^T (columns of U, where O > I).

    Args:
        weight: [O, I] or [O, I, h, w], of any floating-point dtype.
    """
    matrix = _as_matrix(weight).double()
    is_tall = matrix.shape[0] > matrix.shape[1]
    rows = matrix.t() if is_tall else matrix
    _, vectors = torch.linalg.eigh(rows @ rows.t())
    near = vectors.flip(1)
    far = near.t() @ rows
    values = torch.linalg.vector_norm(far, dim=1)
    rounding = torch.finfo(torch.float32).eps * max(matrix.shape)
    is_there = values > rounding * values.amax()
    values = torch.where(is_there, values, 0.0)
    far = torch.where(is_there[:, None], far / values[:, None], 0.0)
    return (far.t(), values, near.t()) if is_tall else (near, values, far)


@dataclass(eq=False)
class _MatrixShift:
    """Forward hook of a linear or a convolution.

    Attributes:
        shift: d [k], a leaf.
        floors: -s [k], in the dtype of the shift.
        left: U, [O, k] or [O, k, 1, 1], in the network's dtype.
        right: V^T, [k, I] or [k, I, h, w], likewise.
        switch: Says whether it does anything.
    """

    shift: nn.Parameter
    floors: Tensor
    left: Tensor
    right: Tensor
    switch: AdapterSwitch

    @classmethod
    def of(cls, layer: Any, shift: nn.Parameter, switch: AdapterSwitch) -> _MatrixShift:
        """Decompose a layer's weight."""
        weight = layer.weight
        left, values, right = decompose(weight)
        if isinstance(layer, nn.Conv2d):
            assert layer.groups == 1 and layer.padding_mode == "zeros"
            left, right = left[:, :, None, None], right.view(-1, *weight.shape[1:])
        return cls(
            shift,
            -values.to(shift.dtype),
            left.to(weight.dtype).contiguous(),
            right.to(weight.dtype).contiguous(),
            switch,
        )

    def __call__(self, layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Return the output [..., O] or [B, O, h, w] with what the shift adds."""
        if not self.switch.enabled:
            return output
        # As relu: no gradient at the floor.
        amounts = torch.where(self.shift > self.floors, self.shift, self.floors).to(output.dtype)
        if not isinstance(layer, nn.Conv2d):
            return output + F.linear(F.linear(inputs[0], self.right) * amounts, self.left)
        parts = F.conv2d(inputs[0], self.right, None, layer.stride, layer.padding, layer.dilation)
        return output + F.conv2d(parts * amounts[:, None, None], self.left)


@dataclass(eq=False)
class _VectorShift:
    """Forward hook of a norm.

    Attributes:
        shift: d [O], a leaf.
        switch: Says whether it does anything.
    """

    shift: nn.Parameter
    switch: AdapterSwitch

    def __call__(self, layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Return the output with what the shift adds: the same norm, with d for its weight."""
        if not self.switch.enabled:
            return output
        (values,), shift = inputs, self.shift.to(output.dtype)
        if isinstance(layer, nn.GroupNorm):
            return output + F.group_norm(values, layer.num_groups, shift, None, layer.eps)
        if isinstance(layer, nn.LayerNorm):
            return output + F.layer_norm(values, layer.normalized_shape, shift, None, layer.eps)
        return output + F.rms_norm(values, layer.dim, shift, layer.eps)


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1)


def _check_shape(path: str, shift: Tensor, wanted: torch.Size) -> None:
    if shift.shape != wanted:
        raise UserError(
            f"{path}: has shape {tuple(shift.shape)} in the file, and the weight here takes "
            f"{tuple(wanted)}; it was trained on another model"
        )


def _check_values(
    path: str, values: Tensor, trained: Tensor | None, base_dtype: torch.dtype
) -> None:
    if trained is None:
        raise UserError(f"{path}{SINGULAR_VALUES}: is missing; was the file written by fastppt?")
    _check_shape(path + SINGULAR_VALUES, trained, values.shape)
    difference = (values - trained.to(values)).abs().amax()
    if not difference <= SAME_WEIGHTS * values.amax():
        raise UserError(
            f"{path}: has other singular values than the weight that was trained. Load the model "
            f"that the run trained, from the same files, in their own precision or {base_dtype}"
        )
