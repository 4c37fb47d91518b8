"""Capturing a function once and replaying it: CUDA graphs, with what they are blind to checked.

A replay costs one launch, however many kernels the function launches. In return the function must
read nothing on the host, and whatever it read from Python when it was captured is built in.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from fastppt.errors import UserError
from fastppt.training.constants import Constants
from fastppt.training.snapshot import Snapshot

# The first try-out makes kernels and what the optimizer keeps on the device; the second shows that
# nothing is left to make.
TRY_OUTS = 2
# A function whose code is still compiled anew after so many never stops.
MOST_TRY_OUTS = 16

# Environment variables, of CUDA and of ROCm, that make torch allocate each tensor by itself.
NO_MEMORY_CACHE = ("PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_NO_HIP_MEMORY_CACHING")

Function = Callable[[], object]
"""Works on tensors at fixed addresses; takes and returns nothing."""


class Recorder(Protocol):
    """Who records functions, so that they can be replayed."""

    generators: Sequence[torch.Generator]
    """Those that the functions draw from. A replay goes on where the last draw ended."""

    def aside(self) -> AbstractContextManager[None]:
        """Return a context for try-out runs: where `record` will run the function."""

    def record(self, function: Function) -> Callable[[], None]:
        """Run a function, whatever that does to the values of tensors; return its replay."""


class CudaRecorder:
    """Records CUDA graphs, all of them in one memory pool.

    A graph's temporary tensors may lie where those of another are, so a recorded function must not
    read what another left behind in tensors of its own making.

    Args:
        device: Where the functions run.
        generators: Those that they draw from, beside the device's default one.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators
        self._device = device
        # Try-outs and captures share a stream: cuBLAS keeps a workspace for each stream, and
        # autograd accumulates a gradient on the stream that its parameter was first used on.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run what is inside on the stream of the captures, after and before all on the current."""
        with torch.cuda.device(self._device):
            home = torch.cuda.current_stream()
            self._stream.wait_stream(home)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                home.wait_stream(self._stream)

    def record(self, function: Function) -> Callable[[], None]:
        """Capture a function in a CUDA graph; nothing is computed.

        Raises:
            RuntimeError: it reads on the host, or does something else that cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # Other threads (TensorBoard's, a data loader's) may go on with what they do.
        mode = "thread_local"
        with (
            torch.cuda.device(self._device),
            # A capture that fails leaves its own stream the current one.
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            _without_collection(),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode),
        ):
            function()
        return graph.replay


class CapturedFunction:
    """A function that is captured once and replayed at every call.

    Before the capture it is tried out, on the stream of the capture, until nothing is compiled any
    more. Try-outs and capture leave the tensors and generators they write as they were.

    Args:
        function: Works on tensors at fixed addresses and reads nothing on the host.
        recorder: Who captures it.
        written: Returns the tensors that it writes in a try-out or a capture, and that outlive it.
        constants: Returns what a capture of it builds in.
        before_each: Called before each try-out and before the capture, where these are to write
            less than a replay. What it writes is `written` too.

    Attributes:
        replay: Runs it again without a check; None until it is captured.
    """

    def __init__(
        self,
        function: Function,
        recorder: Recorder,
        *,
        written: Callable[[], Iterable[Tensor]],
        constants: Callable[[], Constants],
        before_each: Callable[[], None] = lambda: None,
    ) -> None:
        self.replay: Callable[[], None] | None = None
        self._function = function
        self._before_each = before_each
        self._recorder = recorder
        self._written = written
        self._find_constants = constants

    def capture(self) -> None:
        """Capture the function, unless it is captured already.

        Raises:
            UserError: it cannot be captured; with the reason.
        """
        if self.replay is not None:
            return
        snapshot = Snapshot(self._written(), self._recorder.generators)
        try:
            with self._recorder.aside():
                self._try_out()
            self._constants = self._find_constants()
            self.replay = self._record()
        finally:
            snapshot.restore()

    def __call__(self) -> None:
        """Replay the function, captured first where it is not yet.

        Raises:
            UserError: something that the capture built in has changed since; it is named.
        """
        self.capture()
        assert self.replay is not None
        self._constants.check()
        self.replay()

    def _try_out(self) -> None:
        for number in range(1, MOST_TRY_OUTS + 1):
            compiled = _count_compiled()
            self._before_each()
            self._function()
            if number >= TRY_OUTS and _count_compiled() == compiled:
                return
        raise UserError(
            f"engine graph+compile: code is still compiled anew in step {MOST_TRY_OUTS}, so the "
            "step cannot be captured; pass --engine graph"
        )

    def _record(self) -> Callable[[], None]:
        self._before_each()
        try:
            return self._recorder.record(self._function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The end of a failed capture fails too, and says less.
            reason = str(error.__context__ or error).splitlines()[0]
            raise UserError(
                f"engine graph: the step cannot be captured ({reason}); pass --engine eager"
            ) from error


def why_not_capture(device: torch.device) -> str | None:
    """Return why CUDA graphs cannot be captured on a device; None if nothing is known against it.

    None is captured to find out: one that fails leaves torch's memory cache unable to go on.
    """
    if device.type != "cuda":
        return "captures CUDA graphs, which need a GPU"
    for name in NO_MEMORY_CACHE:
        if name in os.environ:
            return f"needs torch's memory cache: unset {name}"
    return None


def _count_compiled() -> int:
    """Return how many pieces of Python code torch.compile has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@contextmanager
def _without_collection() -> Iterator[None]:
    """Collect garbage now and not in the block: to free a graph there would end the capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
