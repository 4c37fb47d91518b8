"""Help for tests of code that must not wait for the device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_HOST_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    # torch.tensor(value): a copy from pageable host memory, which synchronises.
    torch.ops.aten.lift_fresh.default,
)


class ForbidHostReads(TorchDispatchMode):
    """A context in which reading a tensor's value on the host raises.

    On a GPU such a read synchronises, and a captured graph refuses it. The CPU hides it; this mode
    sees there too: ``.item()``, ``bool(tensor)``, ``float(tensor)``, ``nonzero``, ``torch.equal``,
    ``unique``, selection by a mask, and new tensors from Python values. It cannot see ``tolist``,
    ``numpy`` and ``cpu`` of a CPU tensor: those take ``torch.cuda.set_sync_debug_mode("error")``.

    Raises:
        AssertionError: At the read.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` unless it reads on the host."""
        assert func not in _HOST_READS, f"{func} reads a tensor's value on the host"
        if func is torch.ops.aten.index.Tensor:
            by_mask = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not by_mask, f"{func} by a mask reads the number of its elements on the host"
        return func(*args, **(kwargs or {}))
