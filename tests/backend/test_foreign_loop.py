"""A bare loop of diffusers, peft and accelerate with our lines in it trains as `fastppt train`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastppt
from fastppt.backend import lora_pairs
from fastppt.config import RunConfig
from fastppt.data.prompts import class_prompt, subject_prompt
from fastppt.mini import build_mini
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.stage_config import StageConfig
from fastppt.training import loop, run, step
from fastppt.training.batch import Draws
from fastppt.training.step import Step
from fastppt_kernels import AnchoredAdamW

MakeConfig = Callable[..., RunConfig]
Adapters = dict[str, tuple[Tensor, Tensor]]
Batch = dict[str, Tensor]

OBJECTIVES = "stage.0.objectives"
# The anchor pulls hard enough to be seen, and every step is clipped.
PPT = {
    "stage.0.steps": 4,
    "stage.0.batch_size": 2,
    "stage.0.gradient_accumulation": 2,
    f"{OBJECTIVES}.anchor.weight": 2.0,
    "stage.0.optimizer.max_grad_norm": 0.05,
}
# One bin, so that what a step has seen weighs the next and chooses its views.
APT = {
    "stage.0.steps": 4,
    "stage.0.batch_size": 2,
    "photos.views": 2,
    f"{OBJECTIVES}.denoising.weighting": "adaptive",
    f"{OBJECTIVES}.denoising.bins": 1,
    f"{OBJECTIVES}.denoising.temperature": 3000.0,
    f"{OBJECTIVES}.feature_alignment.weight": 3.0,
    f"{OBJECTIVES}.attention_alignment.weight": 3e-3,
}


@dataclass
class Recorded:
    """What a run of the product began with, was given by chance, and ended with."""

    config: RunConfig
    step: Step
    start: Adapters
    draws: list[Draws]
    rows: list[dict[str, float]]
    file: Path

    @property
    def stage(self) -> StageConfig:
        return self.config.stage[0]

    @property
    def end(self) -> Adapters:
        return adapters_of(self.step)

    def batches(self) -> list[Batch]:
        """What a data loader would give: latents of the photos by view, and all the chance."""
        found = []
        for draws in self.draws:
            mean, std = self.step.latents.posteriors[draws.photos].unbind(2)
            latents = mean + std * draws.posterior_normals[:, None]
            found.append({**vars(draws), "latents": latents})
        return found


def adapters_of(one: Step) -> Adapters:
    pairs = one.trainables.lora.pairs
    return {pair.name: (pair.down.clone(), pair.up.clone()) for pair in pairs}


@pytest.fixture
def train_recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig], Recorded]:
    """Train as the command does, in float64, and write down what another loop needs."""

    def train(config: RunConfig) -> Recorded:
        steps: list[Step] = []
        starts: list[Adapters] = []
        drawn: list[Draws] = []
        build, draw, load = run.build_steps, step.draw, loop.load_family

        def build_noting(*arguments: Any, **options: Any) -> list[Step]:
            steps.extend(build(*arguments, **options))
            starts.append(adapters_of(steps[0]))
            return steps

        def draw_noting(one: Step) -> Draws:
            drawn.append(draw(one))
            return drawn[-1]

        monkeypatch.setattr(run, "build_steps", build_noting)
        monkeypatch.setattr(step, "draw", draw_noting)
        monkeypatch.setattr(loop, "load_family", partial(load, dtype=torch.float64))
        in_float64 = partial(loop.build_trainables, dtype=torch.float64)
        monkeypatch.setattr(loop, "build_trainables", in_float64)
        result = loop.train(config, Console(quiet=True))
        rows = [json.loads(line) for line in result.folder.metrics.read_text().splitlines()]
        file = result.folder.root / DIFFUSERS_FILE
        return Recorded(result.config, steps[0], starts[0], drawn, rows, file)

    return train


def foreign_pipeline(recorded: Recorded) -> StableDiffusionXLPipeline:
    """The stock pipeline in float64, its UNet with peft's adapters at the run's start."""
    pipe = build_mini("mini-sdxl").to(torch.float64)
    pipe.unet.requires_grad_(False)
    rank = recorded.stage.trainables.lora.rank
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    for name, (down, up) in recorded.start.items():
        layer = pipe.unet.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(down)
        layer.lora_B["default"].weight.data.copy_(up)
    return pipe


@torch.no_grad()
def conditions(pipe: StableDiffusionXLPipeline, text: str, num_rows: int) -> dict[str, Any]:
    """What the UNet is told beside noisy latents and timesteps: 256-pixel photos, shown at 32."""
    tokens, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    sizes = torch.tensor([[256, 256, 0, 0, 32, 32]], dtype=torch.float64)
    return {
        "encoder_hidden_states": tokens.repeat(num_rows, 1, 1),
        "added_cond_kwargs": {
            "text_embeds": pooled.repeat(num_rows, 1),
            "time_ids": sizes.repeat(num_rows, 1),
        },
    }


def prepared(pipe: StableDiffusionXLPipeline, recorded: Recorded, **anchor: Any) -> tuple[Any, ...]:
    """What stands before any loop of accelerate; the optimizer is the line that is ours."""
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=recorded.stage.gradient_accumulation
    )
    params = [param for param in pipe.unet.parameters() if param.requires_grad]
    settings = recorded.stage.optimizer
    pairs = {"lora_pairs": lora_pairs(pipe.unet)} if anchor else {}
    optimizer = AnchoredAdamW(
        [{"params": params, **pairs}],
        lr=recorded.stage.trainables.lora.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        **anchor,
    )
    loader = DataLoader(recorded.batches(), batch_size=None)
    return accelerator, *accelerator.prepare(pipe.unet, optimizer, loader)


def foreign_ppt_loop(recorded: Recorded) -> StableDiffusionXLPipeline:
    """A DreamBooth loop as anybody writes it, with our optimizer."""
    pipe = foreign_pipeline(recorded)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    weight = recorded.stage.objectives.anchor.weight
    accelerator, unet, optimizer, loader = prepared(
        pipe, recorded, anchor_weight=weight, form="effective"
    )
    told = conditions(pipe, subject_prompt(recorded.config.prompts), recorded.stage.batch_size)
    for batch in loader:
        with accelerator.accumulate(unet):
            latents, noise, timesteps = batch["latents"][:, 0], batch["noise"], batch["timesteps"]
            noisy = scheduler.add_noise(latents, noise, timesteps)
            prediction = unet(noisy, timesteps, **told).sample
            target = scheduler.get_velocity(latents, noise, timesteps)
            accelerator.backward(nn.functional.mse_loss(prediction, target))
            optimizer.step()
            optimizer.zero_grad()
    return pipe


def foreign_apt_loop(recorded: Recorded) -> tuple[StableDiffusionXLPipeline, Tensor]:
    """The same with a base pass, alignment losses, the indicator, and the views that it chose."""
    pipe = foreign_pipeline(recorded)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    accelerator, unet, optimizer, loader = prepared(pipe, recorded)
    prompts, num_rows = recorded.config.prompts, recorded.stage.batch_size
    subject = conditions(pipe, subject_prompt(prompts), num_rows)
    plain = conditions(pipe, class_prompt(prompts), num_rows)
    objectives = recorded.stage.objectives
    attached = fastppt.attach(
        unet,
        feature_weight=objectives.feature_alignment.weight,
        attention_weight=objectives.attention_alignment.weight,
        columns=recorded.step.prompts.columns[0],
    )
    indicator = fastppt.OverfittingIndicator(num_bins=1, temperature=3000.0, dtype=torch.float64)
    shown = []
    for batch in loader:
        noise, timesteps = batch["noise"], batch["timesteps"]
        augmented = batch["augmentations"] < indicator.augmentation_probability(timesteps)
        views = (1 + (batch["view_fractions"] * 2).long()) * augmented
        shown.append(views)
        latents = batch["latents"][torch.arange(num_rows), views]
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with attached.base():
            base_prediction = unet(noisy, timesteps, **plain).sample
        prediction = unet(noisy, timesteps, **subject).sample
        target = scheduler.get_velocity(latents, noise, timesteps)
        loss = indicator.loss(prediction, base_prediction, target, timesteps)
        accelerator.backward(loss + attached.losses().total)
        optimizer.step()
        optimizer.zero_grad()
    attached.detach()
    return pipe, torch.cat(shown)


def adapters_of_peft(unet: nn.Module) -> Adapters:
    values = get_peft_model_state_dict(unet)
    names = [key.removesuffix(".lora_A.weight") for key in values if "lora_A" in key]
    return {
        name: (values[f"{name}.lora_A.weight"], values[f"{name}.lora_B.weight"]) for name in names
    }


def distance(recorded: Recorded, theirs: Adapters) -> float:
    """The largest difference of any value, as a share of the largest way that one has gone."""
    ours = recorded.end
    assert ours.keys() == theirs.keys() == recorded.start.keys()
    difference = drift = 0.0
    for name, start in recorded.start.items():
        for mine, other, first in zip(ours[name], theirs[name], start, strict=True):
            difference = max(difference, float((mine - other).abs().max()))
            drift = max(drift, float((mine - first).abs().max()))
    assert drift > 1e-3
    return difference / drift


def test_a_bare_loop_with_our_optimizer_gives_the_adapters_of_the_recipe(
    make_config: MakeConfig, train_recorded: Callable[[RunConfig], Recorded], tmp_path: Path
) -> None:
    recorded = train_recorded(make_config("ppt-lora", **PPT))
    assert min(row["grad_norm"] for row in recorded.rows) > 0.05
    assert max(row["anchor"] for row in recorded.rows) > 1e-3
    pipe = foreign_ppt_loop(recorded)
    assert distance(recorded, adapters_of_peft(pipe.unet)) < 1e-9
    # What either leaves on disk is the same file to whoever loads it.
    values = get_peft_model_state_dict(pipe.unet)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=values)
    theirs, ours = load_file(tmp_path / "lora" / DIFFUSERS_FILE), load_file(recorded.file)
    assert theirs.keys() == ours.keys()
    for key, saved in ours.items():
        torch.testing.assert_close(theirs[key].to(saved.dtype), saved, rtol=1e-3, atol=1e-7)


def test_a_bare_loop_with_alignments_and_indicator_gives_the_adapters_of_the_run(
    make_config: MakeConfig, train_recorded: Callable[[RunConfig], Recorded]
) -> None:
    recorded = train_recorded(make_config("lora", **APT))
    for name in ("feature_mean", "feature_std", "attention_alignment"):
        assert min(row[name] for row in recorded.rows) > 1e-4, name
    assert all(0.1 < row["gamma"] < 0.9 for row in recorded.rows)
    pipe, views = foreign_apt_loop(recorded)
    assert 0 < views.count_nonzero() < len(views)
    assert distance(recorded, adapters_of_peft(pipe.unet)) < 1e-9
