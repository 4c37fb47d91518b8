"""Runs that repeat bit for bit on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUBLAS_KEY, CUBLAS_VALUE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""What cuBLAS asks for (its documentation, section "Results reproducibility"): 8 buffers of 4 MiB
a stream."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch take only algorithms that give the same bits every time, while inside.

    Args:
        wanted: False does nothing.

    Raises:
        RuntimeError: inside, by an operator that has no such algorithm; it is named.
    """
    if not wanted:
        yield
        return
    import torch._inductor.config as inductor

    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        inductor.deterministic,
        os.environ.get(CUBLAS_KEY),
    )
    try:
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory that it has not written, and filling it takes time.
        memory.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        # Of ways to sum up, it takes the one that it measures to be fastest: another each time.
        inductor.deterministic = True
        os.environ.setdefault(CUBLAS_KEY, CUBLAS_VALUE)
        yield
    finally:
        enabled, warn_only, fill, benchmark, cudnn, compiler, workspace = before
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cudnn.deterministic = cudnn
        inductor.deterministic = compiler
        if workspace is None:
            os.environ.pop(CUBLAS_KEY, None)
