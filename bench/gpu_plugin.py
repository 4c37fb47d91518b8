"""What `bench.gpu` adds to pytest while it runs the gpu-marked tests: ``-p bench.gpu_plugin``.

The time may be up before the last test, so those that say most come first. A test that spoils the
GPU for its process ends this process, so that the tests after it run in a fresh one: they would all
be red, and none would say why. That takes pytest-xdist; without it the tests end there.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from bench.gpu_state import free_memory, is_spoiled

# Kept bytes beside which another process may be short of memory.
MOST_KEPT_BYTES = 1 << 32
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let those follow that repeat for another case what a test before them shows."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember a failure."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Leave a spoiled GPU, and much memory that a test has left, to a fresh process."""
    done = yield
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    if item.stash.get(FAILED, False) and is_spoiled(device):
        why = f"{item.nodeid} left the GPU unusable for its process"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(why, returncode=1)
        # xdist counts the test as failed, which it has, and starts another worker for the rest.
        os._exit(1)
    if device == "cuda" and torch.cuda.memory_reserved() > MOST_KEPT_BYTES:
        free_memory(device)
    return done
