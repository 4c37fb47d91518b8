"""What an optimizer's state holds, and how a saved one is checked and taken over."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.anchored_adamw.batch import wide_dtype
from fastppt_kernels.anchored_adamw.eight_bit import make_codes
from fastppt_kernels.anchored_adamw.plain import is_dense

MOMENTS = ("exp_avg", "exp_avg_sq")


def scale_name(moment: str) -> str:
    """Return what the state calls the scales of a moment in 8 bits."""
    return f"{moment}_scale"


def make_state(param: Tensor, anchor: Tensor | None, moments: str) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step.

    Args:
        param: Gives shape, device and dtype.
        anchor: Kept with it, if there is one.
        moments: "fp32", or "8bit": a moment is then its codes, with its scales beside it.
    """
    # The kernels walk a parameter and its moments as one stretch of memory.
    order = torch.preserve_format if is_dense(param) else torch.contiguous_format
    state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    for name in MOMENTS:
        if moments == "8bit":
            state[name], state[scale_name(name)] = make_codes(param, order)
        else:
            state[name] = torch.zeros_like(
                param, dtype=wide_dtype(param.dtype), requires_grad=False, memory_format=order
            )
    if anchor is not None:
        state["anchor"] = anchor
    return state


def describes(moment: Tensor, param: Tensor, moments: str) -> bool:
    """Say whether a moment is of the shape and the dtype that the parameter's is kept in."""
    dtype = torch.uint8 if moments == "8bit" else wide_dtype(param.dtype)
    return (moment.shape, moment.dtype) == (param.shape, dtype)


def check_saved(groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raise ValueError if the state_dict is not one for these groups, with the anchors it names."""
    saved_groups, states = state_dict["param_groups"], state_dict["state"]
    for index, saved in enumerate(saved_groups):
        if "anchor" not in saved:
            names = sorted({str(name) for state in states.values() for name in state})
            raise ValueError(
                f"param_groups[{index}]: the state_dict names no anchor, so it is not that of an "
                f"AnchoredAdamW (its state holds {', '.join(names) or 'nothing'}); its moments are "
                "not taken over: resume without the optimizer's state, or with the optimizer that "
                "saved it"
            )
    sizes = [[len(group["params"]) for group in each] for each in (saved_groups, groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"param_groups: the state_dict has groups of {sizes[0]} parameters, this optimizer of "
            f"{sizes[1]}; it is that of another network: load the state that was saved with this "
            "one, or resume without the optimizer's state"
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_saved_group(f"param_groups[{index}]", group, saved, states)


def _check_saved_group(
    where: str, group: dict[str, Any], saved: dict[str, Any], states: dict[Any, dict[str, Any]]
) -> None:
    if saved["form"] == "effective" and "lora_pairs" not in group:
        raise ValueError(
            f'{where}: the saved form is "effective" and this group has no lora_pairs; '
            "make the optimizer with the form and the pairs that it was saved with"
        )
    if saved["moments"] != group["moments"]:
        raise ValueError(
            f"{where}: the saved moments are {saved['moments']} and those of this group "
            f'{group["moments"]}; make the optimizer with moments="{saved["moments"]}"'
        )
    wanted = {"step", *MOMENTS}
    if saved["moments"] == "8bit":
        wanted |= {*map(scale_name, MOMENTS)}
    if saved["anchor"] == "start":
        wanted |= {"anchor"}
    for param, number in zip(group["params"], saved["params"], strict=True):
        if saved["anchor"] == "first_step" and number not in states:
            continue
        state = states.get(number, {})
        missing = wanted - state.keys()
        if missing:
            raise ValueError(
                f"{where}: the state of parameter {number} lacks {', '.join(sorted(missing))}; "
                "load the state as state_dict() gave it, or resume without the optimizer's state"
            )
        shapes = {name: tuple(state[name].shape) for name in (*MOMENTS, "anchor") if name in state}
        for name, shape in shapes.items():
            if shape != tuple(param.shape):
                raise ValueError(
                    f"{where}: {name} of parameter {number} has shape {shape}, the parameter "
                    f"{tuple(param.shape)}; it is the state of another network: load the one that "
                    "was saved with this one, or resume without the optimizer's state"
                )
        if not describes(state["exp_avg"], param, saved["moments"]):
            raise ValueError(
                f"{where}: exp_avg of parameter {number} is {state['exp_avg'].dtype} and the "
                f"parameter {param.dtype}; cast the network to what it was saved as"
            )


def take_over(
    held: Mapping[str, Tensor], values: Mapping[str, Tensor], param: Tensor, group: dict[str, Any]
) -> dict[str, Tensor]:
    """Return a parameter's state with copies of ``values``, in the memory of ``held`` if they fit.

    Args:
        held: The state that there is; written.
        values: The state to copy.
        param: Where it is, the copies are to be, but for anchors that the group has on the host.
        group: That of the parameter.
    """
    on_host = {"anchor"} if group["anchor_storage"] == "host" else set()
    return {
        name: write_over(held.get(name), value, param.device, host=name in on_host)
        for name, value in values.items()
    }


def keep_places(group: dict[str, Any], old: dict[str, Any]) -> None:
    """Write loaded options that are tensors where those of the group before are."""
    for name in ("lr", "anchor_weight"):
        held, value = old[name], group[name]
        if isinstance(value, Tensor):
            device = held.device if isinstance(held, Tensor) else value.device
            group[name] = write_over(held, value, device)


def write_over(old: object, new: Tensor, device: torch.device, *, host: bool = False) -> Tensor:
    """Return a copy of ``new``, in the memory of ``old`` if that is a tensor of its kind.

    Args:
        old: What is there.
        new: Not written.
        device: Where the copy belongs, or in host memory for it.
        host: See ``device``.
    """
    place = torch.device("cpu") if host else device
    if isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (
        new.shape,
        new.dtype,
        place,
    ):
        with torch.no_grad():
            return old.copy_(new)
    return copy_to_host(new, device) if host else new.detach().to(device, copy=True)


def copy_to_host(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a contiguous copy in host memory, pinned if ``device`` is to read it as a GPU."""
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")
    with torch.no_grad():
        return copied.copy_(tensor)
