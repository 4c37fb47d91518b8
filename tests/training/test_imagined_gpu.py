"""On a GPU in thought a run waits for nothing in its steps, and mixes nothing with host memory."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fastppt
from fastppt.config import RunConfig
from fastppt.families.names import MINI_MODELS
from fastppt.training.loop import train
from fastppt.training.step import run_step
from tests.imagined_gpu import ImaginedGPU
from tests.training.memory_steps import prepared
from tests.training.runs import resume_copy

MakeConfig = Callable[..., RunConfig]

RECIPES = Path(fastppt.__file__).parent / "recipes"
OBJECTIVES = "stage.0.objectives"
TRAINABLES = "stage.0.trainables"
APT: dict[str, object] = {
    f"{OBJECTIVES}.denoising.weighting": "adaptive",
    f"{OBJECTIVES}.feature_alignment.weight": 30.0,
    f"{OBJECTIVES}.attention_alignment.weight": 3e-4,
    "photos.views": 2,
}
# What the small configuration of the tests says of LoRA, and other trainables have not.
NO_LORA: dict[str, object] = {
    f"{TRAINABLES}.lora.rank": None,
    f"{TRAINABLES}.lora.learning_rate": None,
}
FAST_RUNS = {("lora-prior", "mini-sd")}


@pytest.fixture
def gpu() -> Iterator[ImaginedGPU]:
    with ImaginedGPU() as imagined:
        yield imagined


def on_gpu(make_config: MakeConfig, recipe: str, model: str, **settings: Any) -> RunConfig:
    """A small run of a recipe on the GPU in thought."""
    small = {"model.path": model, "model.device": "cuda"}
    return make_config(recipe, **(NO_LORA | small | settings))


def runs() -> Iterator[Any]:
    """Every recipe with every mini model that it is for."""
    for path in sorted(RECIPES.glob("*.toml")):
        wanted = tomllib.loads(path.read_text()).get("families", MINI_MODELS.values())
        for model, family in MINI_MODELS.items():
            if family in wanted:
                marks = [] if (path.stem, model) in FAST_RUNS else [pytest.mark.slow]
                yield pytest.param(path.stem, model, marks=marks)


def short(recipe: str, cache: Path) -> dict[str, object]:
    """Settings for a recipe's shortest whole run: every kind of step, of pictures, of a file.

    Class images are drawn anew: those of another test's run may be the same.
    """
    settings: dict[str, object] = {}
    for index, stage in enumerate(tomllib.loads((RECIPES / f"{recipe}.toml").read_text())["stage"]):
        settings[f"stage.{index}.steps"] = 3
        if "prior_preservation" in stage["objectives"]:
            prior = f"stage.{index}.objectives.prior_preservation"
            settings |= {f"{prior}.num_images": 2, f"{prior}.steps": 2, f"{prior}.batch_size": 2}
            settings[f"{prior}.cache"] = str(cache)
    return settings


@pytest.mark.parametrize(("recipe", "model"), [*runs()])
def test_a_run_of_a_recipe_is_captured_whole(
    make_config: MakeConfig, gpu: ImaginedGPU, recipe: str, model: str, tmp_path: Path
) -> None:
    config = on_gpu(make_config, recipe, model, **short(recipe, tmp_path / "class-images"))
    result = train(config, Console(quiet=True))
    assert result.config.engine == "graph"
    assert result.config.model.precision == "bf16"
    # Passes that accumulate, and the update after them, are graphs apart.
    passes = [stage.gradient_accumulation for stage in config.stage]
    # The sampler of class images is captured too, and takes two steps.
    draws = bool(result.class_images)
    assert gpu.num_captures == sum(min(2, number) for number in passes) + draws
    replays = sum(3 * (number + (number > 1)) for number in passes)
    assert gpu.num_replays == replays + 2 * draws
    assert all(path.exists() for path in result.files)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {f"{OBJECTIVES}.denoising.weighting": "adaptive", "photos.views": 2}
            | {"photos.refresh_every": 2, "checkpoint_every": 3},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"stage.0.ema_decay": 0.9, "samples.enabled": True, "samples.steps": 1}
            | {"sample_every": 3, "checkpoint_every": 3, "plots": True},
            marks=pytest.mark.slow,
        ),
        pytest.param({"photos.buckets": True, "checkpoint_every": 3}, marks=pytest.mark.slow),
        pytest.param(
            APT | {"model.precision": "fp16", "checkpoint_every": 3}, marks=pytest.mark.slow
        ),
    ],
)
def test_what_goes_on_between_steps_is_in_order_and_is_resumed(
    make_config: MakeConfig, gpu: ImaginedGPU, tmp_path: Path, settings: dict[str, object]
) -> None:
    result = train(on_gpu(make_config, "ppt-lora", "mini-sdxl", **settings), Console(quiet=True))
    assert gpu.num_replays == 6
    resume_copy(result.folder.root, 3, tmp_path / "copy")
    assert gpu.num_replays == 9


EVERY_STEP: dict[str, tuple[str, dict[str, object]]] = {
    "accumulated": ("ppt-lora", {"stage.0.gradient_accumulation": 2, "stage.0.batch_size": 2}),
    "scaled loss": ("ppt-lora", APT | {"model.precision": "fp16"}),
    "float32": ("ppt-lora", APT | {"model.precision": "fp32"}),
    "checkpointed": ("ppt-lora", APT | {"gradient_checkpointing": True}),
    "averaged": ("ppt-lora", {"stage.0.ema_decay": 0.9}),
    "raw anchor": ("ppt-lora", {f"{OBJECTIVES}.anchor.form": "raw"}),
    "decoupled anchor": ("ppt-lora", {f"{OBJECTIVES}.anchor.form": "decoupled"}),
    "8-bit and full": ("ppt-dreambooth", {"stage.0.optimizer.moments": "8bit"}),
    "anchors on the host": ("ppt-dreambooth", {f"{OBJECTIVES}.anchor.storage": "host"}),
    "full, compared": ("dreambooth", APT | {"stage.0.ema_decay": 0.9}),
    "rounded at random": ("dreambooth", {f"{TRAINABLES}.full.master_weights": False}),
    "cross-attention, compared": ("custom-diffusion", APT),
    "text encoders": ("lora", {f"{TRAINABLES}.text_encoder_lora.rank": 4}),
    "words and text encoders": (
        "lora",
        APT
        | {f"{TRAINABLES}.text_encoder_lora.rank": 4, "prompts.token": "<v>"}
        | {f"{TRAINABLES}.tokens.learning_rate": 1e-3},
    ),
    "weighted by signal": ("lora", {f"{OBJECTIVES}.denoising.weighting": "min_snr"}),
    "direct consistency": ("lora", {f"{OBJECTIVES}.direct_consistency.beta": 1000.0}),
}
EVERY_STEP |= {
    name: (
        "lora",
        {"stage": [{"trainables": {name: {"rank": 4}}, "objectives": {"denoising": {}}}]} | APT,
    )
    for name in ("dora", "loha", "lokr")
}
FAST_STEPS = {
    ("scaled loss", "mini-sd3"),
    ("anchors on the host", "mini-sd"),
    ("words and text encoders", "mini-sdxl"),
}


def steps() -> Iterator[Any]:
    """Every kind of step of every mini model that it is for."""
    for kind in EVERY_STEP:
        for model, family in MINI_MODELS.items():
            marks = [] if (kind, model) in FAST_STEPS else [pytest.mark.slow]
            # Flow matching has a weighting of its own.
            if (kind, family) != ("weighted by signal", "sd3"):
                yield pytest.param(kind, model, marks=marks)


@pytest.mark.parametrize(("kind", "model"), [*steps()])
def test_a_step_waits_for_nothing_and_its_launches_are_those_of_the_step_before(
    make_config: MakeConfig, gpu: ImaginedGPU, kind: str, model: str
) -> None:
    recipe, settings = EVERY_STEP[kind]
    step = prepared(on_gpu(make_config, recipe, model, **settings))
    launches = []
    for number in range(3):
        # The first makes what the others find.
        own = step.generators.values()
        with gpu.step(*own):
            run_step(step, number)
        launches.append(gpu.launches[:])
        gpu.launches.clear()
    assert launches[0] == launches[1] == launches[2] != []
