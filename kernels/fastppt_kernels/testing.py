"""Help for tests of code that must not wait for the device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_HOST_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class ForbidHostReads(TorchDispatchMode):
    """A context in which reading a tensor's value on the host raises.

    On a GPU such a read synchronises, and a captured graph refuses it. The CPU hides it; this mode
    sees ``.item()``, ``bool(tensor)``, ``float(tensor)`` and ``nonzero`` there too.

    Raises:
        AssertionError: At the read.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` unless it reads on the host."""
        assert func not in _HOST_READS, f"{func} reads a tensor's value on the host"
        return func(*args, **(kwargs or {}))
