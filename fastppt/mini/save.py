"""How weights that the package brings along are written."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CLIPTokenizer

from fastppt.families.checkpoints import without_bars
from fastppt.mini.tokenizer import mini_tokenizer

MOST_BYTES = 8_000_000
"""Of the safetensors files of a model, together: the package stays a small download."""


def save_weights(pipeline: Any, folder: Path) -> None:
    """Write a pipeline as a diffusers folder of float16 safetensors.

    The files are the same, byte for byte, for the same weights and the same libraries, wherever the
    pipeline came from and whatever it was used for. Loaded and saved again, they are the same.

    Args:
        pipeline: A mini SDXL of any floating dtype, on any device. Not written.
        folder: Where to; what is there already is replaced, once the new folder is whole.

    Raises:
        ValueError: the weights take more than `MOST_BYTES`; the folder is left as it was.
    """
    parts = copy.deepcopy(pipeline.components)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            # The module's own, for diffusers' warns of what it does not do.
            nn.Module.half(part.cpu())
        elif isinstance(part, CLIPTokenizer):
            # A new one: a tokenizer that was used saves how it padded last.
            parts[name] = mini_tokenizer(part.pad_token)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with without_bars():
            type(pipeline)(**parts).save_pretrained(aside)
        _tidy(aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Leave nothing in the files that depends on the machine, and check their size."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        # The folder that a part was loaded from.
        content.pop("_name_or_path", None)
        compact = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        file.write_text(compact + "\n", encoding="utf-8")
    weights = list(folder.rglob("*.safetensors"))
    for file in weights:
        # safetensors writes files that nobody else can read.
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in weights)
    if size > MOST_BYTES:
        raise ValueError(f"weights take {size:,} bytes in float16, which is over {MOST_BYTES:,}")
