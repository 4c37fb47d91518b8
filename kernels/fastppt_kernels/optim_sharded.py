"""Parameters of which each process holds a part: DTensors, as FSDP2 makes them.

A step works on the local parts. What it sums over all elements, the penalty and the norm, is summed
over the processes that hold the other parts; over those that hold the same part it is not.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.anchor_penalty import anchor_penalty_
from fastppt_kernels.anchored_adamw import Batch, Launcher, anchored_adamw_
from fastppt_kernels.anchored_adamw.batch import wide_dtype

# What of an option does not go with parts of parameters, and why.
REFUSED = {
    ("form", "effective"): "its products need whole downs and ups",
    ("moments", "8bit"): "its blocks do not end where parts do",
    ("rounding", "stochastic"): "its random bits go by the element's place in the whole",
    ("anchor_storage", "host"): "it streams plain tensors; fully_shard has its own offloading",
}
# The dimensions of device meshes over which the parts of a parameter lie.
Spread = tuple[tuple[Any, int], ...]


def _sharded_types(types: set[type]) -> set[type]:
    # Who has a DTensor has imported its module, which takes a while.
    module = sys.modules.get("torch.distributed.tensor")
    return set() if module is None else {t for t in types if issubclass(t, module.DTensor)}


def is_sharded(tensor: Tensor) -> bool:
    """Say whether the tensor is a DTensor."""
    return bool(_sharded_types({type(tensor)}))


def has_shards(batches: Sequence[Batch]) -> bool:
    """Say whether a parameter is a DTensor."""
    return bool(_sharded_types({type(param) for batch in batches for param in batch.params}))


def run_several_processes() -> bool:
    """Say whether this is one of several processes that torch.distributed knows of."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def check_sharded(group: dict[str, Any], anchor: object, copies: object) -> None:
    """Raise ValueError if the group has sharded parameters with which a step would be wrong.

    Args:
        group: With its options.
        anchor: What the group was given: a list is looked into.
        copies: Its working copies, or None.
    """
    for index, param in enumerate(group["params"]):
        where = f"params[{index}]"
        if getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                f"{where}: is a part of a flat parameter of FullyShardedDataParallel, of which the "
                "whole is not known here; shard with fully_shard (in accelerate fsdp_version: 2)"
            )
        if not is_sharded(param):
            continue
        for (name, value), reason in REFUSED.items():
            if group[name] == value:
                raise ValueError(
                    f'{where}: is a DTensor, and {name} "{value}" is not for those: {reason}; '
                    "take another, or keep the parameter out of the sharding (ignored_params)"
                )
        if copies is not None:
            raise ValueError(f"{where}: is a DTensor, which takes no working_copy; leave it out")
        if any(placement.is_partial() for placement in _placements(param)):
            raise ValueError(f"{where}: its placements are {_placements(param)}, want no Partial")
        given = anchor[index] if isinstance(anchor, list | tuple) else None
        if given is not None and not _lie_alike(given, param):
            raise ValueError(
                f"anchor[{index}]: does not lie as {where}, whose placements are "
                f"{_placements(param)}; pass it through torch.distributed.tensor.distribute_tensor"
            )


def sharded_step_(
    batches: Sequence[Batch],
    max_grad_norm: float | None = None,
    *,
    extra_penalties: Sequence[Tensor] = (),
    skip: Tensor | None = None,
    skip_non_finite: bool = False,
    launcher: Launcher,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the step of :func:`anchored_adamw_` on batches of which some parameters are DTensors.

    All processes of a mesh take it together, with gradients for the same parameters. Parts that
    are offloaded to the CPU are summed there, which NCCL alone cannot: such a run needs
    ``init_process_group("cpu:gloo,cuda:nccl")``.

    Args:
        batches: Their form is "none", "raw" or "decoupled".
        max_grad_norm: As there.
        extra_penalties: As there; of parameters that every process holds.
        skip: As there, and the same on all processes.
        skip_non_finite: As there.
        launcher: As there.

    Returns:
        As there, and the same on all processes.
    """
    first = batches[0].params[0]
    zero = torch.zeros((), dtype=wide_dtype(first.dtype), device=first.device)
    parts = [part for batch in batches for part in _split(batch)]
    sums: dict[Spread, Tensor] = {}
    local = []
    for number, (spread, part) in enumerate(parts):
        widened, penalty = _pull_(number, part, launcher)
        square = anchor_penalty_(widened.grads, [None] * len(widened.grads), None, 1.0)
        both = torch.stack([zero + square.to(first.device), zero + penalty.to(first.device)])
        sums[spread] = sums[spread] + both if spread in sums else both
        local.append(widened)
    for spread, both in sums.items():
        for mesh, dim in spread:
            torch.distributed.all_reduce(both, group=mesh.get_group(dim))
    square, penalty = torch.stack([*sums.values()]).sum(0).unbind()
    grad_norm = square.sqrt()
    if max_grad_norm is not None:
        divisor = ((grad_norm + 1e-6) / max_grad_norm).clamp(min=1.0)
        for part in local:
            torch._foreach_div_(part.grads, divisor.to(part.params[0].device))
    if skip_non_finite:
        bad = ~grad_norm.isfinite()
        skip = bad if skip is None else bad | (skip.to(bad.device) != 0)
    _, _, skipped = anchored_adamw_(local, skip=skip, launcher=launcher)
    for extra in extra_penalties:
        penalty = penalty + extra.to(penalty.device)
    return penalty, grad_norm, skipped


def _pull_(number: int, part: Batch, launcher: Launcher) -> tuple[Batch, Tensor]:
    """Return the part with wide gradients, the pull of form "raw" added, and its penalty."""
    grads = [
        launcher.widen(number, index, grad, wide_dtype(param.dtype))
        for index, (param, grad) in enumerate(zip(part.params, part.grads, strict=True))
    ]
    part = replace(part, grads=grads)
    if part.form == "none":
        return part, torch.zeros(())
    weight = part.anchor_weight
    if isinstance(weight, Tensor):
        weight = weight.to(part.params[0].device)
    if part.form == "raw":
        penalty = anchor_penalty_(part.params, part.anchors, grads, weight)
        return replace(part, form="none"), penalty
    return part, anchor_penalty_(part.params, part.anchors, None, weight)


def _split(batch: Batch) -> list[tuple[Spread, Batch]]:
    """Return the batch in parts that are spread alike, of local tensors."""
    alike: dict[Spread, list[int]] = {}
    for index, (param, grad) in enumerate(zip(batch.params, batch.grads, strict=True)):
        if is_sharded(param) and not _lie_alike(grad, param):
            raise ValueError(
                f"params[{index}]: its gradient does not lie as the parameter does, whose "
                f"placements are {_placements(param)}; redistribute it before step()"
            )
        alike.setdefault(_spread_of(param), []).append(index)
    return [(spread, _pick(batch, indices)) for spread, indices in alike.items()]


def _pick(batch: Batch, indices: Sequence[int]) -> Batch:
    def local(tensors: Sequence[Any]) -> list[Any]:
        return [local_part(tensors[index]) for index in indices]

    return replace(
        batch,
        params=local(batch.params),
        grads=local(batch.grads),
        anchors=local(batch.anchors),
        exp_avgs=local(batch.exp_avgs),
        exp_avg_sqs=local(batch.exp_avg_sqs),
        steps=local(batch.steps),
        copies=local(batch.copies),
        exp_avg_scales=batch.exp_avg_scales and local(batch.exp_avg_scales),
        exp_avg_sq_scales=batch.exp_avg_sq_scales and local(batch.exp_avg_sq_scales),
    )


def local_part(tensor: Any) -> Any:
    """Return this process's part of a DTensor; anything else itself."""
    if tensor is None or not is_sharded(tensor):
        return tensor
    local = tensor.to_local()
    # A gradient may still be on its way.
    return local.wait() if hasattr(local, "wait") else local


def _placements(tensor: Any) -> Any:
    return tensor.placements


def _lie_alike(tensor: Any, param: Any) -> bool:
    return is_sharded(tensor) and (tensor.device_mesh, tensor.placements) == (
        param.device_mesh,
        param.placements,
    )


def _spread_of(param: Any) -> Spread:
    if not is_sharded(param):
        return ()
    return tuple(
        (param.device_mesh, dim)
        for dim, placement in enumerate(param.placements)
        if placement.is_shard()
    )
