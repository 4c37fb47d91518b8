"""A finished run, small, and the same with adapters that add nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastppt.config_io import build_config
from fastppt.console import SafeConsole
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.training.loop import train


@pytest.fixture(scope="session")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of three steps. Read only: copy it to change it."""
    output = tmp_path_factory.mktemp("evaluated") / "trained"
    config = build_config(
        "lora",
        settings=[
            ("model.path", "mini-sdxl"),
            ("model.device", "cpu"),
            ("photos.folder", str(photos)),
            ("prompts.class_noun", "robot"),
            ("output", str(output)),
            ("samples.enabled", False),
            ("stage.0.steps", 3),
            ("stage.0.trainables.lora.rank", 2),
            ("stage.0.trainables.lora.learning_rate", 1e-2),
        ],
    )
    train(config, SafeConsole(quiet=True), overwrite=False)
    return output


@pytest.fixture(scope="session")
def untrained(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, as if its adapters had not moved from where they start: B is zero."""
    output = tmp_path_factory.mktemp("evaluated") / "untrained"
    shutil.copytree(trained, output)
    file = output / DIFFUSERS_FILE
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    ups = [name for name in tensors if ".lora_B." in name]
    assert len(ups) == len(tensors) // 2
    save_file(tensors | {name: torch.zeros_like(tensors[name]) for name in ups}, file, metadata)
    return output
