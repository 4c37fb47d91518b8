"""What a captured step works on and holds for good, in the hands of another trainer.

A replay runs kernels on addresses and numbers. Whatever Python has changed since the capture it
does not see, so it is looked at before each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import getitem

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastppt.errors import UserError
from fastppt.training.constants import NOT_OPTIONS, Constants, Reader
from fastppt_kernels import AnchoredAdamW

# Names that one message lists.
MOST_LISTED = 3
# How the engine's messages begin and end, where ours say it for another trainer.
ENGINE, ENGINE_MEND = "engine graph: ", "leave it as it was, or pass --engine eager"


class HeldState:
    """The modules, optimizers and tensors that a step works on, and the checks of them.

    Args:
        objects: As of `CapturedStep`.

    Raises:
        ValueError: An object of another kind, or one that cannot be captured; with the mend.
    """

    def __init__(self, objects: Sequence[object]) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.tensors: dict[str, Tensor] = {}
        for index, one in enumerate(objects):
            _refuse_uncapturable(f"state[{index}]", one)
        inner = [_without_wrapper(one) for one in objects]
        for index, one in enumerate(inner):
            kind = type(one).__name__
            alike = sum(type(other) is type(one) for other in inner[:index])
            self._add(f"{kind}_{alike}" if alike else kind, f"state[{index}]", one)
        if not self.optimizers and not self.modules and not self.tensors:
            raise ValueError("state: is empty, want the modules and optimizers of the step")
        self._constants: Constants | None = None
        # Gradients that a replay reads where they were, with their parameters; None: there was
        # none, so that a replay writes a new one instead of adding to it.
        self._gradients: list[tuple[str, Tensor, Tensor | None]] = []
        self._left: list[tuple[Tensor, Tensor | None]] = []
        self._moments: list[tuple[str, Optimizer, Tensor, str, Tensor]] = []

    def _add(self, name: str, place: str, one: object) -> None:
        if isinstance(one, nn.Module):
            self.modules[name] = one
        elif isinstance(one, Optimizer):
            self.optimizers[name] = one
        elif isinstance(one, Tensor):
            self.tensors[name] = one
        else:
            raise ValueError(
                f"{place}: got a {type(one).__name__}, want a torch.nn.Module, a "
                "torch.optim.Optimizer or a tensor. A learning-rate scheduler stays outside of the "
                "step: it is called between steps"
            )

    @property
    def device(self) -> torch.device:
        """Where the step runs.

        Raises:
            ValueError: On more than one device beside the CPU.
        """
        modules = self.modules.values()
        tensors = [t for one in modules for t in (*one.parameters(), *one.buffers())]
        tensors += [param for _, param in self._named_params()] + [*self.tensors.values()]
        devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
        if len(devices) > 1:
            names = " and ".join(sorted(map(str, devices)))
            raise ValueError(f"state: is on {names}, want one device: a step is captured on one")
        return devices.pop() if devices else torch.device("cpu")

    def check_capturable(self, device: torch.device) -> None:
        """Refuse optimizers that keep on the host what a step changes.

        Args:
            device: Where the step is to be captured.

        Raises:
            ValueError: An optimizer that cannot be captured as it is; with the mend.
        """
        for name, optimizer in self.optimizers.items():
            for number, group in enumerate(optimizer.param_groups):
                place = f"{name}.param_groups.{number}"
                if group.get("capturable") is False:
                    raise ValueError(
                        f"{place}: capturable is False, so that the step count is read on the "
                        f"host; make it with {type(optimizer).__name__}(..., capturable=True)"
                    )
                for key in group.keys() - set(NOT_OPTIONS):
                    value = group[key]
                    if isinstance(value, Tensor) and value.device != device:
                        raise ValueError(
                            f"{place}: {key} is on {value.device}, want {device}: a replay would "
                            f"not see it change; give it as torch.tensor(..., device='{device}')"
                        )

    @contextmanager
    def held(self, device: torch.device) -> Iterator[None]:
        """Note in a call of the step what its capture builds in; from then on `check` compares.

        Args:
            device: Where the step runs.

        Raises:
            ValueError: The step does what a replay would not do again; it is named.
        """
        before = [(name, param, param.grad) for name, param in self._trained()]
        at_step: dict[int, Tensor | None] = {}
        stepped: set[Optimizer] = set()
        options = Constants(self._options(device))
        on_host = self._written_on_host(device)
        hooks = [
            optimizer.register_step_pre_hook(partial(self._before_update, at_step, stepped))
            for optimizer in self.optimizers.values()
        ]
        try:
            yield
            self._check_stepped(stepped)
            self._check_in_place(before, at_step)
            _check_options(options, "the step itself changes it, and a replay would not")
            if on_host != self._written_on_host(device):
                raise ValueError(
                    "state: an optimizer keeps its step count in host memory, where a replay "
                    "leaves it; make it with capturable=True, or take another optimizer"
                )
        except BaseException:
            for _, param, grad in before:
                param.grad = grad
            raise
        finally:
            for hook in hooks:
                hook.remove()
        self._gradients = [
            (name, param, grad)
            for name, param, grad in before
            # Others are dropped before they are read.
            if grad is None or param.grad is grad or at_step.get(id(param)) is grad
        ]
        self._left = [(param, param.grad) for _, param, _ in before]
        self._moments = [*self._all_moments()]
        self._constants = Constants(self._options(device), self.modules | self._trained_alone())

    def check(self) -> None:
        """Compare what stands there now with what was noted.

        Gradients and the optimizers' tensors are looked at before every replay, weights of modules
        before each tenth.

        Raises:
            ValueError: One differs; it is named, with the mend.
        """
        if self._constants is None:
            return
        _check_options(
            self._constants,
            "give what changes as a 0-dim tensor, written in place (lr=torch.tensor(1e-4, "
            "device=...); schedulers do so), or make a new CapturedStep",
        )
        for name, param, grad in self._gradients:
            if param.grad is not grad:
                raise ValueError(_describe_gradient(name, grad, param.grad))
        for name, optimizer, param, key, tensor in self._moments:
            if optimizer.state.get(param, {}).get(key) is not tensor:
                raise ValueError(
                    f"{name}: {key} is another tensor than when the step was captured, which a "
                    "replay would not see; was a state loaded? Make a new CapturedStep after it"
                )

    def leave_gradients(self) -> None:
        """Let parameters have the gradients that the captured call left them, as a replay does."""
        for param, grad in self._left:
            if param.grad is not grad:
                param.grad = grad

    def _before_update(
        self,
        at_step: dict[int, Tensor | None],
        stepped: set[Optimizer],
        optimizer: Optimizer,
        *_: object,
    ) -> None:
        """Look at the gradients that an optimizer is about to take, inside of the step."""
        stepped.add(optimizer)
        names = {id(param): name for name, param in self._named_params()}
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        at_step.update({id(param): param.grad for param in params})
        missing = [names[id(param)] for param in params if param.grad is None]
        if missing:
            raise ValueError(
                f"{_listed(missing)}: no gradient when the step was captured, so that no replay "
                "would train it; let it take part in the loss, or leave it out of the optimizer"
            )
        new = [names[id(param)] for param in params if not optimizer.state.get(param)]
        if new and len(new) < len(params):
            raise ValueError(
                f"{_listed(new)}: first trained when the step was captured, so that each replay "
                "would begin its moments anew; capture later, with a larger warmup"
            )

    def _check_stepped(self, stepped: set[Optimizer]) -> None:
        """Refuse optimizers that no replay would step, though earlier calls may have."""
        idle = [name for name, one in self.optimizers.items() if one not in stepped]
        if idle:
            raise ValueError(
                f"{_listed(idle)}: took no step in the call that was captured, so that no replay "
                "would step it; call its step() in every call (gradients are accumulated inside of "
                "the step function), or leave it out of `state`"
            )

    def _check_in_place(
        self,
        before: Sequence[tuple[str, Tensor, Tensor | None]],
        at_step: dict[int, Tensor | None],
    ) -> None:
        """Refuse new gradients at every step where the optimizer knows them by their address."""
        ours = [one for one in self.optimizers.values() if isinstance(one, AnchoredAdamW)]
        params = {id(p) for one in ours for group in one.param_groups for p in group["params"]}
        moved = [
            name
            for name, param, grad in before
            if id(param) in params and id(param) in at_step and at_step[id(param)] is not grad
        ]
        if moved:
            raise ValueError(
                f"{_listed(moved)}: the gradient is a new tensor at each step, and AnchoredAdamW "
                "can be captured with those that stay in place: zero_grad(set_to_none=False)"
            )

    def _named_params(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the optimizers train, by the modules' names where these have it."""
        named = {
            id(param): f"{name}.{path}"
            for name, module in self.modules.items()
            for path, param in module.named_parameters()
        }
        for name, optimizer in self.optimizers.items():
            for number, group in enumerate(optimizer.param_groups):
                for index, param in enumerate(group["params"]):
                    place = f"{name}.param_groups.{number}.params.{index}"
                    yield named.get(id(param), place), param

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter that has gradients, once."""
        params = {id(param): (name, param) for name, param in self._named_params()}
        for name, module in self.modules.items():
            for path, param in module.named_parameters():
                params.setdefault(id(param), (f"{name}.{path}", param))
        yield from (pair for pair in params.values() if pair[1].requires_grad)

    def _options(self, device: torch.device) -> dict[str, Reader]:
        """Return readers of what Python decides a step by."""
        readers: dict[str, Reader] = {
            "torch.is_grad_enabled()": torch.is_grad_enabled,
            "torch.is_autocast_enabled()": partial(torch.is_autocast_enabled, device.type),
        }
        readers |= {n: partial(getitem, self.tensors, n) for n in self.tensors}
        for name, module in self.modules.items():
            readers[f"{name}.training"] = partial(getattr, module, "training")
        for name, optimizer in self.optimizers.items():
            if isinstance(optimizer, AnchoredAdamW):
                readers[f"{name}.max_grad_norm"] = partial(getattr, optimizer, "max_grad_norm")
            for number, group in enumerate(optimizer.param_groups):
                for key in sorted(group.keys() - set(NOT_OPTIONS)):
                    if _is_option(group[key]):
                        place = f"{name}.param_groups.{number}.{key}"
                        readers[place] = partial(getitem, group, key)
        for name, optimizer, param, key in self._state_entries():
            if isinstance(optimizer.state[param][key], bool | int | float):
                readers[f"{name}.{key}"] = partial(getitem, optimizer.state[param], key)
        return readers

    def _state_entries(self) -> Iterator[tuple[str, Optimizer, Tensor, str]]:
        """Yield name of the parameter, optimizer, parameter and key of all that it keeps."""
        names = {id(param): name for name, param in self._named_params()}
        for kind, optimizer in self.optimizers.items():
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                for key in optimizer.state.get(param, ()):
                    yield f"{kind}.state of {names[id(param)]}", optimizer, param, key

    def _all_moments(self) -> Iterator[tuple[str, Optimizer, Tensor, str, Tensor]]:
        for name, optimizer, param, key in self._state_entries():
            value = optimizer.state[param][key]
            if isinstance(value, Tensor):
                yield name, optimizer, param, key, value

    def _trained_alone(self) -> dict[str, nn.Module]:
        """Return by optimizer the parameters that lie in none of the modules."""
        known = {id(param) for module in self.modules.values() for param in module.parameters()}
        return {
            f"{name}.params": nn.ParameterList(
                param
                for group in optimizer.param_groups
                for param in group["params"]
                if isinstance(param, nn.Parameter) and id(param) not in known
            )
            for name, optimizer in self.optimizers.items()
        }

    def _written_on_host(self, device: torch.device) -> list[int]:
        """Return how often each tensor that an optimizer keeps off the device was written."""
        return [t._version for *_, t in self._all_moments() if t.device != device]


def _refuse_uncapturable(place: str, one: object) -> None:
    """Raise ValueError for what has a part in Python that a replay would leave out."""
    if isinstance(one, DistributedDataParallel):
        raise ValueError(
            f"{place}: is a DistributedDataParallel network, whose exchange of gradients has a "
            "Python part that a replay leaves out; call the step without CapturedStep"
        )
    # Accelerate's optimizers hold one.
    scaler = getattr(one, "scaler", None) if isinstance(one, Optimizer) else one
    if isinstance(scaler, GradScaler):
        raise ValueError(
            f"{place}: a gradient scaler reads on the host whether gradients overflowed, which "
            "cannot be captured; train in bfloat16, or float32, without one"
        )
    # So does the number of passes to a step.
    num_passes = getattr(getattr(one, "gradient_state", None), "num_steps", 1)
    if isinstance(one, Optimizer) and num_passes > 1:
        raise ValueError(
            f"{place}: accelerate is to accumulate the gradients of {num_passes} passes a step, "
            "and counts them in Python, which a replay leaves out; put all passes into the step "
            "function, with gradient_accumulation_steps=1"
        )


def _without_wrapper(one: object) -> object:
    """Return the optimizer inside of what accelerate puts around it; anything else as it is."""
    while isinstance(one, Optimizer) and isinstance(getattr(one, "optimizer", None), Optimizer):
        one = one.optimizer  # type: ignore[attr-defined]
    return one


def _is_option(value: object) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return all(isinstance(each, Tensor | bool | int | float | str | None) for each in numbers)


def _check_options(constants: Constants, mend: str) -> None:
    """Check them as the engine does, in words for another trainer."""
    try:
        constants.check()
    except UserError as error:
        change = str(error).removeprefix(ENGINE).removesuffix(ENGINE_MEND)
        raise ValueError(f"{change}{mend}") from None


def _describe_gradient(name: str, noted: Tensor | None, now: Tensor | None) -> str:
    if noted is None:
        return (
            f"{name}: had no gradient when the step was captured and has one now, to which a "
            "replay would not add; zero the gradients inside of the step"
        )
    what = "has none" if now is None else "has another"
    return (
        f"{name}: {what} now than the gradient that the captured step adds to; zero the gradients "
        "inside of the step, or with zero_grad(set_to_none=False)"
    )


def _listed(names: Sequence[str]) -> str:
    """Return the first names with commas between, and how many more there are."""
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
