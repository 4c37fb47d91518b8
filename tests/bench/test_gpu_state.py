import gc
import subprocess
import sys
import weakref

import pytest
import torch

from bench import ROOT
from bench.gpu_state import PROBE_BYTES, is_spoiled, without_collection

MIB = 1 << 20


class Card:
    """Stands for torch.cuda: tensors of 30 MiB in segments of 40, and what is asked for more."""

    def __init__(self, *, fault=None):
        self.fault, self.reserved = fault, 40 * MIB
        self.asked = []

    def empty(self, num_bytes, *, dtype, device):
        assert (dtype, device) == (torch.uint8, "cuda")
        self.asked.append(num_bytes)
        # Nothing that is kept is large enough.
        self.reserved += num_bytes

    def empty_cache(self):
        if self.fault != "keeps all":
            self.reserved = 40 * MIB

    def synchronize(self):
        if self.fault == "is lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def card(monkeypatch):
    def make(fault=None):
        made = Card(fault=fault)
        monkeypatch.setattr(torch, "empty", made.empty)
        monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
        monkeypatch.setattr(torch.cuda, "empty_cache", made.empty_cache)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: made.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 30 * MIB)
        return made

    return make


def test_a_gpu_that_hands_memory_back_is_not_spoiled(card):
    made = card()
    assert not is_spoiled("cuda")
    assert made.asked == [10 * MIB + PROBE_BYTES]


@pytest.mark.parametrize("fault", ["keeps all", "is lost"])
def test_a_gpu_that_keeps_memory_or_is_lost_is_spoiled(card, fault):
    card(fault)
    assert is_spoiled("cuda")


def test_the_cpu_is_never_spoiled(card):
    card("is lost")
    assert not is_spoiled("cpu")


def test_garbage_is_collected_before_the_block_and_not_in_it():
    class Held:
        pass

    cycle = Held()
    cycle.itself, seen = cycle, weakref.ref(cycle)
    del cycle
    assert gc.isenabled() and seen() is not None
    with without_collection():
        assert not gc.isenabled() and seen() is None
    assert gc.isenabled()


FAULTS = {
    "none": "torch.ones(1 << 20, device='cuda').sum().item()",
    "a capture that failed": """
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            held.item()
    """,
    "an access out of bounds": "held[torch.tensor([7], device='cuda')].sum().item()",
}
SPOIL = """
import torch
from bench.gpu_state import is_spoiled

held = torch.ones(1, device="cuda")
assert not is_spoiled("cuda")
try:
    if True:
        WHAT
except RuntimeError as error:
    print(type(error).__name__)
torch.cuda.set_stream(torch.cuda.default_stream())
print(is_spoiled("cuda"))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("fault", FAULTS)
def test_what_spoils_a_gpu_is_seen(fault):
    """In processes of their own, which is what it is about."""
    code = SPOIL.replace("WHAT", FAULTS[fault].strip())
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(fault != "none")
