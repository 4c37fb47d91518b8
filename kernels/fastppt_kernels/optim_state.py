"""What an optimizer's state holds, and how a saved one is checked and taken over."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.anchored_adamw.plain import is_dense, wide_dtype


def make_state(param: Tensor, anchor: Tensor | None) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step."""
    dtype = wide_dtype(param.dtype)
    # The kernels walk a parameter and its moments as one stretch of memory.
    order = torch.preserve_format if is_dense(param) else torch.contiguous_format
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=dtype, requires_grad=False, memory_format=order),
        "exp_avg_sq": torch.zeros_like(
            param, dtype=dtype, requires_grad=False, memory_format=order
        ),
    }
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
        for number in saved["params"]:
            state = state_dict["state"].get(number, {})
            missing = {"step", "exp_avg", "exp_avg_sq"} - state.keys()
            if saved["anchor"] == "start":
                missing |= {"anchor"} - state.keys()
            if missing:
                raise ValueError(
                    f"{where}: the state of parameter {number} lacks {', '.join(sorted(missing))}"
                )


def write_over(old: object, new: Tensor, device: torch.device) -> Tensor:
    """Return a copy of ``new``, in the memory of ``old`` if that is a tensor of its kind."""
    if isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (
        new.shape,
        new.dtype,
        device,
    ):
        with torch.no_grad():
            return old.copy_(new)
    return new.detach().to(device, copy=True)
