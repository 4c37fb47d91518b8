"""The compile engine computes what the eager one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.photos import find_photos
from fastppt.families.loading import load_family
from fastppt.training import loop
from fastppt.training.engine import prepare_engine, resolve_engine
from fastppt.training.loop import build_adapters, build_step, encode, new_generator, resolve
from fastppt.training.ring import MetricRing
from fastppt.training.step import METRICS, Step, denoising_pass, draw, run_step


def test_auto_is_eager() -> None:
    assert resolve_engine("auto") == "eager"
    assert resolve_engine("compile") == "compile"


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones(make_config: Callable[..., RunConfig]) -> None:
    """First gradients tensor by tensor, then the drift of 20 steps, both in float64."""
    gradients, drifts = [], []
    for engine in ("eager", "compile"):
        family = load_family(ModelConfig(path="mini-sdxl", device="cpu"), dtype=torch.float64)
        config = resolve(make_config(engine=engine), family)
        adapters = build_adapters(config, family, dtype=torch.float64)
        prepare_engine(config.engine, family)
        latents, prompts, _ = encode(config, family, find_photos(config.photos.folder))
        ring = MetricRing(METRICS, 32, family.device)
        generator = new_generator(config, family)
        step = build_step(
            config, config.stage[0], family, adapters, latents, prompts, ring, generator
        )
        step.learning_rate.fill_(1e-3)
        start = adapters.arena.flat.detach().clone()
        state = generator.get_state()
        # At the start the up-projections are zero and hide half of the gradients.
        for pair in adapters.pairs:
            pair.up.fill_(0.01)
        denoising_pass(step, draw(step)).backward()
        gradients.append([tensor.grad.clone() for tensor in adapters.arena.tensors])
        adapters.arena.grad.zero_()
        adapters.arena.flat.data.copy_(start)
        generator.set_state(state)
        for _ in range(20):
            run_step(step)
        drifts.append(adapters.arena.flat.detach() - start)
    for eager, compiled in zip(*gradients, strict=True):
        assert (eager - compiled).abs().max() <= 1e-9 * eager.abs().max()
    assert drifts[0].abs().max() > 0
    assert (drifts[0] - drifts[1]).abs().max() <= 1e-9 * drifts[0].abs().max()


def test_samples_are_drawn_without_compiling(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[str] = []
    compiled_blocks: list[int] = []
    monkeypatch.setattr(
        torch._dynamo.convert_frame,
        "_compile",
        lambda code, *args, **kwargs: traced.append(code.co_name),
    )

    def count_compiled_blocks(step: Step) -> None:
        modules = step.family.network.modules()
        compiled_blocks.append(sum(m._compiled_call_impl is not None for m in modules))

    monkeypatch.setattr(loop, "run_step", count_compiled_blocks)
    settings = {"engine": "compile", "samples.enabled": True, "samples.steps": 1}
    loop.train(make_config(**settings), Console(quiet=True))
    # The engine is at work in the steps, and not in the pictures before and after them.
    assert len(compiled_blocks) == 6 and min(compiled_blocks) > 0
    assert traced == []


def test_blocks_are_compiled_and_the_rest_is_not(make_config: Callable[..., RunConfig]) -> None:
    family = load_family(ModelConfig(path="mini-sdxl", device="cpu"))
    prepare_engine("compile", family)
    compiled = {
        type(module).__name__
        for module in family.network.modules()
        if module._compiled_call_impl is not None
    }
    assert compiled == {"BasicTransformerBlock"}
