"""Operations of torch.library that are called past the dispatcher wherever nothing looks there."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, TypeVarTuple

import torch
from torch import Tensor
from torch.nn import Parameter

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

# Tensors of other classes (fake ones, a user's own) have their own way with operations.
PLAIN_CLASSES = (Tensor, Parameter)


class Operation(Generic[*Arguments, Result]):
    """An operation of torch.library that costs what its function costs.

    What is registered is what torch.compile, fake and meta tensors, dispatch modes and function
    transforms see. Where there are none of these, a call runs the same function and the same
    backward as they are: in Python, the way through the dispatcher takes longer than an operation
    on small tensors does.

    Args:
        name: ``namespace::name``.
        function: Takes tensors, None and numbers, without names; returns new tensors that share no
            memory with one another. It writes none that it is given, and runs below autograd.
    """

    def __init__(self, name: str, function: Callable[[*Arguments], Result]) -> None:
        self._function = function
        self._registered = torch.library.custom_op(name, mutates_args=())(function)

    def register_fake(self, fake: Callable[..., Result]) -> Callable[..., Result]:
        """Say what the results look like; as ``torch.library.register_fake``."""
        self._registered.register_fake(fake)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Say how to differentiate; as ``torch.library.register_autograd``."""
        self._registered.register_autograd(backward, setup_context=setup_context)
        self._differentiable = _make_differentiable(self._function, backward, setup_context)

    def __call__(self, *arguments: *Arguments) -> Result:
        """Compute."""
        if is_looked_at(arguments):
            result: Result = self._registered(*arguments)
        elif torch.is_grad_enabled() and any(
            isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
        ):
            result = self._differentiable.apply(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                result = self._function(*arguments)
        return result


def operation(
    name: str,
) -> Callable[[Callable[[*Arguments], Result]], Operation[*Arguments, Result]]:
    """Make an :class:`Operation` of the function below."""
    return lambda function: Operation(name, function)


def is_looked_at(arguments: tuple[object, ...]) -> bool:
    """Return whether something must see a call with these arguments as one operation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(
            isinstance(given, Tensor) and (type(given) not in PLAIN_CLASSES or given.is_meta)
            for given in arguments
        )
    )


def _make_differentiable(
    function: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> Any:
    """Return what torch.library makes of a function and its backward, without the dispatcher."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = function(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, result)
        return result

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Direct_{function.__name__}", (torch.autograd.Function,), methods)
