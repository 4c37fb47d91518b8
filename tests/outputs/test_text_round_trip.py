"""Train text and network, save, load with stock diffusers: the picture is the run's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.families.loading import load_family
from fastppt.outputs.generate import generate
from fastppt.outputs.samples import MARGIN, MIN_CELL
from fastppt.training.build import build_trainables
from fastppt.training.loop import train
from tests.outputs.test_text_files import code_of, share_that_differs
from tests.outputs.text_cases import WORD, text_settings

MakeConfig = Callable[..., RunConfig]
SEED, STEPS, GUIDANCE = 11, 3, 4.0


def text_run(make_config: MakeConfig, name: str, **settings: object) -> Path:
    """Train a few steps with large rates; returns the run's folder."""
    rates = {
        "stage.0.steps": 3,
        "stage.0.trainables.lora.learning_rate": 0.05,
        "stage.0.trainables.text_encoder_lora.learning_rate": 0.05,
        "stage.0.trainables.tokens.learning_rate": 0.3,
        "samples.enabled": True,
        "samples.steps": STEPS,
        "samples.guidance_scale": GUIDANCE,
        "samples.seed": SEED,
        "checkpoint_every": 3,
    }
    config = make_config("lora", **text_settings(name) | rates | settings)
    return train(config, Console(quiet=True)).folder.root


def first_cell(grid: Path) -> np.ndarray:
    """The picture of the subject prompt, as the grid enlarges it."""
    box = (MARGIN, MARGIN, MARGIN + MIN_CELL, MARGIN + MIN_CELL)
    return np.asarray(Image.open(grid).crop(box), dtype=np.int16)


def enlarged(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((MIN_CELL, MIN_CELL), Image.Resampling.NEAREST), dtype=np.int16)


def stock_picture(card: Path) -> Image.Image:
    """What the card's code draws, with the seed and the settings of the run's grid."""
    setup, line = code_of(card.read_text(encoding="utf-8")).rsplit("image = pipe(", 1)
    names: dict[str, Any] = {"torch": torch}
    exec(setup, names)
    names["pipe"].set_progress_bar_config(disable=True)
    options = f"num_inference_steps={STEPS}, guidance_scale={GUIDANCE}, height=64, width=64, "
    options += f"generator=torch.Generator().manual_seed({SEED}), "
    prompt, rest = line.split('"', 2)[1:]
    exec(f'image = pipe("{prompt}", {options} {rest.lstrip(", ")}', names)
    image: Image.Image = names["image"]
    return image


@pytest.mark.parametrize("name", [pytest.param("sd", marks=pytest.mark.slow), "sdxl", "sd3"])
def test_stock_diffusers_and_generate_draw_the_last_grid_of_the_run(
    make_config: MakeConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = text_run(make_config, name)
    trained = first_cell(folder / "samples" / "step-000003.png")
    assert share_that_differs(trained, first_cell(folder / "samples" / "step-000000.png")) > 0.2
    for lora in (folder, folder / "checkpoints" / "step-000003"):
        (path,) = generate(
            lora,
            f"a photo of {WORD}",
            count=1,
            seed=SEED,
            steps=None,
            guidance_scale=None,
            resolution=None,
            output=folder / "generated",
            model={"device": "cpu"},
        )
        assert share_that_differs(enlarged(Image.open(path)), trained) <= 0.001
    monkeypatch.chdir(folder)
    stock = enlarged(stock_picture(folder / "README.md"))
    assert share_that_differs(stock, trained) <= 0.001


def test_run_goes_on_from_the_adapters_and_the_word_of_another(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = text_run(make_config, "sdxl", **{"samples.enabled": False, "checkpoint_every": 0})
    settings = text_settings("sdxl") | {"stage.0.trainables.lora.init": str(folder)}
    config = make_config("lora", **settings, output=str(tmp_path / "next"))
    family = load_family(config.model)
    again = build_trainables(config, family)
    assert again.tokens is not None and again.text_encoder_lora is not None
    (picture,) = family.sample(
        family.encode_prompts([f"a photo of {WORD}"]),
        family.encode_negative(),
        seeds=[SEED],
        resolution=64,
        steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    (path,) = generate(
        folder,
        f"a photo of {WORD}",
        count=1,
        seed=SEED,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        resolution=64,
        output=None,
        model={"device": "cpu"},
    )
    assert share_that_differs(picture, Image.open(path)) <= 0.001
    one_vector = make_config("lora", **settings | {"stage.0.trainables.tokens.vectors": 1})
    with pytest.raises(UserError, match=r"word <v>: .*shape \(2, 48\)"):
        build_trainables(one_vector, load_family(config.model))
    (folder / "v.safetensors").unlink()
    with pytest.raises(UserError, match=r"word <v>: embedding .*v\.safetensors: cannot be read"):
        build_trainables(config, load_family(config.model))
