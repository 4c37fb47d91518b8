"""What a group of :class:`AnchoredAdamW` may be given, and what it keeps of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastppt_kernels.anchored_adamw.plain import is_dense
from fastppt_kernels.lora_pairs import Pair, Pairs, Place, locate_pairs
from fastppt_kernels.optim_sharded import is_sharded, run_several_processes
from fastppt_kernels.optim_state import copy_to_host

FORMS = ("raw", "effective", "decoupled")
ANCHORS = ("start", "first_step", "zero")
# What the other options in words may be.
CHOICES = {
    "form": FORMS,
    "anchor_storage": ("device", "host"),
    "moments": ("fp32", "8bit"),
    "rounding": ("nearest", "stochastic"),
}
NARROW = (torch.bfloat16, torch.float16)
# The key of a group that says whether the parameters were compared with the anchors taken of them.
COMPARED = "start_compared"
# Seeds of random bits, as a kernel takes them; larger ones wrap.
NUM_SEEDS = 2**31


def is_off(weight: float | Tensor) -> bool:
    """Say whether the weight is the float 0; a tensor may change, so it is never off."""
    return not isinstance(weight, Tensor) and weight == 0


def share_out(params: ParamsT, anchor: Sequence[Tensor | None]) -> list[dict[str, Any]]:
    """Return the groups, each with its part of the list of anchors."""
    entries: list[Any] = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    groups = [dict(group) for group in groups]
    start = 0
    for group in groups:
        given = group["params"]
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
        end = start + len(group["params"])
        group.setdefault("anchor", list(anchor[start:end]))
        start = end
    if start != len(anchor):
        raise ValueError(
            f"anchor: got {len(anchor)} entries, want {start}, one for each parameter of all groups"
        )
    return groups


def check_limit(max_grad_norm: float | None) -> None:
    """Raise ValueError unless the limit of the norm is one."""
    is_number = isinstance(max_grad_norm, float | int) and not isinstance(max_grad_norm, bool)
    if max_grad_norm is not None and not (is_number and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm: got {max_grad_norm!r}, want a number > 0, or None")


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError for an option out of its range, or of another type (a text, say)."""
    for name in ("lr", "eps", "weight_decay", "anchor_weight"):
        value = group[name]
        if not isinstance(value, Tensor) and not (isinstance(value, float | int) and value >= 0):
            raise ValueError(f"{name}: got {value!r}, want a number >= 0")
        if isinstance(value, Tensor) and (name in ("eps", "weight_decay") or value.dim() != 0):
            wanted = "a float" if name in ("eps", "weight_decay") else "a float or a 0-dim tensor"
            raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, want {wanted}")
    betas = group["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(f"betas: got {betas!r}, want two numbers, (0.9, 0.999) say")
    for index, beta in enumerate(betas):
        if not (isinstance(beta, float | int) and 0 <= beta < 1):
            raise ValueError(f"betas[{index}]: got {beta!r}, want a number in [0, 1)")
    for name, choices in CHOICES.items():
        if group[name] not in choices:
            raise ValueError(f'{name}: got "{group[name]}", want one of {", ".join(choices)}')
    if group["form"] == "effective" and group["anchor_storage"] == "host":
        raise ValueError(
            'anchor_storage "host" is for the forms raw and decoupled; the effective form reads '
            'its few anchors in products: leave them on the "device"'
        )
    seed = group["seed"]
    if not (isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0):
        raise ValueError(f"seed: got {seed!r}, want an integer >= 0")
    _check_params(group)


def _check_params(group: dict[str, Any]) -> None:
    params = group["params"]
    for index, param in enumerate(params):
        if not param.dtype.is_floating_point:
            raise ValueError(f"params[{index}]: got dtype {param.dtype}, want a floating-point one")
        if param.device != params[0].device:
            raise ValueError(
                f"params[{index}]: is on {param.device}, params[0] on {params[0].device}; "
                "put each device's parameters in a group of their own"
            )
        if not param.is_contiguous() and not is_off(group["anchor_weight"]):
            raise ValueError(
                f"params[{index}]: got strides {param.stride()} for shape {tuple(param.shape)}, "
                f"want a contiguous parameter where anchor_weight is not 0"
            )
        if group["rounding"] == "stochastic" and (param.dtype not in NARROW or not is_dense(param)):
            raise ValueError(
                f"params[{index}]: got dtype {param.dtype} and strides {param.stride()}, want "
                'bfloat16 or float16 and a contiguous one where rounding is "stochastic"'
            )
        if group["moments"] == "8bit" and (param.dtype == torch.float64 or not is_dense(param)):
            raise ValueError(
                f"params[{index}]: got dtype {param.dtype} and strides {param.stride()}, want "
                'float32, bfloat16 or float16 and a contiguous one where moments are "8bit"'
            )


def resolve_pairs(group: dict[str, Any], pairs: Any) -> Pairs | None:
    """Return the places of the group's LoRA pairs, None for a form without pairs."""
    if group["form"] == "effective":
        if pairs is None:
            raise ValueError(
                'form "effective": the group has no lora_pairs; '
                "pass lora_pairs=[(down, up, scale), ...] in the group"
            )
        return locate_pairs(group["params"], pairs)
    if pairs is not None:
        raise ValueError(
            f'lora_pairs: the group\'s form is "{group["form"]}"; want "effective", or no pairs'
        )
    return None


def resolve_copies(
    group: dict[str, Any], copies: Tensor | Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return one working copy, or None, for each parameter."""
    if group["rounding"] == "stochastic":
        raise ValueError(
            "working_copy: the parameters are rounded at random, which keeps no wider values; "
            'leave the copy out, or set rounding to "nearest"'
        )
    params: Sequence[Tensor] = group["params"]
    given: list[Tensor | None] = [copies] if isinstance(copies, Tensor) else [*copies]
    if len(given) != len(params):
        raise ValueError(
            f"working_copy: got {len(given)} tensors, want {len(params)}, one for each parameter"
        )
    for index, (param, copy) in enumerate(zip(params, given, strict=True)):
        if copy is None:
            continue
        wanted = (param.shape, param.stride(), param.device)
        if (
            (copy.shape, copy.stride(), copy.device) != wanted
            or not copy.dtype.is_floating_point
            or copy.requires_grad
        ):
            raise ValueError(
                f"working_copy[{index}]: got shape {tuple(copy.shape)}, strides {copy.stride()}, "
                f"{copy.dtype}, {copy.device}, requires_grad={copy.requires_grad}; want "
                f"{tuple(param.shape)}, {param.stride()}, a floating-point dtype, {param.device} "
                f"and no gradient, as params[{index}]"
            )
    return given


def resolve_anchor(
    group: dict[str, Any], anchor: str | Sequence[Tensor | None], share: bool
) -> tuple[str, list[Tensor | None]]:
    """Return the kind of anchor that the state_dict names, and the group's anchors.

    These are copies, or with ``share`` the tensors of the list themselves. Of copies, what is zero
    is not kept, nor is what only pairs with B0 A0 = 0 would read. The kinds: "start" keeps a tensor
    for each parameter, "list" for some, "zero" for none, and "none" means that the weight was 0, so
    that nothing was kept. "first_step" is yet to become one of the others. Where copies of the
    parameters are kept, the group is marked: they are yet to be compared, see `COMPARED`.
    """
    params = group["params"]
    nothing: list[Tensor | None] = [None] * len(params)
    if isinstance(anchor, str) and anchor not in ANCHORS:
        raise ValueError(f'anchor: got "{anchor}", want one of {", ".join(ANCHORS)}, or a list')
    if not isinstance(anchor, str):
        _check_anchors(params, anchor)
    if share:
        shared = _check_shared(group, anchor)
    if is_off(group["anchor_weight"]):
        return "none", nothing
    if share:
        return "list", shared
    if anchor in ("zero", "first_step"):
        return str(anchor), nothing
    given = dict(enumerate(params if isinstance(anchor, str) else anchor))
    values = {i: value.detach().contiguous() for i, value in given.items() if value is not None}
    read = _indices_read(group, values)
    on_host = group["anchor_storage"] == "host"
    kept = [
        None
        if index not in read
        else copy_to_host(values[index], param.device)
        if on_host
        else values[index].to(param.device, copy=True)
        for index, param in enumerate(params)
    ]
    if not read:
        return "zero", nothing
    if anchor == "start":
        group[COMPARED] = False
    return ("start" if anchor == "start" and len(read) == len(params) else "list"), kept


def _check_anchors(params: Sequence[Tensor], anchors: Sequence[Tensor | None]) -> None:
    if len(anchors) != len(params):
        raise ValueError(
            f"anchor: got {len(anchors)} entries, want {len(params)}, one for each parameter"
        )
    for index, (param, value) in enumerate(zip(params, anchors, strict=True)):
        if value is not None and (value.shape != param.shape or not value.dtype.is_floating_point):
            raise ValueError(
                f"anchor[{index}]: got shape {tuple(value.shape)} and dtype {value.dtype}, want "
                f"{tuple(param.shape)} and a floating-point dtype, as params[{index}]"
            )


def _check_shared(
    group: dict[str, Any], anchor: str | Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the given anchors themselves, or raise unless a step can read them where they are."""
    if isinstance(anchor, str):
        raise ValueError(f'share_anchor: got anchor "{anchor}", want a list of tensors to share')
    on_host = group["anchor_storage"] == "host"
    for index, (param, value) in enumerate(zip(group["params"], anchor, strict=True)):
        if value is None:
            continue
        device = torch.device("cpu") if on_host else param.device
        unpinned = on_host and param.is_cuda and not value.is_pinned()
        if value.device != device or unpinned or not value.is_contiguous():
            wanted = "pinned host memory" if on_host and param.is_cuda else device
            raise ValueError(
                f"anchor[{index}]: is on {value.device}{', not pinned' if unpinned else ''}, with "
                f"strides {value.stride()}; want a contiguous tensor in {wanted} to share, or "
                "share_anchor=False to keep a copy there"
            )
    return [None if value is None else value.detach() for value in anchor]


def _indices_read(group: dict[str, Any], anchors: dict[int, Tensor]) -> set[int]:
    """Return the parameters whose anchors, contiguous, differ from none. Reads on the host."""
    if group["form"] != "effective":
        return {index for index, anchor in anchors.items() if _is_given(anchor)}

    def is_given(place: Place) -> bool:
        return place.param in anchors and _is_given(place.of(anchors))

    pairs: Sequence[Pair] = group["lora_pairs"]
    moved = [pair for pair in pairs if is_given(pair.up) and is_given(pair.down)]
    return {place.param for pair in moved for place in (pair.up, pair.down)}


def _is_given(anchor: Tensor) -> bool:
    """Say whether an anchor is not zero.

    On the meta device nothing is known, and a process knows but its own part of a sharded one.
    """
    return anchor.is_meta or is_sharded(anchor) or bool(anchor.any())


def find_gradients(number: int, group: dict[str, Any]) -> list[int]:
    """Return the indices of the group's parameters that have a gradient.

    Raises:
        ValueError: As ``AnchoredAdamW.step``.
    """
    grads = [p.grad for p in group["params"]]
    for index, grad in enumerate(grads):
        if grad is None:
            if _is_capturing():
                raise ValueError(
                    f"param_groups[{number}], params[{index}]: has no gradient, and a captured "
                    "step would leave it out of every replay; give it one (zeros do), or leave "
                    "the parameter out of the optimizer"
                )
        elif grad.layout != torch.strided:
            raise ValueError(f"params[{index}]: its gradient is sparse, want a dense one")
    return [index for index, grad in enumerate(grads) if grad is not None]


def refuse_capture(where: str) -> None:
    """Raise ValueError if a CUDA graph is being captured: state is not to be made in it."""
    if _is_capturing():
        raise ValueError(
            f"{where}: has no state for its parameters as they are, and a captured step cannot "
            "make it; take a step before the capture"
        )


def wants_comparison(group: dict[str, Any]) -> bool:
    """Say whether this step is to compare the group's parameters with the anchors taken of them.

    Where a process is alone, nobody else gives it values.
    """
    return group.get(COMPARED) is False and run_several_processes() and not _is_capturing()


def _is_capturing() -> bool:
    # A torch without CUDA refuses the question.
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
