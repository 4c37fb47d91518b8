"""State for the parameters as a step finds them, where trainers changed them since they were given.

Moved ones take their state along; those that took another's place get a new one, unless an anchor
was kept; what a new state would not mend is refused. So are values that something changed between
the time when they were kept as anchors and the first step, where several processes train.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.optim_groups import (
    COMPARED,
    NARROW,
    check_options,
    refuse_capture,
    resolve_anchor,
    wants_comparison,
)
from fastppt_kernels.optim_sharded import check_sharded, local_part
from fastppt_kernels.optim_state import describes, make_state, take_over


def fits(param: Tensor, state: Mapping[Tensor, dict[str, Any]], group: dict[str, Any]) -> bool:
    """Say whether a step can work on the parameter with what ``state`` holds for it."""
    held = state.get(param)
    if not held or held["exp_avg"].device != param.device:
        return False
    rounds = group["rounding"] != "stochastic" or param.dtype in NARROW
    return rounds and describes(held["exp_avg"], param, group["moments"])


def states_of(
    number: int,
    params: Sequence[Tensor],
    groups: Sequence[dict[str, Any]],
    state: MutableMapping[Tensor, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return the states of some parameters of a group, at least one, settled if need be."""
    group = groups[number]
    held = [state.get(param) for param in params]
    if not _all_fit(params, held, state, group):
        settle(number, groups, state)
        held = [state[param] for param in params]
    if wants_comparison(group):
        _compare_starts(f"param_groups[{number}]", group, state)
        group[COMPARED] = True
    return held  # type: ignore[return-value]


def _all_fit(
    params: Sequence[Tensor],
    held: Sequence[dict[str, Any] | None],
    state: Mapping[Tensor, dict[str, Any]],
    group: dict[str, Any],
) -> bool:
    """Say whether `fits` holds for all; each step asks, so it is put to one of a kind."""
    moments = [each["exp_avg"] for each in held if each]
    # Who replaces a parameter loses its state.
    if [param.shape for param in params] != [moment.shape for moment in moments]:
        return False
    pairs = zip(params, moments, strict=True)
    # Who moves a network moves all of it.
    kinds = {(param.dtype, moment.dtype): param for param, moment in pairs}
    return all(fits(param, state, group) for param in kinds.values())


def _compare_starts(
    where: str, group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Raise ValueError if a parameter is not its anchor before its first step. Reads on the host.

    An anchor that was not kept, being zero, is not compared.
    """
    changed = []
    for index, param in enumerate(group["params"]):
        held = state.get(param, {})
        if "anchor" in held:
            # A cast after the anchor was kept is no change.
            anchor = local_part(held["anchor"]).to(param.device, param.dtype)
            differs = (local_part(param) != anchor).any() & (local_part(held["step"]) == 0)
            changed.append(differs * (index + 1))
    found = int(torch.stack(changed).max()) if changed else 0
    if found:
        raise ValueError(
            f"{where}, params[{found - 1}]: was changed after the optimizer took its values as the "
            "anchor (DistributedDataParallel gives all processes those of the first), so that this "
            "process would be held at values of its own; make the optimizer after the network is "
            'wrapped and loaded, or give it anchor="first_step"'
        )


def settle_replaced(
    groups: Sequence[dict[str, Any]], state: MutableMapping[Tensor, dict[str, Any]]
) -> None:
    """Settle the groups of which a parameter took another's place."""
    for number, group in enumerate(groups):
        if group["anchor"] != "first_step" and not all(map(state.get, group["params"])):
            settle(number, groups, state)


def settle(
    number: int,
    groups: Sequence[dict[str, Any]],
    state: MutableMapping[Tensor, dict[str, Any]],
) -> None:
    """Bring the state in line with a group's parameters; anchors "first_step" are taken here.

    States of parameters that are in no group any more are dropped. Reads on the host.

    Args:
        number: Of the group.
        groups: All; ``anchor`` of this one is written.
        state: By parameter; written.

    Raises:
        ValueError: A parameter was cast or given another shape, or took the place of one whose
            anchor was kept; a CUDA graph is being captured.
    """
    group = groups[number]
    where = f"param_groups[{number}]"
    refuse_capture(where)
    check_options(group)
    check_sharded(group, None, group.get("working_copy"))
    if group["anchor"] == "first_step":
        group["anchor"], anchors = resolve_anchor(group, "start", share=False)
        for param, anchor in zip(group["params"], anchors, strict=True):
            state[param] = make_state(param, anchor, group["moments"])
        group[COMPARED] = True
    for index, param in enumerate(group["params"]):
        if not fits(param, state, group):
            state[param] = _follow(f"{where}, params[{index}]", param, state, group)
    for param in state.keys() - {param for each in groups for param in each["params"]}:
        del state[param]


def _follow(
    where: str, param: Tensor, state: Mapping[Tensor, dict[str, Any]], group: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the state for a parameter that was moved, or that took another's place."""
    mend = (
        "make the optimizer after the network is loaded, cast, moved and sharded, or give it "
        'anchor="first_step"'
    )
    held = state.get(param)
    if not held:
        if group["anchor"] in ("start", "list"):
            raise ValueError(
                f"{where}: took the place of the parameter that the optimizer was made with "
                f"(fully_shard and accelerate's FSDP2 replace them), whose anchor is lost; {mend}"
            )
        return make_state(param, None, group["moments"])
    moment = held["exp_avg"]
    if not describes(moment, param, group["moments"]):
        raise ValueError(
            f"{where}: is {param.dtype} of shape {tuple(param.shape)}, and its moments are "
            f"{moment.dtype} of shape {tuple(moment.shape)}, so it was changed after the optimizer "
            f"was made; {mend}"
        )
    return take_over({}, held, param, group)
