"""Whether a process can go on with its GPU after something has failed on it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# More than any block that torch's allocator keeps for small tensors.
PROBE_BYTES = 1 << 26


def free_memory(device: str) -> None:
    """Give back what nothing holds."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def is_spoiled(device: str) -> bool:
    """Say whether nothing that this process still does on the device can be trusted.

    Two things spoil a GPU for a process. After an access out of bounds all calls of CUDA fail. And
    after a capture that failed torch believes that it goes on, and so never hands memory back: what
    is measured after it runs out of memory. Both last until the process ends.
    """
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        free_memory(device)
        held = torch.cuda.memory_reserved()
        # Larger than all that is kept together, so that it is asked of CUDA.
        num_bytes = held - torch.cuda.memory_allocated() + PROBE_BYTES
        probe = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        del probe
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() > held
    # torch's errors of CUDA, of its allocator and of too little memory are all of this kind.
    except RuntimeError:
        return True


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect garbage now and not in the block: to free a graph there would end a capture.

    The trainer's own is not taken: the ops are measured without the trainer.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
