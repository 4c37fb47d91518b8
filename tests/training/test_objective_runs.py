"""Steps that compare with the base under every engine and setting, and in whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.config import ModelConfig, RunConfig
from fastppt.data.photos import find_photos
from fastppt.errors import UserError
from fastppt.families.loading import load_family
from fastppt.families.names import MINI_MODELS
from fastppt.objectives.feature_alignment import FeatureAlignment
from fastppt.stage_config import DenoisingConfig, ObjectivesConfig
from fastppt.training.batch import Draws, draw, make_batch
from fastppt.training.build import build_trainables
from fastppt.training.compiling import _allow_variants
from fastppt.training.encoding import encode
from fastppt.training.loop import resolve, train
from fastppt.training.metric_names import METRICS, metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.run import new_generator
from fastppt.training.stage import build_steps, layers_to_align
from fastppt.training.step import (
    accumulate_gradients,
    base_pass,
    compared_with_base,
    loss_terms,
    run_step,
)
from tests.training.objective_steps import (
    APT,
    OBJECTIVES,
    compile_blocks_by,
    load,
    metrics_of,
    prepared,
    stir,
)

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize("model", ["mini-sdxl", "mini-sd3"])
def test_nothing_stays_in_the_network_after_a_step(make_config: MakeConfig, model: str) -> None:
    step, _ = prepared(make_config("lora", **(APT | {"model.path": model})), load(model))
    batch = make_batch(step, draw(step))
    before = base_pass(step, batch)

    def check_clean() -> None:
        assert all(each.tap is None for each in step.family.text_attentions().values())
        hooks = [h for m in step.family.network.modules() for h in m._forward_hooks.values()]
        assert hooks and all(hook.tap is None for hook in hooks)
        for tap in step.attention_alignment._tuned:
            assert (tap.base.map_sum, tap.columns, tap.outbox.losses) == (None, None, ())
        for statistics in step.feature_alignment._tuned:
            assert (statistics.base.mean, statistics.outbox.losses) == (None, ())

    run_step(step)
    check_clean()
    last = list(step.family.feature_layers().values())[-1]

    def fail(*_: object) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("stopped")

    stop = last.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        run_step(step)
    stop.remove()
    check_clean()
    assert torch.equal(base_pass(step, batch), before)


@pytest.mark.parametrize("model", ["mini-sdxl", "mini-sd3"])
def test_checkpointed_blocks_count_their_losses_once(make_config: MakeConfig, model: str) -> None:
    """The same losses and gradients; what the second run sends goes where nobody reads."""
    found = []
    for checkpointed in (False, True):
        family = load(model, torch.float64)
        step, adapters = prepared(make_config("lora", **(APT | {"model.path": model})), family)
        stir(adapters)
        if checkpointed:
            family.checkpoint_blocks()
        for _ in range(2):
            accumulate_gradients(step)
        found.append((step.losses.clone(), adapters.arena.grad.clone()))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("model", ["mini-sdxl", "mini-sd3"])
def test_float16_steps_with_all_objectives_stay_finite(make_config: MakeConfig, model: str) -> None:
    settings = APT | {"model.path": model, "model.precision": "fp16", "stage.0.batch_size": 2}
    step, adapters = prepared(make_config("lora", **settings), load(model, torch.float16))
    # The scale that such a run finds for itself: at its first, 2^16, feature gradients overflow.
    step.loss_scale.scale.fill_(2.0**8)
    start = adapters.arena.flat.detach().clone()
    for _ in range(3):
        run_step(step)
    for row in metrics_of(step, 3):
        seen = (value for name, value in row.items() if not name.startswith("gamma/"))
        assert all(torch.tensor(value).isfinite() for value in seen), row
    assert not torch.equal(adapters.arena.flat.detach(), start)


@pytest.mark.parametrize(
    ("objective", "pattern", "near"),
    [
        ("feature_alignment", "up_blocks.1.attention.0", "up_blocks.1.attentions.0"),
        ("attention_alignment", "*.attn1", "transformer_blocks.0.attn2"),
    ],
)
def test_a_pattern_without_a_layer_is_refused_before_the_output_is_touched(
    make_config: MakeConfig, objective: str, pattern: str, near: str
) -> None:

    config = make_config("lora", **{f"{OBJECTIVES}.{objective}.layers": [pattern]})
    with pytest.raises(UserError) as refused:
        train(config, Console(quiet=True))
    message = str(refused.value)
    assert message.startswith(f"{OBJECTIVES}.{objective}.layers: {pattern!r} matches no layer")
    assert near in message
    assert not config.output.exists()


def test_patterns_choose_layers(make_config: MakeConfig) -> None:
    settings = {
        f"{OBJECTIVES}.feature_alignment.layers": ["mid_block.*", "down_blocks.2.*"],
        f"{OBJECTIVES}.attention_alignment.layers": ["down_blocks.0.*"],
    }
    family = load("mini-sdxl")
    config = make_config("lora", **settings)
    build_trainables(config, family)
    layers, attentions = layers_to_align(family, config.stage[0].objectives, OBJECTIVES)
    network = family.network
    wanted = ["down_blocks.2.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0"]
    assert layers == {name: network.get_submodule(name) for name in wanted}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    assert attentions == {name: network.get_submodule(name).processor}


@pytest.mark.parametrize("model", MINI_MODELS)
def test_train_takes_every_objective_from_the_command_line(
    photos: Path, tmp_path: Path, model: str
) -> None:
    arguments = ["train", "--recipe", "ppt-lora", "--model", model, "--photos", str(photos)]
    arguments += ["--class-noun", "robot", "--output", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--steps", "3", "--log-every", "2", "--batch-size", "2", "--no-samples"]
    for key, value in (APT | {"stage.0.base_every": 2}).items():
        arguments += ["--set", f"{key}={value}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    for number, row in enumerate(map(json.loads, lines)):
        names = ("feature_mean", "feature_std", "attention_alignment")
        values = [row[name] for name in names]
        assert values == [None] * 3 if number == 1 else min(values) > 0
        parts = row["denoising"] + row["anchor"]
        if number != 1:
            parts += 30 * (values[0] + values[1]) + 3e-4 * values[2]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert len(lines) == 3


def test_buckets_share_the_indicator(make_config: MakeConfig, tmp_path: Path, photos: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.glob("*"))):
        size = (96, 64) if number % 2 else (72, 72)
        Image.open(path).convert("RGB").resize(size).save(folder / f"{number}.png")
    settings = APT | {"photos.folder": str(folder), "photos.buckets": True}
    settings["photos.resolution"] = 64
    family = load("mini-sdxl")
    config = resolve(make_config("lora", **settings), family)
    trainables = build_trainables(config, family)
    buckets, _ = encode(config, family, find_photos(folder), Console(quiet=True))
    ring = MetricRing(metric_names(config.stage), 8, family.device)
    generator = new_generator(config, family)
    steps = build_steps(config, config.stage[0], family, trainables, buckets, ring, generator)
    first, second = steps
    assert first.latents.latent_shape != second.latents.latent_shape
    seen = []
    for step in (first, second, first):
        run_step(step)
        seen.append(int(second.indicator.base_ema.isfinite().sum()))
    assert seen[0] == 1 and seen == sorted(seen) and seen[2] > 1
    assert all(row["feature_mean"] > 0 for row in metrics_of(first, 3))


def test_a_later_stage_has_its_own_columns_in_one_ring(make_config: MakeConfig) -> None:
    config = make_config("lora", **APT)
    plain = make_config("lora")
    stages = [plain.stage[0], config.stage[0]]
    names = metric_names(stages)
    own = names[len(METRICS) :]
    assert names[: len(METRICS)] == METRICS and set(own) == {
        *("gamma", "feature_mean", "feature_std", "attention_alignment"),
        "prediction_difference",
    }
    step, _ = prepared(plain, load("mini-sdxl"))
    step = replace(step, ring=MetricRing(names, 4, step.family.device))
    run_step(step)
    (row,) = metrics_of(step, 1)
    assert row["loss"] == row["denoising"] > 0
    assert all(math.isnan(row[name]) for name in own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "backend", "checkpointed"),
    [
        ("mini-sd3", "aot_eager", True),
        ("mini-sdxl", "aot_eager", True),
        ("mini-sd3", "inductor", False),
    ],
)
def test_compiled_blocks_give_the_same_losses_and_gradients(
    make_config: MakeConfig, model: str, backend: str, checkpointed: bool
) -> None:
    """Also in steps with and without the base pass in turn, and for hooks that come later."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        family = load(model, torch.float64)
        settings = APT | {"model.path": model, "stage.0.batch_size": 2}
        step, adapters = prepared(make_config("lora", **settings), family)
        stir(adapters)
        if compiled:
            if checkpointed:
                family.checkpoint_blocks()
            compile_blocks_by(backend, family)
        for with_base in (True, False, True):
            accumulate_gradients(step, with_base=with_base)
        found.append((step.losses[1:3].clone(), adapters.arena.grad.clone()))
    for eager, compiled_ in zip(*found, strict=True):
        assert (compiled_ - eager).abs().max() <= 1e-10 * eager.abs().max()


@pytest.mark.slow
def test_a_hook_within_a_network_that_is_compiled_already_is_called(
    make_config: MakeConfig,
) -> None:
    torch._dynamo.reset()
    family = load("mini-sd3")
    plain = make_config("lora", **{"model.path": "mini-sd3"})
    aligned = make_config("lora", **(APT | {"model.path": "mini-sd3"}))
    step, adapters = prepared(plain, family)
    _allow_variants()
    family.network.compile(backend="eager")
    run_step(step)
    layers, _ = layers_to_align(family, aligned.stage[0].objectives, OBJECTIVES)
    later = replace(
        step,
        stage=aligned.stage[0].model_copy(update={"objectives": with_features_alone(aligned)}),
        feature_alignment=FeatureAlignment(family, [*layers.values()]),
        losses=torch.zeros(5),
    )
    stir(adapters)
    accumulate_gradients(later)
    assert later.losses[2:].min() > 0


def with_features_alone(config: RunConfig) -> ObjectivesConfig:
    objectives = config.stage[0].objectives
    return ObjectivesConfig(
        denoising=DenoisingConfig(), feature_alignment=objectives.feature_alignment
    )


@pytest.mark.gpu
@pytest.mark.parametrize("model", MINI_MODELS)
def test_ten_steps_with_all_objectives_do_not_synchronise_a_gpu(
    make_config: MakeConfig, model: str
) -> None:
    family = load_family(ModelConfig(path=model, device="cuda"))
    settings = APT | {"model.path": model, "model.device": "cuda", "stage.0.batch_size": 2}
    step, adapters = prepared(make_config("ppt-lora", **settings), family)
    stir(adapters)
    # Compiles the kernels, and the joint attention.
    for number in range(2):
        run_step(step, number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(10):
            run_step(step, number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for row in metrics_of(step, 12):
        assert row["feature_std"] > 0 and row["attention_alignment"] > 0 and row["grad_norm"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("model", MINI_MODELS)
def test_a_gpu_finds_the_losses_of_the_cpu(make_config: MakeConfig, model: str) -> None:
    """In float32, on the same draws: what is random comes from the CPU."""
    losses = []
    for device in ("cpu", "cuda"):
        family = load_family(ModelConfig(path=model, device=device, precision="fp32"))
        settings = APT | {"model.path": model, "model.device": device, "stage.0.batch_size": 2}
        step, adapters = prepared(make_config("lora", **settings), family)
        stir(adapters)
        chance = torch.Generator().manual_seed(1)
        shape = (2, *step.latents.latent_shape)
        draws = Draws(
            photos=torch.tensor([0, 1]),
            timesteps=torch.tensor([300, 700]),
            augmentations=torch.ones(2),
            view_fractions=torch.zeros(2),
            posterior_normals=torch.randn(shape, generator=chance),
            noise=torch.randn(shape, generator=chance),
        )
        moved = Draws(**{name: tensor.to(device) for name, tensor in vars(draws).items()})
        batch = make_batch(step, moved)
        base = base_pass(step, batch)
        with compared_with_base(step, batch):
            text = step.prompts.subject(batch.photos)
            prediction = family.predict(batch.noisy, batch.timesteps, text, batch.sizes)
            terms = loss_terms(step, batch, prediction, base)
        losses.append({name: term.sum().item() for name, term in terms.items()})
    for name, value in losses[0].items():
        assert losses[1][name] == pytest.approx(value, rel=2e-2, abs=1e-6), name
