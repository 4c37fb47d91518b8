"""Finds the adapters of a foreign network, and takes them out of a base pass.

Whoever made them, taking them out is one entry of one object's dictionary: peft's layers have a
flag, sd-scripts, OneTrainer and LyCORIS put another `forward` on a layer, ours share a switch, and
where there are base weights they are put in the parameters' places. Nothing is copied, launched or
multiplied by zero, so a base pass is bit for bit that of the network without adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain, repeat
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastppt.families.attention import AdaptableAttention, Projections
from fastppt.families.joint_attention import JointAttention

ORIGINAL_FORWARDS = ("org_forward", "orig_forward")
"""What adapters that put their own `forward` on a layer call the layer's: those of sd-scripts and
LyCORIS, and those of OneTrainer."""
HARMLESS = ("_original_forward", "_diffusers_hook")
"""Attributes beside a layer's exchanged `forward` that say who exchanged it: accelerate's mixed
precision, and diffusers' hooks (offloading, casting)."""


class Switch(NamedTuple):
    """An entry of a dictionary that differs in a base pass.

    Attributes:
        entries: Of a module, or of an object that a module reads.
        key: Which entry.
        off: Its value in a base pass.
    """

    entries: dict[str, Any]
    key: str
    off: Any


@contextmanager
def switched_off(switches: Sequence[Switch]) -> Iterator[None]:
    """Run the passes inside without the adapters."""
    before = [switch.entries[switch.key] for switch in switches]
    for switch in switches:
        switch.entries[switch.key] = switch.off
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.entries[switch.key] = value


def base_pass_of(
    network: nn.Module, base_weights: Mapping[str, Tensor] | None
) -> Callable[[], AbstractContextManager[None]]:
    """Return what makes a pass a base pass.

    Args:
        network: With its adapters.
        base_weights: Base values of parameters that train themselves, by path; None for none.

    Raises:
        ValueError: there is nothing to switch off, or something that cannot be; it is named.
    """
    switches = find_switches(network) + _weight_switches(network, base_weights or {})
    if not switches:
        raise ValueError(
            "network: has no adapters, so its base pass would be its tuned pass; attach after "
            "adding them. If its own weights train, pass base_weights={path: tensor}; if its "
            "adapters are of an unknown kind, pass switch=, which returns a context manager that "
            "takes them out"
        )
    _refuse_other_trained(network, {*(base_weights or {})})
    return partial(switched_off, switches)


class BasePasses:
    """Makes base passes of a network whose adapters may change between them.

    The search of `base_pass_of` walks over all modules, some hundred milliseconds for thousands of
    them; so it is done again only after something that it looks at was exchanged.

    Args:
        network: As of `base_pass_of`.
        base_weights: Likewise.

    Raises:
        ValueError: as `base_pass_of`; so does a call.
    """

    def __init__(self, network: nn.Module, base_weights: Mapping[str, Tensor] | None) -> None:
        self._network, self._base_weights = network, base_weights
        # At the first pass again: what moves, casts or freezes a network comes in between.
        base_pass_of(network, base_weights)
        self._found: Found | None = None

    def __call__(self) -> AbstractContextManager[None]:
        """Return what takes the adapters out of the passes inside, those added since included."""
        if self._found is None or not self._found.is_as_it_was():
            self._found = None
            base_pass = base_pass_of(self._network, self._base_weights)
            self._found = Found(self._network, base_pass)
        return self._found.base_pass()


class Found:
    """A search's result, and what of the network it depends on.

    Modules are not walked over to see whether that changed: as long as all that were there have
    the children they had, there are no others.
    """

    def __init__(
        self, network: nn.Module, base_pass: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.base_pass = base_pass
        modules = [*network.modules()]
        self._children = [module._modules for module in modules]
        self._entries = [vars(module) for module in modules]
        self._attentions = [each for each in self._entries if "processor" in each]
        self._merged = [e["merged_adapters"] for e in self._entries if "merged_adapters" in e]
        self._groups = [vars(group) for module in modules for group in own_projections(module)]
        self._before = self._look()

    def is_as_it_was(self) -> bool:
        """Say whether a search would find the same."""
        now = self._look()
        return len(now) == len(self._before) and all(map(is_, now, self._before))

    def _look(self) -> list[Any]:
        return [
            *chain.from_iterable(map(dict.values, self._children)),
            *map(dict.get, self._entries, repeat("forward")),
            *map(dict.get, self._entries, repeat("_old_forward")),
            *map(dict.get, self._attentions, repeat("processor")),
            *map(dict.get, self._groups, repeat("adapter")),
            *map(bool, self._merged),
        ]


def find_switches(network: nn.Module) -> list[Switch]:
    """Return what takes all adapters out of a base pass; empty where there are none.

    Raises:
        ValueError: an adapter is merged into its layer, has no flag of its own to be switched off
            by, or a layer's `forward` is someone's who is not known here.
    """
    switches: list[Switch] = []
    seen: set[int] = set()
    for name, module in network.named_modules():
        if is_peft_layer(module):
            _refuse_merged(name, module)
            _refuse_flagless(name, module)
            switches.append(Switch(vars(module), "_disable_adapters", True))
        forward = _forward_switch(name, module)
        if forward is not None:
            switches.append(forward)
        for group in own_projections(module):
            if group.adapter is not None and id(group.adapter.switch) not in seen:
                seen.add(id(group.adapter.switch))
                switches.append(Switch(vars(group.adapter.switch), "enabled", False))
    return switches


def is_peft_layer(module: nn.Module) -> bool:
    """Say whether a module is a layer of peft's with adapters, or a copy that it trains."""
    return hasattr(module, "_disable_adapters")


def own_projections(module: nn.Module) -> tuple[Projections, ...]:
    """Return the projections of an attention that has our processor; else none."""
    processor = getattr(module, "processor", None)
    return processor.groups if isinstance(processor, AdaptableAttention | JointAttention) else ()


def forward_adapters(module: nn.Module) -> list[Any]:
    """Return the adapters that put their `forward` on a layer, the outermost first."""
    adapters = []
    forward: Any = vars(module).get(_forward_slot(module))
    while (original := _original_forward(forward)) is not None:
        if _is_adapter(forward.__self__):
            adapters.append(forward.__self__)
        forward = original
    return adapters


def _forward_slot(module: nn.Module) -> str:
    """Return the attribute that a layer's `forward` is in: below accelerate's hooks, if any."""
    is_hooked = "_old_forward" in vars(module) and isinstance(vars(module).get("forward"), partial)
    return "_old_forward" if is_hooked else "forward"


def _original_forward(forward: Any) -> Any:
    """Return what an adapter's `forward` stands for; None of a `forward` that is no adapter's."""
    adapter = getattr(forward, "__self__", None)
    originals = (getattr(adapter, name, None) for name in ORIGINAL_FORWARDS)
    return next((original for original in originals if original is not None), None)


def _is_adapter(owner: Any) -> bool:
    """Say whether what put its `forward` on a module adds something of its own.

    OneTrainer's checkpointing of blocks, by a module without parameters, does not.
    """
    return not isinstance(owner, nn.Module) or any(True for _ in owner.parameters())


def _forward_switch(name: str, module: nn.Module) -> Switch | None:
    slot = _forward_slot(module)
    forward = vars(module).get(slot)
    if forward is None:
        return None
    innermost, owners = forward, []
    while (original := _original_forward(innermost)) is not None:
        owners.append(innermost.__self__)
        innermost = original
    if not (_is_own(innermost, module) or _is_harmless(innermost, module)):
        raise ValueError(
            f"{name or 'network'}: its forward is {innermost!r}, of an unknown kind of adapter; "
            "pass switch=, which returns a context manager that takes adapters out of the passes "
            "inside"
        )
    others = [owner for owner in owners if not _is_adapter(owner)]
    if len(others) == len(owners):
        return None
    if others:
        raise ValueError(
            f"{name}: its forward is that of an adapter and that of a {type(others[0]).__name__}, "
            "which a base pass would leave out; pass switch=, which returns a context manager that "
            "takes adapters out of the passes inside"
        )
    return Switch(vars(module), slot, innermost)


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Say whether a `forward` is that of the module's class, bound to the module."""
    is_bound = getattr(forward, "__self__", None) is module
    return is_bound and getattr(forward, "__func__", None) is type(module).forward


def _is_harmless(forward: Any, module: nn.Module) -> bool:
    """Say whether accelerate or diffusers put a `forward` there, which holds no adapter."""
    entries = vars(module)
    if any(name in entries for name in HARMLESS):
        return True
    # A hook of accelerate's below an adapter's forward.
    return isinstance(forward, partial) and "_old_forward" in entries


def _refuse_merged(name: str, module: nn.Module) -> None:
    merged = getattr(module, "merged_adapters", ())
    if merged:
        raise ValueError(
            f"{name}: adapter {merged[0]!r} is merged into its weight, where it cannot be switched "
            "off; call unmerge_adapter() or unfuse_lora() before fastppt.attach()"
        )


def _refuse_flagless(name: str, module: nn.Module) -> None:
    """Refuse kinds of peft's whose layers have their flag from their class."""
    if "_disable_adapters" not in vars(module):
        raise ValueError(
            f"{name}: its adapter is a {type(module).__name__}, which is not known here; pass "
            "switch=, which returns a context manager that takes adapters out of the passes "
            "inside, such as the disable_adapter of peft's model"
        )


def _weight_switches(network: nn.Module, base_weights: Mapping[str, Tensor]) -> list[Switch]:
    parameters = dict(network.named_parameters())
    switches = []
    for name, tensor in base_weights.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"base_weights: {name!r} is no parameter of the network; take the names of "
                "network.named_parameters()"
            )
        kinds = [(tuple(each.shape), each.dtype, each.device) for each in (tensor, parameter)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"base_weights: {name!r} is {kinds[0]}, want {kinds[1]} (shape, dtype, device), "
                "as the parameter is"
            )
        path, _, leaf = name.rpartition(".")
        holder: dict[str, Any] = network.get_submodule(path)._parameters
        switches.append(Switch(holder, leaf, nn.Parameter(tensor.detach(), requires_grad=False)))
    return switches


def _refuse_other_trained(network: nn.Module, exchanged: set[str]) -> None:
    """Refuse parameters that train and stay as they are in a base pass."""
    of_adapters: set[nn.Parameter] = set()
    for module in network.modules():
        if is_peft_layer(module):
            base = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
            of_base = set() if base is None else set(base.parameters())
            of_adapters |= set(module.parameters()) - of_base
    others = [
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and parameter not in of_adapters and name not in exchanged
    ]
    if others:
        raise ValueError(
            f"{others[0]} and {len(others) - 1} other parameters train and are part of no adapter, "
            "so a base pass would not be the base's; freeze them by requires_grad_(False), or pass "
            "base_weights={path: tensor} with their base values, or switch="
        )
