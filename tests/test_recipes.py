"""Every recipe on every family that it is for: as it is published, and from photos to pictures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from rich.console import Console

import fastppt
from fastppt.config import RunConfig
from fastppt.config_io import RECIPES, build_config, load_recipe
from fastppt.data.prompts import class_prompt, subject_prompt
from fastppt.errors import UserError
from fastppt.families.names import FAMILY_NAMES
from fastppt.mini import build_mini
from fastppt.outputs.samples import MARGIN, MIN_CELL
from fastppt.training.loop import train
from fastppt.training.run import RunResult

# One of each objective; recipes of several stages are slow.
FAST = {("ppt-dreambooth", "sd"), ("apt", "sd")}
EVERY = [
    pytest.param(recipe, family, marks=() if (recipe, family) in FAST else pytest.mark.slow)
    for recipe in RECIPES
    for family in load_recipe(recipe)[0].families
]
NUM_STEPS, SIDE = 40, 64
SAMPLER_STEPS, GUIDANCE, SEED = 2, 3.0, 5
# So that 40 steps on a mini model change its pictures.
RATES = {
    "lora": 1e-2,
    "oft": 1e-2,
    "full": 1e-4,
    "custom_diffusion": 1e-2,
    "svdiff": 1e-1,
    "text_encoder_lora": 1e-2,
    "tokens": 1e-1,
}


# What is published: steps, batch, passes, weight decay, clipping of each stage; what it trains with
# which settings; its objectives. Sources: DESIGN 3.8, and the commands that the recipes name.
ADAMW, DECAYED = {"weight_decay": 1e-4, "max_grad_norm": 1.0}, {"weight_decay": 0.01}
PLAIN: dict[str, Any] = {"denoising": {"weight": 1.0, "weighting": "uniform"}}
HELD = {"anchor": {"form": "raw", "to": "start"}}
DREAMBOOTH = {"full": {"learning_rate": 5e-6, "targets": None}}
DREAMBOOTH_SD3 = {"full": {"learning_rate": 1e-4}}
UNCLIPPED = {"weight_decay": 0.01, "max_grad_norm": 0.0}
WORD = {"tokens": {"learning_rate": 2e-3, "vectors": 1, "init": None}}
RARE_WORD = {"tokens": {"learning_rate": 5e-4, "vectors": 1, "init": "rare"}}
NEAR_PHOTO = ("a photo of sks toy", "a photo of toy")
NEW_WORD = ("photo of a <new1> toy", "toy")


def prior(num_images: int) -> dict[str, Any]:
    return PLAIN | {"prior_preservation": {"weight": 1.0, "num_images": num_images}}


def custom(rate: float) -> dict[str, Any]:
    word = {"learning_rate": rate, "vectors": 1, "init": "ktn"}
    return {"custom_diffusion": {"learning_rate": rate}, "tokens": word}


Stage = tuple[int, int, int, dict[str, Any], dict[str, Any], dict[str, Any]]
LORA = {"lora": {"rank": 32, "learning_rate": 1e-4, "targets": None}}
DCO: Stage = (
    *(2000, 1, 1, ADAMW),
    {
        "lora": {"rank": 32, "learning_rate": 5e-5},
        "tokens": {"learning_rate": 5e-6, "keep_norm": True, "init": None},
    },
    {"direct_consistency": {"weight": 1.0, "beta": 1000.0}},
)
OFT = {"oft": {"num_blocks": 4, "constraint": 6e-5, "learning_rate": 6e-5}}
SVDIFF = {"svdiff": {"learning_rate": 1e-3, "learning_rate_1d": 1e-6, "targets": None}}
PUBLISHED: dict[tuple[str, str], tuple[tuple[str, str], list[Stage]]] = {
    ("lora-prior", "sdxl"): (
        ("a photo of sks toy", "a photo of a toy"),
        [(500, 1, 1, ADAMW, LORA, prior(100))],
    ),
    ("dreambooth", "sd"): (NEAR_PHOTO, [(400, 1, 1, DECAYED, DREAMBOOTH, PLAIN)]),
    ("dreambooth", "sd3"): (NEAR_PHOTO, [(500, 1, 4, ADAMW, DREAMBOOTH_SD3, PLAIN)]),
    ("dreambooth-prior", "sd"): (NEAR_PHOTO, [(800, 1, 1, DECAYED, DREAMBOOTH, prior(200))]),
    ("dreambooth-prior", "sd3"): (NEAR_PHOTO, [(500, 1, 4, ADAMW, DREAMBOOTH_SD3, prior(100))]),
    ("ppt-dreambooth", "sd"): (NEAR_PHOTO, [(400, 1, 1, DECAYED, DREAMBOOTH, PLAIN | HELD)]),
    ("custom-diffusion", "sd"): (NEW_WORD, [(250, 2, 1, DECAYED, custom(2e-5), PLAIN)]),
    ("custom-diffusion-prior", "sd"): (NEW_WORD, [(250, 2, 1, DECAYED, custom(4e-5), prior(200))]),
    ("ppt-custom-diffusion", "sd"): (NEW_WORD, [(250, 2, 1, DECAYED, custom(2e-5), PLAIN | HELD)]),
    ("textual-inversion", "sd"): (
        ("a photo of a <v>", "a photo of a toy"),
        [(3000, 1, 4, UNCLIPPED, WORD, PLAIN)],
    ),
    ("textual-inversion", "sdxl"): (
        ("a photo of a <v>", "a photo of a toy"),
        [(500, 1, 4, UNCLIPPED, WORD, PLAIN)],
    ),
    ("dco", "sdxl"): (("a photo of a <v>", "a photo of a toy"), [DCO]),
    ("oft", "sd"): (NEAR_PHOTO, [(2005, 1, 1, DECAYED, OFT, prior(200))]),
    ("svdiff", "sd"): (
        ("photo of a sks toy", "photo of a toy"),
        [(500, 1, 1, DECAYED, SVDIFF, prior(200))],
    ),
    ("rare-token", "sd"): (
        ("a photo of <rare> toy", "a photo of a toy"),
        [(100, 1, 1, ADAMW, RARE_WORD, PLAIN), (400, 1, 1, ADAMW, DREAMBOOTH, PLAIN)],
    ),
    ("rare-token", "sdxl"): (
        ("a photo of <rare> toy", "a photo of a toy"),
        [(100, 1, 1, ADAMW, RARE_WORD, PLAIN), (400, 1, 1, ADAMW, LORA, PLAIN)],
    ),
}


def entries(section: BaseModel, wanted: dict[str, Any]) -> dict[str, Any]:
    """Of a table's keys those that are wanted."""
    return {key: getattr(section, key) for key in wanted}


@pytest.mark.parametrize(("recipe", "family"), PUBLISHED)
def test_recipe_has_the_settings_that_are_published(recipe: str, family: str) -> None:
    _, table = load_recipe(recipe, family)
    words = table.get("prompts", {}) | {"class_noun": "toy"}
    config = RunConfig.model_validate(table | {"prompts": words})
    prompts, stages = PUBLISHED[recipe, family]
    assert (subject_prompt(config.prompts), class_prompt(config.prompts)) == prompts
    assert len(config.stage) == len(stages)
    for stage, (steps, batch, passes, optimizer, moving, objectives) in zip(
        config.stage, stages, strict=True
    ):
        assert (stage.steps, stage.batch_size, stage.gradient_accumulation) == (
            *(steps, batch, passes),
        )
        assert (stage.schedule, stage.warmup_steps, stage.ema_decay) == ("constant", 0, 0.0)
        assert entries(stage.optimizer, optimizer) == optimizer
        tables = stage.trainables.given
        assert {name: entries(tables[name], moving.get(name, {})) for name in tables} == moving
        pulls = {name: table for name, table in stage.objectives if table is not None}
        assert {name: entries(pulls[name], objectives.get(name, {})) for name in pulls} == (
            objectives
        )


@pytest.mark.parametrize("recipe", ["dreambooth", "custom-diffusion"])
def test_an_anchor_is_all_that_a_ppt_recipe_adds(recipe: str) -> None:
    for family in load_recipe(recipe)[0].families:
        plain, held = load_recipe(recipe, family)[1], load_recipe(f"ppt-{recipe}", family)[1]
        assert held["stage"][0]["objectives"].pop("anchor") == {"weight": 1e-3, "form": "raw"}
        assert held == plain
    assert load_recipe(recipe)[0].families == load_recipe(f"ppt-{recipe}")[0].families


def test_a_prior_adds_class_images_and_the_steps_that_go_with_them() -> None:
    _, lora = load_recipe("lora")
    _, with_prior = load_recipe("lora-prior")
    del with_prior["stage"][0]["objectives"]["prior_preservation"]
    assert with_prior == lora


def test_rare_token_saves_twice_in_its_second_stage() -> None:
    for family in load_recipe("rare-token")[0].families:
        first, second = load_recipe("rare-token", family)[1]["stage"]
        assert second["checkpoint_every"] == 200 and "checkpoint_every" not in first


@pytest.mark.parametrize(
    ("recipe", "family"),
    [(name, f) for name in RECIPES for f in FAMILY_NAMES if f not in load_recipe(name)[0].families],
)
def test_recipe_on_a_family_that_it_is_not_for_is_refused_before_anything_is_loaded(
    photos: Path, tmp_path: Path, recipe: str, family: str
) -> None:
    settings = [
        ("model.path", f"mini-{family}"),
        ("photos.folder", str(photos)),
        ("prompts.class_noun", "toy"),
        ("output", str(tmp_path / "out")),
    ]
    with pytest.raises(UserError) as error:
        train(build_config(recipe, settings=settings), Console(quiet=True))
    said = str(error.value)
    assert said.startswith(f"recipe {recipe}: is for {', '.join(load_recipe(recipe)[0].families)};")
    assert f"mini-{family} is {family}. Give another model, or another recipe" in said
    assert not (tmp_path / "out").exists()


def small(recipe: str, family: str, photos: Path, tmp_path: Path) -> RunConfig:
    """The recipe in 40 steps, on few pixels, with rates at which a mini model learns."""
    settings: dict[str, Any] = {
        "model.path": f"mini-{family}",
        "model.device": "cpu",
        "photos.folder": str(photos),
        "photos.resolution": SIDE,
        "photos.views": 2,
        "prompts.class_noun": "toy",
        "prompts.contexts": ["{subject} on the beach"],
        "samples.steps": SAMPLER_STEPS,
        "samples.guidance_scale": GUIDANCE,
        "samples.seed": SEED,
        "output": str(tmp_path / "toy"),
        "plots": False,
    }
    stages = build_config(recipe, settings=list(settings.items())).stage
    for number, stage in enumerate(stages):
        key = f"stage.{number}"
        settings |= {f"{key}.steps": NUM_STEPS // len(stages), f"{key}.gradient_accumulation": 1}
        for name in stage.trainables.given:
            settings[f"{key}.trainables.{name}.learning_rate"] = RATES[name]
        if stage.trainables.lora is not None:
            settings[f"{key}.trainables.lora.rank"] = 4
        if stage.objectives.prior_preservation is not None:
            prior = f"{key}.objectives.prior_preservation"
            settings |= {f"{prior}.num_images": 2, f"{prior}.steps": 2}
            settings[f"{prior}.cache"] = str(tmp_path / "cache")
    return build_config(recipe, settings=list(settings.items()))


def drawn_by_the_run(result: RunResult) -> NDArray[np.int64]:
    """The subject's picture in the last grid, which the trained network itself has drawn."""
    grid = np.asarray(Image.open(result.folder.grid(NUM_STEPS))).astype(int)
    # Enlarged, each pixel to as many.
    enlarged = grid[MARGIN : MARGIN + MIN_CELL, MARGIN : MARGIN + MIN_CELL]
    return enlarged[1 :: MIN_CELL // SIDE, 1 :: MIN_CELL // SIDE]


def draw(pipeline: Any, prompt: str) -> NDArray[np.int64]:
    # Where a model leaves the number of tokens open, training reads as many as CLIP does.
    tokens = {"max_sequence_length": 24} if hasattr(pipeline, "text_encoder_3") else {}
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(
        prompt,
        height=SIDE,
        width=SIDE,
        num_inference_steps=SAMPLER_STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        **tokens,
    ).images
    return np.asarray(image).astype(int)


def loaded_as_the_card_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline that the model card's code makes of what the run has left."""
    (code,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), flags=re.DOTALL)
    *lines, last = code.strip().splitlines()
    assert last.startswith("image = pipe(")
    monkeypatch.chdir(root)
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return names["pipe"]


def are_the_same(first: NDArray[np.int64], second: NDArray[np.int64]) -> bool:
    return bool(np.mean(abs(first - second) <= 2) >= 0.999)


@pytest.mark.parametrize(("recipe", "family"), EVERY)
def test_recipe_trains_on_real_photos_and_what_it_leaves_draws_the_same(
    real_photos: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    family: str,
) -> None:
    config = small(recipe, family, real_photos("duck_toy"), tmp_path)
    result = train(config, Console(quiet=True))
    rows = [json.loads(line) for line in result.folder.metrics.read_text().splitlines()]
    assert len(rows) == NUM_STEPS
    assert all(math.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows)
    ours = drawn_by_the_run(result)
    prompt = result.trigger_prompt
    stock = loaded_as_the_card_says(result.folder.root, monkeypatch)
    assert are_the_same(draw(stock, prompt), ours)
    pipeline = build_mini(f"mini-{family}")
    untrained = draw(pipeline, prompt)
    assert are_the_same(draw(fastppt.load(pipeline, result.folder.root), prompt), ours)
    # Or the comparisons above would also hold for files that change nothing.
    assert not are_the_same(untrained, ours)
