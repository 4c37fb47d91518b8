"""The sampler draws what diffusers' schedulers draw, op by op and replayed, by the base."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import Family, PromptEmbeddings
from fastppt.families.loading import load_family
from fastppt.families.sampling import SamplerTable, ddim_table, euler_table, flow_table
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.trainables import Trainables
from fastppt.trainables_config import LoraConfig
from fastppt.training.graph import CudaRecorder, Recorder
from fastppt.training.sampler import Sampler
from fastppt_kernels.testing import ForbidHostReads
from tests.training.replay import ReplayRecorder

NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SIZE = (64, 64)


def network(shown: Tensor, time: Tensor) -> Tensor:
    """Anything smooth that tells latents and times apart."""
    return torch.tanh(shown * 1.3 + 0.2) + torch.sin(time.double() / 170).to(shown.dtype)


def follow(table: SamplerTable, noise: Tensor) -> list[Tensor]:
    """The latents after each step of a table."""
    latents, seen = noise * table.first_std, []
    for time, scale, keep, push in zip(
        table.times, table.scales, table.keeps, table.pushes, strict=True
    ):
        latents = keep * latents + push * network(latents * scale, time)
        seen.append(latents)
    return seen


def follow_scheduler(scheduler: Any, steps: int, noise: Tensor) -> list[Tensor]:
    """Likewise of a scheduler of diffusers, as its pipelines call it."""
    scheduler.set_timesteps(steps)
    latents, seen = noise * float(getattr(scheduler, "init_noise_sigma", 1.0)), []
    for time in scheduler.timesteps:
        shown = latents
        if hasattr(scheduler, "scale_model_input"):
            shown = scheduler.scale_model_input(latents, time)
        latents = scheduler.step(network(shown, time), time, latents, return_dict=False)[0]
        seen.append(latents)
    return seen


def differences(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_follows_diffusers_scheduler_step_by_step(
    prediction_type: str, spacing: str, steps: int, to_one: bool
) -> None:
    config = NOISE | {
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "steps_offset": 1 if spacing == "leading" else 0,
        "set_alpha_to_one": to_one,
    }
    scheduler = DDIMScheduler(**config, clip_sample=False)
    # Its float32 table, but what it computes from it in float64.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    noise = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    ours = follow(ddim_table(scheduler.config, steps), noise)
    assert max(differences(ours, follow_scheduler(scheduler, steps, noise))) < 1e-12


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("steps", [1, 7, pytest.param(50, marks=pytest.mark.slow)])
def test_euler_follows_diffusers_scheduler_step_by_step(
    prediction_type: str, spacing: str, karras: bool, steps: int
) -> None:
    scheduler = EulerDiscreteScheduler(
        **NOISE,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0,
        use_karras_sigmas=karras,
    )
    noise = torch.randn(2, 4, 3, 3)
    ours = follow(euler_table(scheduler.config, steps), noise.double())
    # That steps in float32.
    assert max(differences(ours, follow_scheduler(scheduler, steps, noise))) < 2e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 28])
def test_flow_follows_diffusers_scheduler_step_by_step(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    noise = torch.randn(2, 4, 3, 3)
    ours = follow(flow_table(scheduler.config, steps), noise.double())
    assert max(differences(ours, follow_scheduler(scheduler, steps, noise))) < 2e-5


def make_sampler(
    family: Family,
    trainables: Trainables | None = None,
    *,
    guidance_scale: float = 5.0,
    batch_size: int = 2,
    steps: int = 4,
    sampler: str | None = None,
    recorder: Recorder | None = None,
) -> Sampler:
    return Sampler(
        family,
        trainables or Trainables(),
        family.encode_prompts(["a photo of a robot"]),
        family.encode_negative(),
        size=SIZE,
        table=family.sampler_table(sampler or family.sampler, steps),
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        recorder=recorder,
    )


def stock_pictures(family: Any, seeds: list[int], guidance_scale: float, steps: int) -> np.ndarray:
    """What diffusers' own pipeline draws, with the scheduler that it has then."""
    prompt = family.encode_prompts(["a photo of a robot"] * len(seeds))
    drawn = family.sample(
        prompt,
        family.encode_negative(),
        seeds=seeds,
        resolution=SIZE[0],
        steps=steps,
        guidance_scale=guidance_scale,
    )
    return np.stack([np.asarray(picture) for picture in drawn])


@pytest.mark.parametrize(
    ("model", "sampler", "guidance_scale"),
    [
        ("mini-sdxl", "euler", 5.0),
        ("mini-sd3", "euler", 7.0),
        pytest.param("mini-sd", "ddim", 7.5, marks=pytest.mark.slow),
        pytest.param("mini-sd3", "euler", 0.0, marks=pytest.mark.slow),
        pytest.param("mini-sdxl", "euler", 1.0, marks=pytest.mark.slow),
        pytest.param("mini-sdxl", "ddim", 5.0, marks=pytest.mark.slow),
        pytest.param("mini-sd", "euler", 7.5, marks=pytest.mark.slow),
    ],
)
def test_pictures_are_those_of_the_stock_pipeline(
    model: str, sampler: str, guidance_scale: float
) -> None:
    family: Any = load_family(ModelConfig(path=model, device="cpu"))
    ours = make_sampler(family, guidance_scale=guidance_scale, sampler=sampler).draw([3, 4]).numpy()
    if model != "mini-sd3":
        kind = DDIMScheduler if sampler == "ddim" else EulerDiscreteScheduler
        config = family._pipeline.scheduler.config
        family._pipeline.scheduler = kind.from_config(config, clip_sample=False)
    theirs = stock_pictures(family, [3, 4], guidance_scale, 4)
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert ours.std() > 10


def test_a_picture_is_the_same_whatever_else_is_in_the_batch(family: Family) -> None:
    sampler = make_sampler(family)
    first = sampler.draw([3, 4])
    second = sampler.draw([3, 9])
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def with_moved_adapters(family: Family) -> Trainables:
    """Adapters that change what the network predicts."""
    adapters = LoraAdapters(
        family.make_adaptable(), LoraConfig(rank=2), seed=1, device=family.device
    )
    with torch.no_grad():
        adapters.arena.flat.add_(0.3)
    return Trainables({"lora": adapters})


def test_the_base_draws_whatever_the_adapters_are() -> None:
    plain = load_family(ModelConfig(path="mini-sd3", device="cpu"))
    wanted = make_sampler(plain).draw([3, 4])
    family = load_family(ModelConfig(path="mini-sd3", device="cpu"))
    moved = with_moved_adapters(family)
    assert torch.equal(make_sampler(family, moved).draw([3, 4]), wanted)
    # Without a base they would show.
    assert not torch.equal(make_sampler(family).draw([3, 4]), wanted)


def test_a_step_reads_nothing_on_the_host(family: Family) -> None:
    sampler = make_sampler(family)
    with ForbidHostReads():
        sampler.take_step()


@pytest.mark.parametrize("model", [pytest.param("mini-sdxl", marks=pytest.mark.slow), "mini-sd3"])
def test_replayed_steps_draw_the_eager_pictures_bit_for_bit(model: str) -> None:
    family = load_family(ModelConfig(path=model, device="cpu"))
    wanted = make_sampler(family)
    recorder = ReplayRecorder([])
    replayed = make_sampler(family, recorder=recorder)
    for seeds in ([3, 4], [5, 6]):
        assert torch.equal(replayed.draw(seeds), wanted.draw(seeds))
    assert len(recorder.recordings) == 1


def test_a_single_step_can_be_captured_too() -> None:
    """Its capture tries it out twice."""
    family = load_family(ModelConfig(path="mini-sd3", device="cpu"))
    replayed = make_sampler(family, steps=1, batch_size=1, recorder=ReplayRecorder([]))
    assert torch.equal(replayed.draw([3]), make_sampler(family, steps=1, batch_size=1).draw([3]))


def test_a_captured_step_is_let_go_of_with_what_it_works_in() -> None:
    """At once: the collector of garbage may come late, and training has the memory then."""
    family = load_family(ModelConfig(path="mini-sd3", device="cpu"))
    recorder = ReplayRecorder([])
    gc.disable()
    try:
        with closing(make_sampler(family, steps=1, recorder=recorder)) as sampler:
            sampler.draw([3, 4])
            assert sampler._captured is not None
            captured = weakref.ref(sampler._captured)
        assert captured() is None
    finally:
        gc.enable()


def test_predictions_that_are_not_finite_are_no_pictures(family: Family) -> None:
    sampler = make_sampler(family, steps=2)
    sampler.steps[-1, -1] = torch.inf
    with pytest.raises(UserError, match=r"in float32 are not finite.*set model.precision"):
        sampler.draw([3, 4])


@pytest.mark.slow
def test_latents_keep_their_precision_where_the_network_has_16_bits() -> None:
    family = load_family(ModelConfig(path="mini-sdxl", device="cpu"), dtype=torch.bfloat16)
    sampler = make_sampler(family)
    assert sampler.latents.dtype == torch.float32
    narrow, wide = (
        sampler.draw([3, 4]),
        make_sampler(load_family(ModelConfig(path="mini-sdxl", device="cpu"))).draw([3, 4]),
    )
    assert (narrow.int() - wide.int()).abs().float().mean() < 3


@pytest.mark.slow
def test_pictures_are_decoded_a_few_at_a_time(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = make_sampler(family, batch_size=3).draw([3, 4, 5])
    rows: list[int] = []
    decode: Callable[[Tensor], Tensor] = family.decode_latents

    def counted(latents: Tensor) -> Tensor:
        rows.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(family, "decode_latents", counted)
    monkeypatch.setattr("fastppt.training.sampler.DECODED_PIXELS", 2 * SIZE[0] * SIZE[1])
    found = make_sampler(family, batch_size=3).draw([3, 4, 5])
    assert rows == [2, 1]
    assert (found.int() - wanted.int()).abs().max() <= 1


def test_a_flow_model_has_no_ddim() -> None:
    family = load_family(ModelConfig(path="mini-sd3", device="cpu"))
    with pytest.raises(UserError, match="sampler: ddim is for models that were trained by DDPM"):
        family.sampler_table("ddim", 4)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sd3"])
def test_captured_steps_draw_the_eager_pictures(model: str) -> None:
    family = load_family(ModelConfig(path=model, device="cuda"))
    trainables = with_moved_adapters(family)
    wanted = make_sampler(family, trainables)
    captured = make_sampler(family, trainables, recorder=CudaRecorder(family.device, []))
    for seeds in ([3, 4], [5, 6]):
        assert torch.equal(captured.draw(seeds), wanted.draw(seeds))


def test_prompts_stand_behind_the_negative_one(family: Family) -> None:
    """As the stock pipelines order them, and as many as pictures."""
    sampler = make_sampler(family, batch_size=3)
    prompt, negative = family.encode_prompts(["a photo of a robot"]), family.encode_negative()
    wanted = PromptEmbeddings(negative.tokens, negative.pooled)
    assert torch.equal(sampler.tokens[:3], wanted.tokens.expand(3, -1, -1))
    assert torch.equal(sampler.tokens[3:], prompt.tokens.expand(3, -1, -1))
