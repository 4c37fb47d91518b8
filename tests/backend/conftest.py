"""Tests of loops of others, which leave nothing of accelerate's shared state to one another."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


def _forget() -> None:
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    _forget()
    yield
    _forget()
