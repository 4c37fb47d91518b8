"""What runs leave on disk, compared bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from fastppt.training import loop
from fastppt.training.result import RunResult


def contents(root: Path) -> dict[str, object]:
    """All that a run has computed: every file but those that hold a time or the folder's name."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if not path.is_file() or name.startswith("tensorboard/"):
            continue
        if path.suffix == ".safetensors":
            # Some of them say in their metadata when they were made.
            tensors = load_file(path)
            bits = {key: tensors[key].flatten().view(torch.uint8) for key in sorted(tensors)}
            found[name] = {key: value.numpy().tobytes() for key, value in bits.items()}
        elif path.name not in {"README.md", "config.toml", "manifest.json"}:
            found[name] = path.read_bytes()
    return found


def resume(path: Path, **settings: object) -> RunResult | None:
    keys = [(key.replace("__", "."), value) for key, value in settings.items()]
    return loop.resume(path, keys, Console(quiet=True))


def resume_copy(root: Path, step: int | None, copy: Path, **settings: object) -> Path:
    """Go on with a copy of a run, from a checkpoint of its or the newest; returns the copy."""
    shutil.copytree(root, copy)
    place = copy if step is None else copy / "checkpoints" / f"step-{step:06d}"
    assert resume(place, **settings) is not None
    return copy
