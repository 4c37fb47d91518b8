"""What an optimizer's state holds, and how a saved one is checked and taken over."""

from collections.abc import Sequence
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


def check_saved(groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raise ValueError if the state_dict's anchors are not those that its groups speak of."""
    for index, saved in enumerate(state_dict["param_groups"]):
        where = f"param_groups[{index}]"
        if "anchor" not in saved:
            raise ValueError(
                f"{where}: the state_dict names no anchor, so it is not that of an AnchoredAdamW"
            )
        if (
            index < len(groups)
            and saved["form"] == "effective"
            and "lora_pairs" not in groups[index]
        ):
            raise ValueError(
                f'{where}: the saved form is "effective" and this group has no lora_pairs; '
                "make the optimizer with the form and the pairs that it was saved with"
            )
        if index < len(groups) and saved["moments"] != groups[index]["moments"]:
            raise ValueError(
                f"{where}: the saved moments are {saved['moments']} and those of this group "
                f'{groups[index]["moments"]}; make the optimizer with moments="{saved["moments"]}"'
            )
        for number in saved["params"]:
            state = state_dict["state"].get(number, {})
            missing = {"step", *MOMENTS} - state.keys()
            if saved["moments"] == "8bit":
                missing |= {*map(scale_name, MOMENTS)} - state.keys()
            if saved["anchor"] == "start":
                missing |= {"anchor"} - state.keys()
            if missing:
                raise ValueError(
                    f"{where}: the state of parameter {number} lacks {', '.join(sorted(missing))}"
                )


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
