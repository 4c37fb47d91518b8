"""Each family from photos to files that other tools draw with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.families.names import MINI_MODELS
from fastppt.mini import build_mini
from fastppt.outputs.generate import generate
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.training.loop import train

PROMPT = "a photo of sks toy on the beach"
STEPS = 3
GUIDANCE = 3.0


def stock_picture(model: str, folder: Path, file: str) -> np.ndarray:
    """What diffusers alone draws with a LoRA file."""
    pipeline = build_mini(model)
    pipeline.load_lora_weights(folder, weight_name=file)
    # Where a model leaves the number of tokens open, training reads as many as CLIP does.
    tokens = {"max_sequence_length": 24} if hasattr(pipeline, "text_encoder_3") else {}
    return np.asarray(
        pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(5),
            **tokens,
        ).images[0]
    ).astype(int)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, marks=() if model == "mini-sd3" else pytest.mark.slow)
        for model in MINI_MODELS
    ],
)
def test_sixty_steps_on_real_photos_give_files_that_diffusers_draws_the_same_with(
    make_config: Callable[..., RunConfig], real_photos: Callable[[str], Path], model: str
) -> None:
    config = make_config(
        **{
            "model.path": model,
            "photos.folder": str(real_photos("duck_toy")),
            "prompts.class_noun": "toy",
            "photos.resolution": 64,
            "stage.0.steps": 60,
            "stage.0.trainables.lora.learning_rate": 1e-2,
        }
    )
    result = train(config, Console(quiet=True))
    rows = [json.loads(line) for line in result.folder.metrics.read_text().splitlines()]
    assert len(rows) == 60
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    (picture,) = generate(
        result.folder.root,
        PROMPT,
        count=1,
        seed=5,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        resolution=None,
        output=None,
        model={"device": "cpu"},
    )
    ours = np.asarray(Image.open(picture)).astype(int)
    tensor_files = [file.name for file in result.files if file.suffix == ".safetensors"]
    assert tensor_files == [DIFFUSERS_FILE, f"{result.folder.root.name}.safetensors"]
    for file in tensor_files:
        theirs = stock_picture(model, result.folder.root, file)
        assert np.mean(abs(ours - theirs) <= 2) >= 0.999, file
    untrained = build_mini(model)(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(5),
    )
    # Or the comparison above would also hold for a file that changes nothing.
    assert np.mean(abs(ours - np.asarray(untrained.images[0]).astype(int)) <= 2) < 0.9
