"""State for the parameters as a step finds them, where trainers changed them since they were given.

Moved ones take their state along; those that took another's place get a new one, unless an anchor
was kept; what a new state would not mend is refused.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from fastppt_kernels.optim_groups import NARROW, check_options, refuse_capture, resolve_anchor
from fastppt_kernels.optim_sharded import check_sharded
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
    # Who moves or casts a network moves all of it; who replaces a parameter loses its state.
    if not all(map(state.get, params)) or not fits(params[0], state, groups[number]):
        settle(number, groups, state)
    return [state[param] for param in params]


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
