"""Noise, targets, latents, prompts and pictures of SD 1.x and 2.x agree with diffusers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.attention import make_adaptable
from fastppt.families.backends import resolve_attention
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.families.sd import StableDiffusion
from fastppt.mini.sd import Version, build_mini_sd

# Two ways to compute in float64.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
VERSIONS: tuple[Version, ...] = ("1.5", "2.1")
# scheduler_config.json as stable-diffusion-v1-5, -2-1-base and -2-1 ship it, without versions.
SHIPPED = {
    "1.5": {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "2.1": {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
}


def family_of(
    pipeline: StableDiffusionPipeline, dtype: torch.dtype = torch.float64
) -> StableDiffusion:
    return StableDiffusion(pipeline, ModelConfig(path="mini-sd"), torch.device("cpu"), dtype)


def family_with(scheduler: Any, version: Version = "1.5") -> StableDiffusion:
    pipeline = build_mini_sd(version=version)
    pipeline.scheduler = scheduler
    return family_of(pipeline)


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Version:
    return request.param


def assert_agrees(family: StableDiffusion, scheduler: DDPMScheduler) -> None:
    """Noise and target of a family are those of diffusers' scheduler, at early and late steps."""
    latents, noise = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    # diffusers casts its float32 table to the samples' dtype before the root, as we do.
    noisy = scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(family.add_noise(latents, noise, timesteps), noisy, **CLOSE)
    wanted = noise
    if scheduler.config.prediction_type == "v_prediction":
        wanted = scheduler.get_velocity(latents, noise, timesteps)
        assert not torch.equal(wanted, noise)
    torch.testing.assert_close(family.target(latents, noise, timesteps), wanted, **CLOSE)


def test_noise_and_target_are_those_of_the_shipped_schedulers(
    version: Version, tmp_path: Path
) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SHIPPED[version]))
    shipped = {"1.5": PNDMScheduler, "2.1": DDIMScheduler}[version].from_pretrained(tmp_path)
    prediction_type = {"1.5": "epsilon", "2.1": "v_prediction"}[version]
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    )
    for family in (family_with(shipped, version), family_of(build_mini_sd(version=version))):
        assert family.prediction_type == prediction_type
        assert family.num_timesteps == 1000
        assert_agrees(family, scheduler)


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_is_respected(scheduler_class: type, prediction_type: str) -> None:
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": True,
    }
    family = family_with(scheduler_class(**config))
    assert_agrees(family, DDPMScheduler(**config))
    latents, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    # Nothing of the latents is left at the last step.
    assert torch.equal(family.add_noise(latents, noise, torch.tensor([999])), noise)


@pytest.mark.parametrize("scheduler_class", [PNDMScheduler, DPMSolverMultistepScheduler])
def test_trained_betas_are_respected(scheduler_class: type) -> None:
    betas = torch.linspace(1e-4, 0.03, 1000).pow(1.1).tolist()
    family = family_with(scheduler_class(trained_betas=betas))
    assert_agrees(family, DDPMScheduler(trained_betas=betas))


def test_schedulers_own_defaults_do_not_leak_into_the_table() -> None:
    # A class other than DDPM's, with a schedule other than DDPM's default.
    family = family_with(DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"))
    assert_agrees(family, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(UserError, match="predicts 'sample'"):
        family_with(DDIMScheduler(prediction_type="sample"))


@pytest.mark.parametrize(
    "scheduler_class", [EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler]
)
def test_a_scheduler_without_the_noise_of_ddpm_is_refused(scheduler_class: type) -> None:
    # Published with SDXL's pipeline, and its prediction type is epsilon as well.
    with pytest.raises(UserError, match=rf"is a {scheduler_class.__name__}, .* no beta_schedule"):
        family_with(scheduler_class())


def test_timesteps_are_uniform_over_the_whole_range() -> None:
    family = family_of(build_mini_sd())
    timesteps = family.draw_timesteps(40_000, torch.Generator().manual_seed(0))
    counts = timesteps.bincount(minlength=1000)
    assert len(counts) == 1000
    chi_square = ((counts - 40.0) ** 2 / 40.0).sum()
    # 999 degrees of freedom: mean 999, standard deviation 45.
    assert chi_square < 999 + 4 * 45


def test_latents_are_the_scaled_posterior_of_the_vae() -> None:
    pipeline = build_mini_sd()
    pipeline.vae.register_to_config(scaling_factor=0.18215)
    family = family_of(pipeline)
    vae = pipeline.vae
    pixels = torch.rand(1, 3, 64, 64, dtype=torch.float64) * 2 - 1
    mean, std = family.encode_photos(pixels)
    posterior = vae.encode(pixels).latent_dist
    # As diffusers' DreamBooth script scales them.
    normal = torch.randn_like(mean)
    latents = (posterior.mean + posterior.std * normal) * vae.config.scaling_factor
    # The scaling factor is a float32 number.
    torch.testing.assert_close(mean + std * normal, latents, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("version", "prediction_type", "kohya", "modelspec"),
    [
        ("1.5", "epsilon", "sd_v1", "stable-diffusion-v1"),
        ("1.5", "v_prediction", "sd_v1_v", "stable-diffusion-v1"),
        ("2.1", "epsilon", "sd_v2", "stable-diffusion-v2-512"),
        ("2.1", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v"),
    ],
)
def test_model_is_called_what_sd_scripts_calls_it(
    version: Version, prediction_type: str, kohya: str, modelspec: str
) -> None:
    family = family_with(DDIMScheduler(prediction_type=prediction_type), version)
    assert family.kohya_model_version == kohya
    assert family.modelspec_architecture == modelspec


def test_native_resolution_is_768_for_a_network_of_96_latent_pixels() -> None:
    pipeline = build_mini_sd()
    assert (family_of(pipeline).native_resolution, family_of(pipeline).resolution_step) == (64, 32)
    pipeline.unet.register_to_config(sample_size=96)
    # The mini VAE makes latents smaller by 4, that of SD by 8.
    pipeline.vae_scale_factor = 8
    assert family_of(pipeline).native_resolution == 768


def test_network_is_told_nothing_of_sizes() -> None:
    family = family_of(build_mini_sd())
    sizes = torch.stack([family.size_conditions((480, 640), (0, 80), (64, 64))] * 3)
    assert sizes.shape == (3, 0)


def test_prompts_are_encoded_as_the_pipeline_does(version: Version) -> None:
    prompts = ["a photo of sks dog", "a sketch of a boat in the snow"]
    family = family_of(build_mini_sd(version=version), torch.float32)
    ours, negative = family.encode_prompts(prompts), family.encode_negative()
    stock = build_mini_sd(version=version)
    theirs, unconditional = stock.encode_prompt(prompts, "cpu", 1, True)
    assert ours.pooled is None
    assert torch.equal(ours.tokens, theirs)
    assert torch.equal(ours[1:2].tokens, theirs[1:2])
    # One row, or two of a batch: the sums of a matrix product may round differently.
    torch.testing.assert_close(negative.tokens, unconditional[:1], rtol=1e-5, atol=1e-6)


def test_prediction_is_that_of_the_network(version: Version) -> None:
    family = family_of(build_mini_sd(version=version))
    noisy = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    timesteps = torch.tensor([10, 900])
    prompts = family.encode_prompts(["a dog", "a red boat"])
    sizes = family.size_conditions((64, 64), (0, 0), (64, 64)).expand(2, 0)
    with torch.no_grad():
        ours = family.predict(noisy, timesteps, prompts, sizes)
        stock = build_mini_sd(version=version).unet.double()
        theirs = stock(noisy, timesteps, encoder_hidden_states=prompts.tokens).sample
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sample_equals_the_stock_pipeline(version: Version, guidance_scale: float) -> None:
    prompts = ["a photo of a dog on the beach", "a shiny teapot"]
    family = family_of(build_mini_sd(version=version), torch.float32)
    ours = family.sample(
        family.encode_prompts(prompts),
        family.encode_negative(),
        seeds=[7, 8],
        resolution=64,
        steps=4,
        guidance_scale=guidance_scale,
    )
    stock = build_mini_sd(version=version)
    for picture, prompt, seed in zip(ours, prompts, [7, 8], strict=True):
        theirs = stock(
            prompt,
            num_inference_steps=4,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        np.testing.assert_allclose(np.asarray(picture, int), np.asarray(theirs, int), atol=1)


def test_loaded_by_its_name_and_from_its_folder_it_is_the_same_model(tmp_path: Path) -> None:
    build_mini_sd().save_pretrained(tmp_path)
    families: list[Family] = [
        load_family(ModelConfig(path=path, device="cpu")) for path in ("mini-sd", str(tmp_path))
    ]
    assert [family.name for family in families] == ["sd", "sd"]
    by_name, by_folder = (family.network.state_dict() for family in families)
    assert all(torch.equal(by_folder[key], tensor) for key, tensor in by_name.items())


def test_every_attention_takes_adapters_and_is_stock_without(version: Version) -> None:
    family = family_of(build_mini_sd(version=version))
    names = [name for group in family.make_adaptable() for name in group.names]
    linears = {
        name
        for name, module in family.network.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn" in name
    }
    assert set(names) == linears
    assert len(names) == len(linears)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k" in linears
    noisy = torch.randn(1, 4, 16, 16, dtype=torch.float64)
    prompts = family.encode_prompts(["a dog"])
    with torch.no_grad():
        ours = family.predict(noisy, torch.tensor([500]), prompts, torch.empty(1, 0))
        stock = build_mini_sd(version=version).unet.double()
        theirs = stock(noisy, 500, encoder_hidden_states=prompts.tokens).sample
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_full_size_sd15_has_128_projections_to_adapt() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    attend = resolve_attention("sdpa", torch.device("cpu"), torch.float32)
    groups = [group for one in make_adaptable(unet, attend) for group in one.groups]
    linears = [linear for group in groups for linear in group.linears]
    # 16 transformer blocks of two attentions of four projections; 6.4 M parameters at rank 32.
    assert len(linears) == 16 * 2 * 4
    assert sum(32 * (one.in_features + one.out_features) for one in linears) == 6_377_472
