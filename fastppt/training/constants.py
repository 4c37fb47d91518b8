"""What a captured step holds for good, and the check that it is still so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import getitem
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastppt.errors import UserError
from fastppt.training.step import Step
from fastppt_kernels import AnchoredAdamW

# Replays from one look at all weights of the modules to the next: a look at 1700 of them, a
# full-size UNet's, took 3 ms of a host thread.
MODULES_EVERY = 10

Reader = Callable[[], object]
"""Returns what stands at one place now."""

# Options of a parameter group that are read when it is made, and those noted by parameter.
NOT_OPTIONS = ("params", "lora_pairs", "working_copy")


# What a captured kernel knows of a tensor. A plain tuple, for it is made of every tensor before
# every replay, and a named one takes four times as long to make.
TensorFacts = tuple[torch.Size, torch.dtype, torch.device, int]
FACTS = ("shape", "dtype", "device", "address")


class Constants:
    """Values that a captured function has built in, noted when this is made.

    Args:
        readers: By name, what returns the value now. Of a tensor its shape, dtype, device and
            address are noted, never what it holds.
        modules: By name, modules whose parameters and buffers are noted too, and looked at only
            each `MODULES_EVERY` checks.
    """

    def __init__(
        self, readers: Mapping[str, Reader], modules: Mapping[str, nn.Module] | None = None
    ) -> None:
        self._noted = [(name, read, _note(read())) for name, read in readers.items()]
        self._modules = modules or {}
        self._weights = list(self._all_weights())
        self._checks = 0

    def check(self) -> None:
        """Compare what stands there now with what was noted.

        Raises:
            UserError: one differs; it is named, with what it was and what it is.
        """
        for name, read, noted in self._noted:
            if (now := _note(read())) != noted:
                raise UserError(_describe_change(name, noted, now))
        self._checks += 1
        if self._checks % MODULES_EVERY == 0:
            self._check_modules()

    def _check_modules(self) -> None:
        now = dict(self._all_weights())
        for name, noted in self._weights:
            if now.get(name) != noted:
                raise UserError(_describe_change(name, noted, now.get(name)))

    def _all_weights(self) -> Iterator[tuple[str, TensorFacts]]:
        for name, module in self._modules.items():
            for path, tensor in (*module.named_parameters(), *module.named_buffers()):
                yield f"{name}.{path}", _facts(tensor)


def constants_of(step: Step) -> Constants:
    """Return what a capture of the step builds in: tensors' places, settings, the network."""
    readers = dict(_readers("", step)) | _optimizer_readers(step.optimizer)
    network = step.family.network
    clips = step.family.text.clips if step.prompts.live is not None else {}
    for name, module in {"network": network, **clips}.items():
        readers[f"{name}.training"] = partial(getattr, module, "training")
    return Constants(readers, {type(network).__name__: network, **clips})


def _readers(prefix: str, owner: object) -> Iterator[tuple[str, Reader]]:
    """Yield a reader of each public tensor and setting in our own objects, however deep.

    What is private to an object is its own affair, and what the family is made of lies in the
    network.
    """
    for name, value in vars(owner).items():
        if name.startswith("_") or name == "family":
            continue
        if value is None or isinstance(value, Tensor | bool | int | float | str):
            yield f"{prefix}{name}", partial(getattr, owner, name)
        elif isinstance(value, dict):
            for key, one in value.items():
                if _is_ours(one):
                    yield from _readers(f"{prefix}{name}.{key}.", one)
                else:
                    yield f"{prefix}{name}.{key}", partial(getitem, value, key)
        elif _is_ours(value):
            yield from _readers(f"{prefix}{name}.", value)


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith("fastppt.")


def _optimizer_readers(optimizer: AnchoredAdamW) -> dict[str, Reader]:
    """Return readers of the optimizer's options, parameters, gradients and state."""
    readers: dict[str, Reader] = {
        "optimizer.max_grad_norm": partial(getattr, optimizer, "max_grad_norm")
    }
    for number, group in enumerate(optimizer.param_groups):
        place = f"optimizer.param_groups.{number}"
        for key in group.keys() - set(NOT_OPTIONS):
            readers[f"{place}.{key}"] = partial(getitem, group, key)
        for index, param in enumerate(group["params"]):
            readers[f"{place}.params.{index}"] = partial(getitem, group["params"], index)
            readers[f"{place}.params.{index}.grad"] = partial(getattr, param, "grad")
            for key in optimizer.state[param]:
                reader = partial(getitem, optimizer.state[param], key)
                readers[f"{place}.params.{index}.{key}"] = reader
            if "working_copy" in group:
                reader = partial(getitem, group["working_copy"], index)
                readers[f"{place}.params.{index}.working_copy"] = reader
    return readers


def _facts(tensor: Tensor) -> TensorFacts:
    return tensor.shape, tensor.dtype, tensor.device, tensor.data_ptr()


def _note(value: object) -> object:
    return _facts(value) if isinstance(value, Tensor) else value


def _describe_change(name: str, noted: object, now: object) -> str:
    what, was, become = name, noted, now
    if _are_facts(noted) and _are_facts(now):
        fact, was, become = next(
            (fact, was, become)
            for fact, was, become in zip(FACTS, noted, now, strict=True)
            if was != become
        )
        what = f"the {fact} of {name}"
    return (
        f"engine graph: {what} was {_in_words(was)} when the step was captured and is "
        f"{_in_words(become)} now, which the captured step would not see; leave it as it was, or "
        "pass --engine eager"
    )


def _are_facts(value: Any) -> TypeGuard[TensorFacts]:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], torch.Size)


def _in_words(value: Any) -> str:
    if _are_facts(value):
        return f"a tensor of shape {tuple(value[0])}"
    if isinstance(value, torch.Size):
        return str(tuple(value))
    return str(value)
