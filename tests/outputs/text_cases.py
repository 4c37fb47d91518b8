"""Runs that train text too, for tests: adapters of network and text encoders, and a new word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastppt.config import ModelConfig, RunConfig
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.outputs.lora_files import write_lora_files
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables.trainables import Trainables
from fastppt.trainables_config import LoraConfig

WORD = "<v>"
TEXT_RANK, TEXT_ALPHA = 2, 3.0


def text_settings(name: str, vectors: int = 2) -> dict[str, object]:
    """Settings of a run on a mini model that trains network, text encoders and a word."""
    return {
        "model.path": f"mini-{name}",
        "photos.resolution": 64,
        "prompts.token": WORD,
        "prompts.subject": "{token}",
        "name": "my robot",
        "stage.0.trainables.lora.alpha": 6.0,
        "stage.0.trainables.text_encoder_lora.rank": TEXT_RANK,
        "stage.0.trainables.text_encoder_lora.alpha": TEXT_ALPHA,
        "stage.0.trainables.tokens.vectors": vectors,
    }


def trained_text(name: str, vectors: int = 2) -> tuple[Family, Trainables]:
    """A mini model with adapters and a word of its own, each strong enough to change a picture."""
    family = load_family(ModelConfig(path=f"mini-{name}", device="cpu"))
    device = family.device
    config = LoraConfig(rank=4, alpha=6.0)
    lora = LoraAdapters(family.make_adaptable(), config, seed=0, device=device)
    config = LoraConfig(rank=TEXT_RANK, alpha=TEXT_ALPHA)
    places = family.text.make_adaptable(family.unread_projections)
    text = LoraAdapters(places, config, seed=1, device=device)
    tokens = LearnedTokens(family.text, WORD, vectors=vectors, init="robot", device=device)
    generator = torch.Generator().manual_seed(5)
    for pair in (*lora.pairs, *text.pairs):
        pair.up.copy_(0.2 * torch.randn(pair.up.shape, generator=generator))
    tokens.load(
        {name: torch.randn(rows.shape, generator=generator) for name, rows in tokens.rows.items()}
    )
    return family, Trainables({"lora": lora, "text_encoder_lora": text, "tokens": tokens})


def write_text_run(
    folder: Path,
    make_config: Callable[..., RunConfig],
    name: str,
    vectors: int = 2,
    **settings: object,
) -> tuple[list[Path], Family, Trainables, RunConfig]:
    """Write the files of such a run into a folder."""
    family, trainables = trained_text(name, vectors)
    config = make_config(**text_settings(name, vectors), output=str(folder), **settings)
    files = write_lora_files(folder, config, family, trainables, {(64, 64): 5})
    return files, family, trainables, config
