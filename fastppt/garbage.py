"""What Python's garbage collector need not look at."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_what_there_is() -> Iterator[None]:
    """Let collections inside pass over the objects that there are by now.

    Of a process that has just imported its libraries, these are most of the objects: on a CPU whole
    collections, one in some sixty steps, took 0.03 s instead of 0.2 s. What is garbage by now stays
    until the end, where all is looked at again: for who owns the process.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
