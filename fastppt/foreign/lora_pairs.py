"""The LoRA pairs of a foreign network, as the effective form of the anchor takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastppt.foreign.adapters import forward_adapters, own_projections
from fastppt.foreign.wrappers import unwrap
from fastppt.trainables.joint_lora import JointLora

Pair = tuple[Tensor, Tensor, float]


def lora_pairs(network: nn.Module) -> list[Pair]:
    """Return the LoRA pairs that a network trains, for `AnchoredAdamW`.

    What a pair adds to its layer's weight is ``scale * up @ down``; of a convolution, to the weight
    with its input channels and kernel in one dimension. Given to a group of parameters as
    ``lora_pairs`` with ``form="effective"``, they hold what the network sees of the adapters.

    Args:
        network: A UNet, transformer or text encoder, as it is or wrapped, with adapters of peft
            (of `add_adapter`, `get_peft_model` or `load_lora_weights`), sd-scripts, OneTrainer,
            LyCORIS or fastppt. Of peft's, those that are active and require a gradient.

    Returns:
        (down, up, scale) in the order of the network's modules: down [rank, in] and up [out, rank],
        the trained tensors themselves or views of them, and what multiplies their product.

    Raises:
        ValueError: the network trains no LoRA, or an adapter is more than a pair; it is named.
    """
    pairs: list[Pair] = []
    for name, module in unwrap(network).named_modules():
        if hasattr(module, "_disable_adapters"):
            pairs += _peft_pairs(name, module)
        for adapter in forward_adapters(module):
            if _is_trained(adapter):
                pairs.append(_pair_of_module(name, adapter))
        pairs += _own_pairs(name, module)
    if not pairs:
        raise ValueError(
            "network: trains no LoRA; add adapters that require gradients first, or use "
            'AnchoredAdamW(form="raw")'
        )
    return pairs


def _peft_pairs(name: str, layer: Any) -> Iterator[Pair]:
    """Yield the trained pairs of a layer of peft's."""
    for adapter in layer.active_adapters:
        parts = {
            path: parameter
            for path, parameter in layer.named_parameters()
            if adapter in path.split(".") and parameter.requires_grad
        }
        if not parts:
            continue
        down, up = f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"
        _refuse_more(name, type(layer), parts, down, up)
        yield _matrix(name, parts[down]), _matrix(name, parts[up]), float(layer.scaling[adapter])


def _is_trained(adapter: Any) -> bool:
    """Say whether an adapter that put its `forward` on a layer is not frozen."""
    if not isinstance(adapter, nn.Module):
        return True
    return any(parameter.requires_grad for parameter in adapter.parameters())


def _pair_of_module(name: str, adapter: Any) -> Pair:
    """Return the pair of an adapter that put its `forward` on a layer."""
    parts = dict(adapter.named_parameters()) if isinstance(adapter, nn.Module) else {}
    down, up = "lora_down.weight", "lora_up.weight"
    _refuse_more(name, type(adapter), parts, down, up)
    # sd-scripts and LyCORIS have the ratio, OneTrainer its parts.
    scale = adapter.scale if hasattr(adapter, "scale") else adapter.alpha / adapter.rank
    scale = float(scale) * float(getattr(adapter, "multiplier", 1.0))
    return _matrix(name, parts[down]), _matrix(name, parts[up]), scale


def _own_pairs(name: str, module: nn.Module) -> Iterator[Pair]:
    """Yield the pairs of an attention with our processor."""
    for group in own_projections(module):
        adapter = group.adapter
        if isinstance(adapter, JointLora):
            if not (adapter.down.requires_grad or adapter.up.requires_grad):
                continue
            ups = adapter.up.detach().unbind()
            downs = adapter.down.detach().split(ups[0].shape[1])
            yield from ((down, up, adapter.scale) for down, up in zip(downs, ups, strict=True))
        elif adapter is not None:
            _refuse_more(name, type(adapter), {}, "lora_down", "lora_up")


def _refuse_more(name: str, kind: type, parts: dict[str, nn.Parameter], down: str, up: str) -> None:
    """Refuse an adapter that adds anything but the product of two matrices."""
    if parts.keys() != {down, up}:
        other = [path for path in parts if path not in (down, up)] or ["no pair of matrices"]
        raise ValueError(
            f"{name}: its adapter, a {kind.__name__}, has {', '.join(other)}, and the effective "
            'form is that of plain LoRA; anchor it by AnchoredAdamW(form="raw")'
        )


def _matrix(name: str, parameter: nn.Parameter) -> Tensor:
    """Return a trained tensor with all but its first dimension in one, in its own memory."""
    if parameter.dim() == 2:
        return parameter
    if not parameter.is_contiguous():
        raise ValueError(
            f"{name}: its adapter's weight {tuple(parameter.shape)} has strides "
            f"{parameter.stride()}, and the effective form reads it as a matrix; make it "
            "contiguous, not channels_last, before the optimizer is built"
        )
    return parameter.detach().flatten(1)
