"""Noise, targets, latents, prompts and pictures agree with diffusers' own."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.sdxl import StableDiffusionXL
from fastppt.mini import build_mini

# Of a latent's channels.
MEANS = [0.1, -0.2, 0.3, 0.0, 0.4, -0.5, 0.6, -0.7]
STDS = [1.0, 2.0, 3.0, 4.0, 0.5, 1.5, 2.5, 3.5]


def family_with(prediction_type: str = "epsilon", **config: object) -> StableDiffusionXL:
    pipeline = build_mini("mini-sdxl")
    pipeline.scheduler.register_to_config(prediction_type=prediction_type, **config)
    model = ModelConfig(path="mini-sdxl")
    return StableDiffusionXL(pipeline, model, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_target_are_those_of_diffusers(prediction_type: str) -> None:
    family = family_with(prediction_type)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    latents, noise = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    noisy = family.add_noise(latents, noise, timesteps)
    # diffusers casts its float32 table to the samples' dtype before the root, as we do.
    torch.testing.assert_close(
        noisy, scheduler.add_noise(latents, noise, timesteps), rtol=1e-12, atol=1e-12
    )
    wanted = noise
    if prediction_type == "v_prediction":
        wanted = scheduler.get_velocity(latents, noise, timesteps)
    target = family.target(latents, noise, timesteps)
    torch.testing.assert_close(target, wanted, rtol=1e-12, atol=1e-12)


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(UserError, match="predicts 'sample'"):
        family_with("sample")


def test_timesteps_are_uniform_over_the_whole_range(family: Family) -> None:
    timesteps = family.draw_timesteps(40_000, torch.Generator().manual_seed(0))
    counts = timesteps.bincount(minlength=1000)
    assert len(counts) == 1000
    chi_square = ((counts - 40.0) ** 2 / 40.0).sum()
    # 999 degrees of freedom: mean 999, standard deviation 45.
    assert chi_square < 999 + 4 * 45


@pytest.mark.parametrize("with_mean", [False, True])
def test_latents_are_the_scaled_posterior_of_the_vae(with_mean: bool) -> None:
    pipeline = build_mini("mini-sdxl")
    vae = pipeline.vae
    vae.register_to_config(scaling_factor=0.7)
    if with_mean:
        vae.register_to_config(latents_mean=MEANS, latents_std=STDS)
    model = ModelConfig(path="mini-sdxl")
    family = StableDiffusionXL(pipeline, model, torch.device("cpu"), torch.float64)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, std = family.encode_photos(pixels)
    normal = torch.randn_like(mean)
    posterior = vae.encode(pixels.double()).latent_dist
    latents = posterior.mean + posterior.std * normal
    if with_mean:
        # As diffusers' DreamBooth script for SDXL scales them.
        mean_c11 = torch.tensor(vae.config.latents_mean).double().view(1, 8, 1, 1)
        std_c11 = torch.tensor(vae.config.latents_std).double().view(1, 8, 1, 1)
        latents = (latents - mean_c11) * 0.7 / std_c11
    else:
        latents = latents * 0.7
    torch.testing.assert_close(mean + std * normal, latents, rtol=1e-6, atol=1e-6)


def test_size_conditions_are_original_crop_and_target(family: Family) -> None:
    sizes = family.size_conditions((480, 640), (0, 80), (64, 64))
    assert sizes.tolist() == [480, 640, 0, 80, 64, 64]


def test_prompts_are_encoded_as_the_pipeline_does(family: Family) -> None:
    prompts = ["a photo of sks dog", "a sketch of a boat in the snow"]
    ours = family.encode_prompts(prompts)
    theirs = build_mini("mini-sdxl").encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.equal(ours.tokens, theirs[0])
    assert torch.equal(ours.pooled, theirs[2])
    assert torch.equal(ours[1:2].tokens, theirs[0][1:2])


def test_sample_equals_the_stock_pipeline(family: Family) -> None:
    prompt = "a photo of a dog on the beach"
    (ours,) = family.sample(
        family.encode_prompts([prompt]),
        family.encode_negative(),
        seeds=[7],
        resolution=64,
        steps=4,
        guidance_scale=5.0,
    )
    stock = build_mini("mini-sdxl")
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    theirs = stock(prompt, num_inference_steps=4, guidance_scale=5.0, generator=generator)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs.images[0]))


def test_released_encoders_can_still_draw_pictures(family: Family) -> None:
    prompt, negative = family.encode_prompts(["a dog"]), family.encode_negative()
    settings = {"seeds": [0], "resolution": 64, "steps": 2, "guidance_scale": 3.0}
    (before,) = family.sample(prompt, negative, **settings)
    family.release_encoders()
    (after,) = family.sample(prompt, negative, **settings)
    assert before.tobytes() == after.tobytes()


def test_text_encoders_are_given_up_and_the_vae_comes_back_after_pictures(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, negative = family.encode_prompts(["a dog"]), family.encode_negative()
    pipeline = family._pipeline
    encoders = [weakref.ref(each) for each in (pipeline.text_encoder, pipeline.text_encoder_2)]
    moves: list[tuple[str, str]] = []
    monkeypatch.setattr(pipeline.vae, "to", lambda place: moves.append(("vae", str(place))))
    assert family.weight_bytes()["text encoders"] > 0
    family.release_encoders(keep_vae=True)
    assert moves == []
    family.release_encoders()
    assert moves == [("vae", "cpu")]
    gc.collect()
    assert [each() for each in encoders] == [None, None]
    assert family.weight_bytes()["text encoders"] == 0
    moves.clear()
    # Its place is the home that it had before; here both are the CPU.
    pictures = family.sample(
        prompt, negative, seeds=[0], resolution=64, steps=1, guidance_scale=1.0
    )
    next(pictures)
    assert moves == [("vae", "cpu")]
    pictures.close()
    assert moves == [("vae", "cpu"), ("vae", "cpu")]
