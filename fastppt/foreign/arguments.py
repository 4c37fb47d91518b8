"""What a captured step is called with: tensors that are copied in, constants that must stay."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

# Built into a capture as they are, and compared with `==`.
CONSTANTS = bool | int | float | str | torch.dtype | torch.device | None

Values = inspect.BoundArguments
"""The arguments of one call, by the names of the function's parameters."""


class Arguments:
    """Checks that every call of a function is like the first.

    Args:
        function: Its arguments are tensors and constants (None, bool, int, float, str, dtype,
            device), by position or name, alone or in tuples, lists and dicts.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self._signature = inspect.signature(function)
        self._first: dict[str, object] | None = None

    def take(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
    ) -> Values:
        """Return the arguments of a call, which are like those of the first.

        Args:
            args: By position.
            kwargs: By name.
            device: Where the function is captured; tensors of other devices are refused unless
                it is the CPU, where nothing is captured.

        Raises:
            TypeError: The function does not take them.
            ValueError: One that is neither tensor nor constant, or is not what the first call's
                was; it is named.
        """
        values = self._signature.bind(*args, **kwargs)
        facts = {}
        for name, value in _leaves(values).items():
            _check_kind(name, value, device)
            facts[name] = _facts(value)
        if self._first is None:
            self._first = facts
        elif facts != self._first:
            raise ValueError(_describe_difference(self._first, facts))
        return values


def fixed_copies(values: Values) -> Values:
    """Return arguments whose tensors are copies, to stay where they are."""
    return _with_tensors(values, lambda tensor: torch.empty_like(tensor).copy_(tensor))


def copy_into(fixed: Values, values: Values) -> None:
    """Write the tensors of a call into those of `fixed_copies`."""
    places = _leaves(fixed)
    for name, value in _leaves(values).items():
        if isinstance(value, Tensor):
            places[name].copy_(value, non_blocking=True)


def write_counts(values: Values) -> dict[str, int]:
    """Return how often each tensor has been written in place, by name, as far as that is known."""
    tensors = {n: v for n, v in _leaves(values).items() if isinstance(v, Tensor)}
    return {name: each._version for name, each in tensors.items() if not each.is_inference()}


def check_unwritten(values: Values, counts: Mapping[str, int]) -> None:
    """Raise ValueError if a tensor has been written since `write_counts`."""
    for name, count in write_counts(values).items():
        if count != counts[name]:
            raise ValueError(
                f"{name}: the step writes into it, but works on a copy once it is captured; let it "
                "return the new values, or hold the tensor itself and name it in `state`"
            )


def check_outputs(outputs: object) -> None:
    """Raise ValueError unless what a function has returned is tensors and None, however nested."""
    for path, value in tree_flatten_with_path(outputs)[0]:
        if not isinstance(value, Tensor | None):
            raise ValueError(
                f"step: returned a {type(value).__name__} at output{keystr(path)}, want tensors "
                "alone: any other value would be the same after every replay"
            )


def _leaves(values: Values) -> dict[str, Any]:
    """Return what the arguments are made of, by names such as ``batch['latents'][0]``."""
    leaves = tree_flatten_with_path(dict(values.arguments))[0]
    return {f"{path[0].key}{keystr(path[1:])}": value for path, value in leaves}  # type: ignore[attr-defined]


def _with_tensors(values: Values, change: Callable[[Tensor], Tensor]) -> Values:
    changed = tree_map_only(Tensor, change, dict(values.arguments))
    return inspect.BoundArguments(values.signature, changed)


def _facts(value: object) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    # Or 1 would be True and 1.0.
    return type(value), value


def _check_kind(name: str, value: object, device: torch.device) -> None:
    if not isinstance(value, Tensor | CONSTANTS):
        raise ValueError(
            f"{name}: got a {type(value).__name__}, want a tensor or a constant (None, bool, int, "
            "float, str, dtype, device), alone or in tuples, lists and dicts. What is always the "
            "same object belongs in the step itself"
        )
    if not isinstance(value, Tensor):
        return
    if value.requires_grad:
        raise ValueError(
            f"{name}: requires a gradient, which would end at the copy that the step works on; "
            f"pass {name}.detach(), and what is trained as part of `state`"
        )
    if device.type != "cpu" and value.device != device:
        raise ValueError(
            f"{name}: is on {value.device}, want {device}, where the step is captured; move it "
            f"before the call: {name}.to({str(device)!r}, non_blocking=True)"
        )


def _describe_difference(first: Mapping[str, object], now: Mapping[str, object]) -> str:
    if first.keys() != now.keys():
        names = ", ".join(sorted(first.keys() ^ now.keys()))
        return (
            f"arguments: {names} is in the first call or in this one and not in both; a captured "
            "step takes the same arguments at every call: make one CapturedStep for each kind"
        )
    name = next(name for name in first if first[name] != now[name])
    return (
        f"{name}: was {_in_words(first[name])} at the first call and is {_in_words(now[name])} "
        f"now; {_mend(first[name])}"
    )


def _in_words(facts: Any) -> str:
    if len(facts) == 3:
        shape, dtype, device = facts
        return f"a {dtype} tensor of shape {tuple(shape)} on {device}"
    return repr(facts[1])


def _mend(facts: Any) -> str:
    if len(facts) == 3:
        return (
            "a captured step takes tensors of one kind: drop a last smaller batch, or make one "
            "CapturedStep for each shape"
        )
    return (
        "a captured step has built the constant in: pass a 0-dim tensor for what changes, or make "
        "one CapturedStep for each value"
    )
