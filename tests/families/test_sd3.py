"""Noise, targets, timesteps, latents, prompts and pictures agree with diffusers' own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import PromptEmbeddings
from fastppt.families.joint_attention import JointAttention
from fastppt.families.loading import load_family, resolve_resolution
from fastppt.families.sd3 import StableDiffusion3
from fastppt.mini.sd3 import build_mini_sd3
from fastppt.mini.tokenizer import MODEL_MAX_LENGTH
from fastppt_kernels.testing import ForbidHostReads

PROMPTS = ["a photo of sks dog", "a sketch of a boat in the snow"]


def family_of(
    pipeline: StableDiffusion3Pipeline, dtype: torch.dtype = torch.float32, **model: object
) -> StableDiffusion3:
    config = ModelConfig(path="mini-sd3", **model)
    return StableDiffusion3(pipeline, config, torch.device("cpu"), dtype)


@pytest.fixture
def family() -> StableDiffusion3:
    return family_of(build_mini_sd3())


@pytest.fixture
def family_float64() -> StableDiffusion3:
    return family_of(build_mini_sd3(), torch.float64)


def without_t5(pipeline: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    parts = pipeline.components | {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline(**parts)


def stock_prompts(
    prompts: list[str], num_t5_tokens: int, *, pipeline: StableDiffusion3Pipeline | None = None
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        tokens, _, pooled, _ = (pipeline or build_mini_sd3()).encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=num_t5_tokens,
        )
    return tokens, pooled


def test_mini_model_loads_as_this_family() -> None:
    family = load_family(ModelConfig(path="mini-sd3", device="cpu"))
    assert isinstance(family, StableDiffusion3)
    assert (family.num_timesteps, family.native_resolution, family.resolution_step) == (1000, 64, 8)


def test_a_side_beyond_the_position_embedding_is_refused(family: StableDiffusion3) -> None:
    largest = family.network.config.pos_embed_max_size * family.resolution_step
    assert resolve_resolution(largest, family) == largest
    with pytest.raises(UserError, match=f"at most {largest} for mini-sd3, got {largest + 8}"):
        resolve_resolution(largest + 8, family)


def test_noise_is_that_of_diffusers_and_timesteps_count_from_the_least(
    family_float64: StableDiffusion3,
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = torch.randn(2, 5, 16, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    noisy = family_float64.add_noise(latents, noise, timesteps)
    wanted = scheduler.scale_noise(latents, scheduler.timesteps.flip(0)[timesteps], noise)
    torch.testing.assert_close(noisy, wanted, rtol=1e-12, atol=1e-12)
    # Of the last timestep nothing but noise is left, of the first nearly nothing of it.
    assert torch.equal(noisy[-1], noise[-1])
    assert (noisy[0] - latents[0]).abs().max() < 0.03


def test_sigmas_are_shifted_as_published(family_float64: StableDiffusion3) -> None:
    # arXiv 2403.03206, eq. 23: s = shift t / (1 + (shift - 1) t).
    times = torch.arange(1, 1001, dtype=torch.float64) / 1000
    wanted = 3 * times / (1 + 2 * times)
    zero, one = torch.zeros(1000, 1, 1, 1).double(), torch.ones(1000, 1, 1, 1).double()
    sigmas = family_float64.add_noise(zero, one, torch.arange(1000)).flatten()
    # diffusers computes them in float32.
    torch.testing.assert_close(sigmas, wanted, rtol=3e-7, atol=0)


def test_shift_of_the_scheduler_is_followed() -> None:
    pipeline = build_mini_sd3()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    one = torch.ones(1, 1, 1, 1)
    sigma = family_of(pipeline).add_noise(torch.zeros_like(one), one, torch.tensor([499]))
    assert sigma.item() == 0.5


def test_used_scheduler_gives_the_same_noise(family: StableDiffusion3) -> None:
    pipeline = build_mini_sd3()
    pipeline.scheduler.set_timesteps(7)
    latents, noise = torch.randn(2, 3, 16, 4, 4)
    timesteps = torch.tensor([3, 700, 999])
    assert torch.equal(
        family_of(pipeline).add_noise(latents, noise, timesteps),
        family.add_noise(latents, noise, timesteps),
    )


def test_target_is_the_velocity_that_the_sampler_follows(family_float64: StableDiffusion3) -> None:
    latents, noise = torch.randn(2, 1, 16, 4, 4, dtype=torch.float64)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    index = torch.tensor([600])
    noisy = family_float64.add_noise(latents, noise, index)
    target = family_float64.target(latents, noise, index)
    assert torch.equal(target, noise - latents)
    # The schedule of training: one step takes it to the next less noisy timestep.
    stepped = scheduler.step(target, scheduler.timesteps.flip(0)[600], noisy).prev_sample
    wanted = family_float64.add_noise(latents, noise, index - 1)
    torch.testing.assert_close(stepped.double(), wanted, rtol=1e-5, atol=1e-6)


def test_timesteps_are_logit_normal(family: StableDiffusion3) -> None:
    num_draws, num_bins = 40_000, 20
    timesteps = family.draw_timesteps(num_draws, torch.Generator().manual_seed(0))
    assert timesteps.dtype == torch.int64
    counts = (timesteps // (1000 // num_bins)).bincount(minlength=num_bins)
    assert len(counts) == num_bins
    edges = torch.arange(num_bins + 1, dtype=torch.float64) / num_bins
    below = 0.5 * (1 + torch.erf(torch.logit(edges) / math.sqrt(2)))
    expected = num_draws * below.diff()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 19 degrees of freedom: mean 19, standard deviation 6.2.
    assert chi_square < 19 + 4 * 6.2


def test_extreme_draws_stay_inside_the_range(
    family: StableDiffusion3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn", lambda *shape, **settings: torch.tensor([-100.0, 0, 100]))
    assert family.draw_timesteps(3, torch.Generator()).tolist() == [0, 500, 999]


def test_network_is_told_sigma_times_the_number_of_timesteps(family: StableDiffusion3) -> None:
    told = {}
    family.network.register_forward_pre_hook(
        lambda module, inputs, named: told.update(named), with_kwargs=True
    )
    timesteps = torch.tensor([0, 499, 999])
    prompts = family.encode_prompts(["a dog"] * 3)
    with torch.no_grad():
        family.predict(torch.zeros(3, 16, 16, 16), timesteps, prompts, torch.empty(3, 0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.equal(told["timestep"], scheduler.timesteps.flip(0)[timesteps])
    assert told["timestep"].dtype == torch.float32
    assert told["pooled_projections"] is prompts.pooled


def test_step_reads_nothing_on_the_host(family: StableDiffusion3) -> None:
    family.make_adaptable()
    prompts = family.encode_prompts(PROMPTS)
    latents, noise = torch.randn(2, 2, 16, 16, 16)
    generator, sizes = torch.Generator().manual_seed(0), torch.empty(2, 0)
    with torch.no_grad(), ForbidHostReads():
        timesteps = family.draw_timesteps(2, generator)
        noisy = family.add_noise(latents, noise, timesteps)
        prediction = family.predict(noisy, timesteps, prompts, sizes)
        loss = (prediction - family.target(latents, noise, timesteps)).square().mean()
    assert loss.isfinite()


def test_latents_are_the_shifted_and_scaled_posterior_of_the_vae(
    family_float64: StableDiffusion3,
) -> None:
    vae = build_mini_sd3().vae.double()
    pixels = torch.rand(1, 3, 64, 64, dtype=torch.float64) * 2 - 1
    mean, std = family_float64.encode_photos(pixels)
    normals = torch.randn_like(mean)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    # As diffusers' train_dreambooth_lora_sd3.py scales them.
    latents = (posterior.mean + posterior.std * normals - vae.config.shift_factor) * (
        vae.config.scaling_factor
    )
    # The two factors are kept in float32.
    torch.testing.assert_close(mean + std * normals, latents, rtol=1e-7, atol=1e-7)


def test_network_is_told_no_sizes(family: StableDiffusion3) -> None:
    assert family.size_conditions((480, 640), (0, 80), (64, 64)).shape == (0,)


def test_prompts_are_encoded_as_the_pipeline_does_with_as_many_tokens_as_clip_reads(
    family: StableDiffusion3,
) -> None:
    ours = family.encode_prompts(PROMPTS)
    tokens, pooled = stock_prompts(PROMPTS, MODEL_MAX_LENGTH)
    assert ours.tokens.shape == (2, 2 * MODEL_MAX_LENGTH, 160)
    assert torch.equal(ours.tokens, tokens)
    assert torch.equal(ours.pooled, pooled)
    assert torch.equal(ours[1:2].tokens, tokens[1:2])


@pytest.mark.parametrize("max_tokens", [5, 40])
def test_t5_reads_as_many_tokens_as_are_asked_for(max_tokens: int) -> None:
    ours = family_of(build_mini_sd3(), max_tokens=max_tokens).encode_prompts(PROMPTS)
    tokens, pooled = stock_prompts(PROMPTS, max_tokens)
    assert ours.tokens.shape[1] == MODEL_MAX_LENGTH + max_tokens
    assert torch.equal(ours.tokens, tokens)
    assert torch.equal(ours.pooled, pooled)


def test_prompts_without_t5_are_those_of_the_clips_alone() -> None:
    pipeline = build_mini_sd3()
    family = family_of(pipeline, large_text_encoder=False)
    assert pipeline.text_encoder_3 is pipeline.tokenizer_3 is None
    ours = family.encode_prompts(PROMPTS)
    tokens, pooled = stock_prompts(PROMPTS, 6, pipeline=without_t5(build_mini_sd3()))
    assert (tokens[:, MODEL_MAX_LENGTH:] == 0).all()
    assert torch.equal(ours.tokens, tokens[:, :MODEL_MAX_LENGTH])
    assert torch.equal(ours.pooled, pooled)


def test_model_that_comes_without_t5_is_trained_without() -> None:
    family = family_of(without_t5(build_mini_sd3()))
    assert family.encode_prompts(PROMPTS).tokens.shape[1] == MODEL_MAX_LENGTH


def test_number_of_tokens_of_a_dropped_t5_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.max_tokens 9: is for the largest text encoder"):
        family_of(build_mini_sd3(), large_text_encoder=False, max_tokens=9)


def test_long_prompt_is_truncated_where_neither_clip_nor_t5_reads_on() -> None:
    prompt = "a photo of " + "dog " * 40
    assert family_of(build_mini_sd3()).truncated_text(prompt).split() == ["dog"] * 20
    assert family_of(build_mini_sd3(), max_tokens=60).truncated_text(prompt) is None
    family = family_of(build_mini_sd3(), large_text_encoder=False)
    assert family.truncated_text(prompt).split() == ["dog"] * 21


@pytest.mark.parametrize(
    ("model", "num_t5_tokens"), [({}, MODEL_MAX_LENGTH), ({"max_tokens": 40}, 40)]
)
def test_sample_equals_the_stock_pipeline(model: dict[str, object], num_t5_tokens: int) -> None:
    family = family_of(build_mini_sd3(), **model)
    family.make_adaptable()
    prompt = "a photo of a dog on the beach"
    (ours,) = draw(family, family.encode_prompts([prompt]))
    theirs = build_mini_sd3()(
        prompt,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        max_sequence_length=num_t5_tokens,
    )
    assert np.array_equal(np.asarray(ours), np.asarray(theirs.images[0]))


def test_sample_without_t5_equals_the_stock_pipeline_without_t5() -> None:
    family = family_of(build_mini_sd3(), large_text_encoder=False)
    (ours,) = draw(family, family.encode_prompts([PROMPTS[0]]))
    theirs = without_t5(build_mini_sd3())(
        PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        **family.prompt_options,
    )
    assert np.array_equal(np.asarray(ours), np.asarray(theirs.images[0]))


def draw(
    family: StableDiffusion3, prompts: PromptEmbeddings, negative: PromptEmbeddings | None = None
) -> list[object]:
    return list(
        family.sample(
            prompts,
            family.encode_negative() if negative is None else negative,
            seeds=[7],
            resolution=64,
            steps=4,
            guidance_scale=5.0,
        )
    )


def test_released_encoders_can_still_draw_pictures(family: StableDiffusion3) -> None:
    prompt, negative = family.encode_prompts(["a dog"]), family.encode_negative()
    (before,) = draw(family, prompt, negative)
    family.release_encoders()
    (after,) = draw(family, prompt, negative)
    assert before.tobytes() == after.tobytes()


def test_every_attention_is_adaptable_but_for_the_unread_query(family: StableDiffusion3) -> None:
    names = [name for group in family.make_adaptable() for name in group.names]
    assert len(names) == 3 * 8 - 2
    assert family.unread_projections == ("transformer_blocks.2.attn.add_q_proj",)
    assert not set(names) & set(family.unread_projections)
    blocks = family.network.transformer_blocks
    assert all(isinstance(block.attn.processor, JointAttention) for block in blocks)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), EulerDiscreteScheduler()])
def test_scheduler_of_another_kind_is_refused(scheduler: object) -> None:
    pipeline = build_mini_sd3()
    pipeline.scheduler = scheduler
    with pytest.raises(UserError, match=rf"its scheduler is a {type(scheduler).__name__}"):
        family_of(pipeline)


def test_dynamic_shifting_is_refused() -> None:
    pipeline = build_mini_sd3()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(UserError, match="use_dynamic_shifting"):
        family_of(pipeline)


@pytest.mark.parametrize(
    ("config", "kohya", "modelspec"),
    [
        ({}, "3-medium", "stable-diffusion-3-medium"),
        ({"qk_norm": "rms_norm"}, "3-5-large", "stable-diffusion-3.5-large"),
        (
            {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
            "3-5-medium",
            "stable-diffusion-3.5-medium",
        ),
    ],
)
def test_versions_are_told_apart_for_the_files(
    config: dict[str, object], kohya: str, modelspec: str
) -> None:
    pipeline = build_mini_sd3()
    pipeline.transformer.register_to_config(**config)
    family = family_of(pipeline)
    assert family.kohya_model_version == kohya
    assert family.modelspec_architecture == modelspec
