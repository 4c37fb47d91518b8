"""What a run notes of the machine that it runs on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from fastppt import __version__
from fastppt.training import identity


def test_a_checkout_that_is_not_installed_knows_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name.startswith("fastppt"):
            raise PackageNotFoundError(name)
        return f"that of {name}"

    monkeypatch.setattr(identity, "version", version)
    machine = identity.describe_machine(torch.device("cpu"))
    assert machine["fastppt"] == __version__
    assert (machine["torch"], machine["device"]) == ("that of torch", "cpu")
