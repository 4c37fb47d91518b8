"""Blocks that are computed again in the backward pass give the same gradients from less memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.photos import find_photos
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.families.names import MINI_MODELS
from fastppt.trainables.lora import LoraAdapters
from fastppt.training.build import build_trainables
from fastppt.training.encoding import encode
from fastppt.training.live_bytes import LiveBytes
from fastppt.training.loop import resolve, train
from fastppt.training.metric_names import metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.run import new_generator
from fastppt.training.stage import build_steps
from fastppt.training.step import Step, accumulate_gradients, run_step

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")

OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compared": {
        "stage.0.objectives.denoising.weighting": "adaptive",
        "stage.0.objectives.feature_alignment.weight": 30.0,
        "stage.0.objectives.attention_alignment.weight": 3.0,
        "photos.views": 2,
    },
}
"""Without and with all that looks into the network's blocks."""


def prepared(
    make_config: MakeConfig, model: str, *, checkpointing: bool, **settings: Any
) -> tuple[Step, LoraAdapters]:
    """A step in float64, with adapters that already change something."""
    family = load_family(ModelConfig(path=model, device="cpu"), dtype=torch.float64)
    config = resolve(make_config(**{"model.path": model} | settings), family)
    trainables = build_trainables(config, family, dtype=torch.float64)
    adapters = trainables.lora
    for pair in adapters.pairs:
        pair.up.fill_(0.01)
    if checkpointing:
        family.checkpoint_blocks()
    buckets, _ = encode(config, family, find_photos(config.photos.folder), Console(quiet=True))
    ring = MetricRing(metric_names(config.stage), 64, CPU)
    generator = new_generator(config, family)
    (step,) = build_steps(config, config.stage[0], family, trainables, buckets, ring, generator)
    step.learning_rate.fill_(1e-3)
    return step, adapters


@pytest.mark.parametrize("model", MINI_MODELS)
@pytest.mark.parametrize("objectives", OBJECTIVES)
def test_the_same_gradients_and_losses_bit_for_bit_from_fewer_bytes(
    make_config: MakeConfig, model: str, objectives: str
) -> None:
    gradients, losses, kept = [], [], []
    for checkpointing in (False, True):
        step, adapters = prepared(
            make_config, model, checkpointing=checkpointing, **OBJECTIVES[objectives]
        )
        with LiveBytes(CPU) as counter, counter.kept_for_backward():
            accumulate_gradients(step)
        kept.append(counter.kept)
        gradients.append(adapters.arena.grad.clone())
        losses.append(step.losses.clone())
    assert gradients[0].abs().max() > 0
    assert losses[0].nonzero().shape[0] >= (2 if objectives == "plain" else 5)
    assert torch.equal(*gradients)
    assert torch.equal(*losses)
    assert kept[1] < 0.6 * kept[0]


def test_the_inside_of_every_block_is_computed_twice_and_only_with_gradients(
    make_config: MakeConfig,
) -> None:
    step, adapters = prepared(make_config, "mini-sdxl", checkpointing=True)
    calls: list[str] = []
    for name, module in step.family.network.named_modules():
        if type(module).__name__ in step.family.repeated_blocks:
            module.attn1.register_forward_hook(lambda *_, name=name: calls.append(name))
    accumulate_gradients(step)
    assert len(calls) == 2 * len(set(calls)) > 0
    calls.clear()
    with torch.no_grad(), adapters.switch.base():
        step.family.predict(
            torch.zeros(1, *step.latents.latent_shape, dtype=torch.float64),
            torch.zeros(1, dtype=torch.int64),
            step.prompts.subject(torch.zeros(1, dtype=torch.int64)),
            step.prompts.sizes[:1],
        )
    assert len(calls) == len(set(calls)) > 0


def test_no_generator_is_read_nor_moved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, _ = prepared(make_config, "mini-sdxl", checkpointing=True)

    def refuse(*_: object) -> None:
        raise AssertionError("the state of torch's own generator was asked for")

    monkeypatch.setattr(torch, "get_rng_state", refuse)
    monkeypatch.setattr(torch, "set_rng_state", refuse)
    run_step(step)


@pytest.mark.slow
@pytest.mark.parametrize("objectives", OBJECTIVES)
def test_compiled_blocks_are_computed_again_as_well(
    make_config: MakeConfig, objectives: str
) -> None:
    gradients = []
    for compiled in (False, True):
        step, adapters = prepared(
            make_config, "mini-sdxl", checkpointing=True, **OBJECTIVES[objectives]
        )
        if compiled:
            compile_blocks(step.family, "aot_eager")
        accumulate_gradients(step)
        gradients.append(adapters.arena.grad.clone())
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-12 * gradients[0].abs().max()


def compile_blocks(family: Family, backend: str) -> None:
    torch._dynamo.reset()
    for module in family.network.modules():
        if type(module).__name__ in family.repeated_blocks:
            module.compile(backend=backend)


def test_a_run_with_checkpointing_equals_one_without(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    losses = []
    for checkpointing in (False, True):
        config = make_config(
            gradient_checkpointing=checkpointing, output=str(tmp_path / str(checkpointing))
        )
        result = train(config, Console(quiet=True))
        assert result.config.gradient_checkpointing == checkpointing
        rows = result.folder.metrics.read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert losses[0] == losses[1]
