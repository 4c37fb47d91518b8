"""A step of another trainer, captured once in a CUDA graph and replayed at every call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastppt.foreign.arguments import (
    Arguments,
    Values,
    check_outputs,
    check_unwritten,
    copy_into,
    fixed_copies,
    write_counts,
)
from fastppt.foreign.held import HeldState
from fastppt.training.graph import MOST_TRY_OUTS, CudaRecorder, Recorder, why_not_capture


class CapturedStep:
    """Runs somebody's step function as one launch, with what a CUDA graph is blind to checked.

    ``captured = CapturedStep(step, state=(network, optimizer))``, then ``loss = captured(batch)``
    instead of ``loss = step(batch)``. The step holds what belongs together: forward pass, loss,
    backward pass, ``optimizer.step()`` and ``zero_grad()``; learning-rate schedulers and logging
    stay outside. It must read nothing on the host: no ``.item()``, no ``print`` or ``if`` of a
    tensor's value.

    The first calls are ordinary steps, on the stream of the capture: they are part of the training,
    so nothing has to be put back after them. The call after them is captured, which computes
    nothing, and replayed, as all later ones are. A captured step is the plain one bit for bit,
    where that repeats itself. Each call looks first whether anything that was built in has changed.

    On the CPU every call runs the step plainly, with the same checks of arguments, options and
    gradients, so that a program that was tried there meets its errors there. That the step reads
    nothing on the host, and that optimizers keep nothing there, shows on a GPU alone.

    What a replay does not do again: whatever Python does in the step (counters, branches, Python's
    and numpy's own random numbers, lists that are appended to). A step with and one without a base
    pass are two CapturedSteps.

    Accumulated gradients: all passes of an optimizer step belong into the step function, which
    calls `step()` of every optimizer in `state` each time.

    Zeroing gradients: at the end of the step or at its beginning, inside, either way for
    ``torch.optim.AdamW(..., capturable=True)``; with ``set_to_none=False`` for `AnchoredAdamW`,
    which wants gradients that stay in place.

    Args:
        step: Takes tensors and constants (None, bool, int, float, str, dtype, device), by position
            or name, alone or in tuples, lists and dicts. Tensors are copied to fixed places, so
            what the step writes into them does not come out; constants are built in, and every call
            must give the same. Returns tensors, however nested, or None.
        state: The modules (networks, `OverfittingIndicator`), optimizers (accelerate's too) and
            tensors that it works on, all on one device: they are checked.
        generators: Those that it draws from, beside the default one, on that device.
        warmup: Ordinary steps before the capture, at least 1; more are taken as long as
            torch.compile still compiles.
        clone_outputs: Return copies. Without, a replay returns the same tensors each time, and
            overwrites them: read them before the next call.
        share_memory_with: Another captured step that never runs at the same time, and draws from
            the same generators: both keep what lies between their operations in one memory.

    Raises:
        ValueError: State of another kind or on several devices, a gradient scaler, accelerate's
            accumulation of gradients, a DistributedDataParallel network, a warmup below 1.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        state: Sequence[object],
        generators: Sequence[torch.Generator] = (),
        warmup: int = 3,
        clone_outputs: bool = True,
        share_memory_with: CapturedStep | None = None,
    ) -> None:
        if warmup < 1:
            raise ValueError(
                f"warmup: got {warmup}, want at least 1: the first step makes kernels and moments"
            )
        self._step = step
        self._state = HeldState(state)
        self._generators = tuple(generators)
        if share_memory_with is not None and share_memory_with._generators != self._generators:
            raise ValueError(
                "generators: are others than those of share_memory_with; give both the same"
            )
        self._warmup = warmup
        self._clone_outputs = clone_outputs
        self._sharer = share_memory_with
        self._arguments = Arguments(step)
        self._recorder: Recorder | None = None
        self._is_held = False
        self._replay: Callable[[], None] | None = None
        self._fixed: Values | None = None
        self._outputs: Any = None
        self._device: torch.device | None = None
        self._num_calls = self._num_compiled = 0

    @property
    def is_captured(self) -> bool:
        """Say whether calls are replays: never on the CPU."""
        return self._replay is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step.

        Args:
            *args: Of the step, by position.
            **kwargs: Of the step, by name.

        Returns:
            What the step returns, detached.

        Raises:
            ValueError: An argument that is not as in the first call, or something that the capture
                has built in and that has changed since; it is named. The step cannot be captured;
                with the reason.
        """
        if self._device is None:
            self._device = self._prepare()
        _check_autocast(self._device)
        values = self._arguments.take(args, kwargs, self._device)
        self._num_calls += 1
        if self._is_held:
            self._state.check()
            return self._run(values) if self._replay is None else self._run_replay(values)
        if self._wants_warmup():
            return self._run_aside(values)
        return self._hold(values, self._device)

    def _prepare(self) -> torch.device:
        """Make what captures, where that is possible; returns the device of the state."""
        device = self._state.device
        owner = self
        while owner._sharer is not None:
            owner = owner._sharer
        if owner._recorder is None:
            owner._recorder = make_recorder(device, self._generators)
        self._recorder = owner._recorder
        if self._recorder is not None:
            self._state.check_capturable(device)
        return device

    def _wants_warmup(self) -> bool:
        """Say whether this call is an ordinary step before the capture."""
        before, self._num_compiled = self._num_compiled, _count_compiled()
        if self._num_calls <= self._warmup:
            return True
        if self._num_compiled == before:
            return False
        if self._num_calls > self._warmup + MOST_TRY_OUTS:
            raise ValueError(
                f"CapturedStep: code is still compiled anew in step {self._num_calls - 1}, so it "
                "cannot be captured; leave torch.compile out, or fix what changes from step to step"
            )
        return True

    def _hold(self, values: Values, device: torch.device) -> Any:
        """Run the step once more, or capture it; from now on it is held to what it was then."""
        with self._state.held(device):
            fixed = values if self._recorder is None else fixed_copies(values)
            written = write_counts(fixed)
            if self._recorder is None:
                outputs = self._run(fixed)
            else:
                outputs, replay = self._record(fixed, self._recorder)
            check_unwritten(fixed, written)
        self._is_held = True
        if self._recorder is None:
            return outputs
        self._fixed, self._outputs, self._replay = fixed, outputs, replay
        replay()
        return self._handed_out()

    def _run_aside(self, values: Values) -> Any:
        """Take an ordinary step, where it is going to be captured."""
        if self._recorder is None:
            return self._run(values)
        with self._recorder.aside():
            outputs = self._run(values)
        # What was made on that stream is not to be used on another after it is freed.
        return tree_map_only(Tensor, Tensor.clone, outputs)

    def _run_replay(self, values: Values) -> Any:
        assert self._fixed is not None and self._replay is not None
        copy_into(self._fixed, values)
        self._replay()
        self._state.leave_gradients()
        return self._handed_out()

    def _record(self, fixed: Values, recorder: Recorder) -> tuple[Any, Callable[[], None]]:
        """Capture the step on these tensors; returns its outputs and the replay."""
        outputs: list[Any] = []
        try:
            replay = recorder.record(lambda: outputs.append(self._run(fixed)))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The end of a failed capture fails too, and says less.
            reason = str(error.__context__ or error).splitlines()[0]
            raise ValueError(
                f"CapturedStep: the step cannot be captured ({reason}). It must read nothing on "
                "the host (.item(), float(), print or `if` of a tensor, .to('cpu'), new tensors "
                "from numbers), and draw from the default generator and `generators` alone. Mend "
                "it and start anew: this process may not capture again"
            ) from error
        return outputs[-1], replay

    def _run(self, values: Values) -> Any:
        outputs = self._step(*values.args, **values.kwargs)
        check_outputs(outputs)
        return tree_map_only(Tensor, Tensor.detach, outputs)

    def _handed_out(self) -> Any:
        if not self._clone_outputs:
            return self._outputs
        return tree_map_only(Tensor, Tensor.clone, self._outputs)


def make_recorder(device: torch.device, generators: Sequence[torch.Generator]) -> Recorder | None:
    """Return what captures on a device; None where nothing does, and steps run plainly.

    Args:
        device: Of the step.
        generators: Those that it draws from.

    Raises:
        ValueError: A GPU that cannot capture as torch is set up; a generator of another device.
    """
    if device.type != "cuda":
        return None
    reason = why_not_capture(device)
    if reason is not None:
        raise ValueError(f"CapturedStep: {reason}, or call the step without CapturedStep")
    for index, generator in enumerate(generators):
        place = generator.device
        if place.type != device.type or place.index not in (None, device.index):
            raise ValueError(
                f"generators[{index}]: is on {place}, want {device}: "
                f"torch.Generator({str(device)!r})"
            )
    return CudaRecorder(device, generators)


def _check_autocast(device: torch.device) -> None:
    """Refuse a cache of cast weights that outlives the step: replays would not fill it anew."""
    if torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled():
        raise ValueError(
            "CapturedStep: is called inside of torch.autocast, which keeps casts of the weights "
            "from step to step; enter it inside of the step, or with cache_enabled=False"
        )


def _count_compiled() -> int:
    """Return how many pieces of Python code torch.compile has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
