"""What a run is predicted to take is what it takes, and what counting by hand gives."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.networks import FullModel
from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.families.loading import load_family, outline_family
from fastppt.training.build import build_trainables
from fastppt.training.class_images import find_class_images
from fastppt.training.live_bytes import LiveBytes
from fastppt.training.loop import resolve
from fastppt.training.memory import MemoryPlan, plan_memory
from fastppt.training.step import accumulate_gradients
from tests.training.memory_steps import (
    APT,
    DCO,
    EIGHT_BIT,
    HOST,
    RAW,
    build_full_size,
    prepared,
)
from tests.training.objective_steps import ONE_FAST
from tests.training.weight_steps import APT as WEIGHTS_APT
from tests.training.weight_steps import weights_config

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")


def planned(config: RunConfig, dtype: torch.dtype = torch.float32) -> MemoryPlan:
    family = outline_family(config.model, dtype)
    assert family is not None
    return plan_memory(config.model_copy(update={"engine": "eager"}), family)


@pytest.mark.parametrize("model", ONE_FAST)
@pytest.mark.parametrize(
    ("objectives", "checkpointing"),
    [({}, False), (APT, False), (APT, True)],
    ids=["plain", "apt", "apt-checkpointed"],
)
def test_a_step_takes_what_is_predicted(
    make_config: MakeConfig, model: str, objectives: dict[str, Any], checkpointing: bool
) -> None:
    settings = {"model.path": model, "gradient_checkpointing": checkpointing, "photos.views": 2}
    config = make_config(**settings, **objectives, **{"stage.0.batch_size": 2})
    plan = planned(config)
    step = prepared(config)
    with LiveBytes(CPU) as counter, counter.kept_for_backward():
        accumulate_gradients(step)
    assert plan.kept == pytest.approx(counter.kept, rel=0.01)
    in_step = plan.peaks["train"] - sum(plan.lasting.values())
    assert in_step == pytest.approx(counter.peak, rel=0.02)


def test_what_lasts_is_what_the_run_holds(make_config: MakeConfig) -> None:
    config = make_config(**APT, **{"photos.views": 3})
    lasting = planned(config).lasting
    step = prepared(config)
    arena = step.optimizer.param_groups[0]["params"][0]
    state = step.optimizer.state[arena]
    storages = [p.untyped_storage() for p in step.family.network.parameters()]
    network = {storage._cdata: storage.nbytes() for storage in storages}
    assert lasting["network"] == sum(network.values())
    assert lasting["trained values"] == lasting["gradients"] == arena.nbytes
    assert lasting["working copy"] == 0
    assert lasting["moments"] == state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    assert lasting["anchors"] == 0
    assert lasting["latents"] == step.latents.posteriors.nbytes
    assert 0 < lasting["tables and metrics"] < 4096


@pytest.mark.parametrize(
    ("settings", "anchored"),
    [
        ({}, False),
        ({"stage.0.objectives.anchor.form": "raw"}, True),
        ({"stage.0.objectives.anchor.form": "raw", "stage.0.objectives.anchor.to": "zero"}, False),
    ],
)
def test_anchors_count_where_they_are_kept(
    make_config: MakeConfig, settings: dict[str, Any], anchored: bool
) -> None:
    lasting = planned(make_config(**settings)).lasting
    assert lasting["anchors"] == (lasting["trained values"] if anchored else 0)


@pytest.mark.slow
def test_half_precision_halves_the_network_and_costs_a_copy_of_the_adapters(
    make_config: MakeConfig,
) -> None:
    config = make_config()
    wide, narrow = planned(config), planned(config, torch.bfloat16)
    assert 2 * narrow.lasting["network"] == wide.lasting["network"]
    assert 2 * narrow.lasting["working copy"] == narrow.lasting["trained values"]
    assert narrow.lasting["moments"] == wide.lasting["moments"]
    assert narrow.kept < 0.7 * wide.kept


@pytest.mark.slow
def test_a_larger_batch_and_picture_take_more_and_checkpointing_takes_less(
    make_config: MakeConfig,
) -> None:
    def kept(**settings: Any) -> int:
        return planned(make_config(**settings)).kept

    plain = kept()
    assert kept(**{"stage.0.batch_size": 2}) == pytest.approx(2 * plain, rel=0.05)
    assert kept(**{"photos.resolution": 128}) > 3 * plain
    assert kept(gradient_checkpointing=True) < 0.5 * plain
    assert kept(**{"stage.0.trainables.lora.targets": "up"}) < 0.8 * plain


@pytest.mark.slow
def test_phases_hold_what_they_need(make_config: MakeConfig) -> None:
    config = make_config(**APT, **{"samples.enabled": True})
    family = outline_family(config.model, torch.float32)
    weights = family.weight_bytes()
    eager = plan_memory(config.model_copy(update={"engine": "eager"}), family)
    assert eager.peaks["encode"] > sum(weights.values())
    assert eager.peaks["samples"] > sum(eager.lasting.values()) + weights["VAE"]
    graph = plan_memory(
        config.model_copy(update={"engine": "graph"}), outline_family(config.model, torch.float32)
    )
    in_step = eager.peaks["train"] - sum(eager.lasting.values())
    assert graph.peaks["samples"] == eager.peaks["samples"] + in_step
    refreshed = planned(make_config(**APT, **{"photos.refresh_every": 5}))
    assert refreshed.peaks["train"] > eager.peaks["train"] + weights["VAE"]
    assert "samples" not in refreshed.peaks


def test_a_mistake_is_refused_as_the_run_would_refuse_it(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="resolution must be a multiple of 16"):
        planned(make_config(**{"photos.resolution": 72}))


def full_size_plan(name: FullModel, make_config: MakeConfig, **settings: Any) -> MemoryPlan:
    """The plan of a published model in full size, rank 32, batch 1, five photos, in bf16."""
    size = {"stage.0.trainables.lora.rank": 32, "photos.resolution": None}
    config = make_config(**size, **settings, **{"engine": "eager", "samples.enabled": True})
    return plan_memory(config, build_full_size(name, "meta"))


@pytest.mark.slow
def test_sdxl_in_full_size_adds_up(make_config: MakeConfig) -> None:
    """Every number below is counted by hand from the published configuration."""
    plain, apt = full_size_plan("sdxl", make_config), full_size_plan("sdxl", make_config, **APT)
    num_weights, num_trained = 2_567_463_684, 46_448_640
    latent, num_photos, num_views = 4 * 128 * 128, 5, 16
    # One subject and one class prompt, five prompts of the sample grid, and the negative one.
    num_prompts, text, pooled = 2 + 5 + 1, 77 * 2048, 1280
    lasting = {
        "network": 2 * num_weights,
        "trained values": 4 * num_trained,
        "gradients": 4 * num_trained,
        "working copy": 2 * num_trained,
        "moments": 8 * num_trained,
        "anchors": 0,
        "latents": num_photos * (1 + num_views) * 2 * 4 * latent,
        "prompts": num_prompts * 2 * (text + pooled),
    }
    assert {name: apt.lasting[name] for name in lasting} == lasting
    assert plain.lasting["latents"] == num_photos * 2 * 4 * latent
    assert apt.lasting["tables and metrics"] < 64 * 1024
    # up_blocks.0: three attentions of ten blocks at 32x32; up_blocks.1: three of two at 64x64.
    map_sums = 4 * 77 * (30 * 32**2 + 6 * 64**2)
    statistics = 4 * 2 * 3 * (1280 + 640)
    prediction = 2 * latent
    assert plain.remembered == 0
    assert apt.remembered == pytest.approx(map_sums + statistics + prediction, abs=4096)
    # The tuned pass keeps the difference of the maps, and features that nothing else keeps; query
    # and key are kept by attention anyway.
    features = 2 * 3 * (1280 * 32**2 + 640 * 64**2)
    assert apt.kept - plain.kept == pytest.approx(map_sums + features, rel=0.01)
    assert apt.peaks["train"] <= 1.05 * plain.peaks["train"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd3-medium"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_apt_takes_five_per_cent_more_at_most(
    make_config: MakeConfig, name: FullModel, checkpointing: bool
) -> None:
    settings = {"gradient_checkpointing": checkpointing}
    plain = full_size_plan(name, make_config, **settings)
    apt = full_size_plan(name, make_config, **settings, **APT)
    assert plain.peaks["train"] < apt.peaks["train"] <= 1.05 * plain.peaks["train"]


BF16 = {"model.precision": "bf16"}


def kind(
    name: str,
    trainables: dict[str, Any],
    objectives: dict[str, Any] | None = None,
    *,
    fast: bool = False,
    of_stage: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    marks = () if fast else pytest.mark.slow
    of_stage = {"trainables": trainables, "objectives": objectives or RAW, **(of_stage or {})}
    return pytest.param(of_stage, settings, id=name, marks=marks)


KINDS = [
    kind("full", {"full": {}}, fast=True, of_stage={"ema_decay": 0.9}),
    kind("full-bf16", {"full": {}}, **BF16),
    kind("full-bf16-base", {"full": {}}, DCO, **BF16),
    kind("full-bf16-alone", {"full": {"master_weights": False}}, HOST, of_stage=EIGHT_BIT, **BF16),
    kind("full-up", {"full": {"targets": ["up_blocks.*"]}}, WEIGHTS_APT),
    kind("full-checkpointed", {"full": {}}, gradient_checkpointing=True),
    kind("custom_diffusion", {"custom_diffusion": {}, "tokens": {}}),
    kind("svdiff", {"svdiff": {}}),
    kind("svdiff-bf16", {"svdiff": {}}, WEIGHTS_APT, **BF16),
    *(kind(name, {name: {}}) for name in ("dora", "loha", "lokr", "boft")),
    kind("oft", {"oft": {"block_size": 16}}),
    kind("tokens", {"tokens": {}}),
    kind("text", {"text_encoder_lora": {}}, {"denoising": {}}),
    kind("prior", {"lora": {}}, {"denoising": {}, "prior_preservation": {"num_images": 4}}),
]


@pytest.mark.parametrize(("of_stage", "settings"), KINDS)
def test_a_run_of_every_trainable_holds_and_takes_what_is_predicted(
    photos: Path, of_stage: dict[str, Any], settings: dict[str, Any]
) -> None:
    prior = of_stage["objectives"].get("prior_preservation")
    if prior is not None:
        prior["folder"] = str(photos)
    words = {"prompts.token": "<v>"} if "tokens" in of_stage["trainables"] else {}
    config = weights_config(photos, [{"steps": 6, **of_stage}], **settings, **words)
    dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
    plan = planned(config, dtype)
    before = tensors_alive()
    family = load_family(config.model)
    step = prepared(config, family)
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_alive()}
    others = [*before, *family.vae.parameters(), *family.vae.buffers()]
    for tensor in others:
        held.pop(tensor.untyped_storage()._cdata, None)
    assert sum(plan.lasting.values()) == pytest.approx(sum(held.values()), rel=0.02)
    assert plan.host == 0
    # All that is large has a name.
    assert 0 < plan.lasting["tables and metrics"] < 64 * 1024
    with LiveBytes(CPU) as counter, counter.kept_for_backward():
        accumulate_gradients(step)
    assert plan.kept == pytest.approx(counter.kept, rel=0.02)
    in_step = plan.peaks["train"] - sum(plan.lasting.values())
    assert in_step == pytest.approx(counter.peak, rel=0.02)


def tensors_alive() -> list[torch.Tensor]:
    """Every tensor that Python knows of."""
    gc.collect()
    return [
        each
        for each in gc.get_objects()
        if issubclass(type(each), torch.Tensor) and each.device == CPU
    ]


def test_anchors_of_a_gpu_that_lie_in_host_memory_are_counted_there(photos: Path) -> None:
    stages = [{"steps": 6, "trainables": {"full": {}}, "objectives": HOST}]
    here = planned(weights_config(photos, stages))
    there = planned(weights_config(photos, stages, model__device="cuda"))
    assert here.host == 0 and there.host == here.lasting["anchors"] > 0
    # Two buffers of as much as there is, and no more: a mini model is smaller than they are.
    assert there.lasting["anchors"] == 0
    assert there.lasting["anchor buffers"] == 2 * there.host
    same = ("trained values", "gradients", "moments", "network")
    assert all(there.lasting[name] == here.lasting[name] for name in same)


@pytest.mark.slow
def test_class_images_take_what_is_predicted(make_config: MakeConfig, tmp_path: Path) -> None:
    prior = {"batch_size": 2, "num_images": 2, "steps": 1, "cache": str(tmp_path)}
    objective = {f"stage.0.objectives.prior_preservation.{k}": v for k, v in prior.items()}
    config, plain = make_config("lora", **objective), planned(make_config("lora"))
    plan = planned(config)
    assert list(plan.peaks) == ["class images", "encode", "train"]
    family = load_family(config.model)
    config = resolve(config, family)
    trainables = build_trainables(config, family)
    with LiveBytes(CPU) as counter:
        find_class_images(config, family, trainables, "", Console(quiet=True), None)
    held = sum(family.weight_bytes().values())
    held += sum(2 * arena.flat.nbytes for arena in trainables.arenas.values())
    # The host has the noise and the pictures too.
    assert plan.peaks["class images"] - held == pytest.approx(counter.peak, rel=0.05)
    of_photos = plain.lasting["latents"]
    assert plan.lasting["latents"] == of_photos + of_photos // 5 * 2
    # Two halves of a batch.
    assert plan.kept == pytest.approx(2 * plain.kept, rel=0.05)


@pytest.mark.slow
def test_a_24_gb_card_has_room_for_all_weights_of_sdxl(photos: Path) -> None:
    """Every number is counted by hand from the number of weights; parts of the arena are padded."""
    of_stage = {
        "trainables": {"full": {"master_weights": False}},
        "objectives": HOST,
        "optimizer": {"moments": "8bit"},
    }
    settings = {"gradient_checkpointing": True, "engine": "eager", "samples.enabled": True}
    config = weights_config(
        photos, [{"steps": 6, **of_stage}], "owner/name", **settings, model__device="cuda"
    )
    plan = plan_memory(config, build_full_size("sdxl", "meta"))
    num_weights = 2_567_463_684
    counted = {
        "trained values": 2 * num_weights,
        "gradients": 2 * num_weights,
        "moments": 2 * num_weights * (1 + 4 / 256),
        "anchor buffers": 2 * 2**24,
    }
    for name, size in counted.items():
        assert plan.lasting[name] == pytest.approx(size, rel=1e-4)
    assert plan.host == pytest.approx(2 * num_weights, rel=1e-4)
    assert sum(plan.lasting.values()) == pytest.approx(sum(counted.values()), rel=1e-3)
    assert plan.peak < 20e9
