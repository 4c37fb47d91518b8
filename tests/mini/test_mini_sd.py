from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from fastppt.mini.sd import build_mini_sd

NETWORKS = ("unet", "vae", "text_encoder")
PROMPTS = ("a photo of a dog", "a red boat in the snow")
VERSIONS = ("1.5", "2.1")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return build_mini_sd()


def draw(pipeline: StableDiffusionPipeline, prompt: str) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt, num_inference_steps=3, guidance_scale=5.0, generator=generator, output_type="np"
    ).images[0]


def weights(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name in NETWORKS
        for key, value in getattr(pipeline, name).state_dict().items()
    }


def test_pipeline_is_sd_in_evaluation_mode_and_float32(pipeline: StableDiffusionPipeline) -> None:
    assert type(pipeline) is StableDiffusionPipeline
    assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"
    assert pipeline.safety_checker is None
    assert not any(getattr(pipeline, name).training for name in NETWORKS)
    assert {weight.dtype for weight in weights(pipeline).values()} == {torch.float32}


def test_fewer_than_four_million_parameters(pipeline: StableDiffusionPipeline) -> None:
    networks = [getattr(pipeline, name) for name in NETWORKS]
    assert sum(w.numel() for net in networks for w in net.parameters()) < 4_000_000


def test_scheduler_is_the_one_that_sd15_ships(pipeline: StableDiffusionPipeline) -> None:
    # stable-diffusion-v1-5/scheduler/scheduler_config.json
    shipped = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    }
    assert type(pipeline.scheduler).__name__ == "PNDMScheduler"
    assert shipped.items() <= dict(pipeline.scheduler.config).items()


@pytest.mark.parametrize("version", VERSIONS)
def test_attention_is_in_the_three_upper_of_four_resolutions(version: str) -> None:
    unet = build_mini_sd(version=version).unet
    assert [hasattr(block, "attentions") for block in unet.down_blocks] == [True] * 3 + [False]
    assert [hasattr(block, "attentions") for block in unet.up_blocks] == [False] + [True] * 3
    proj_in = unet.down_blocks[0].attentions[0].proj_in
    wanted = torch.nn.Conv2d if version == "1.5" else torch.nn.Linear
    assert type(proj_in) is wanted


def test_like_21_it_predicts_velocity_and_pads_with_exclamation_marks() -> None:
    pipeline = build_mini_sd(version="2.1")
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.tokenizer.pad_token_id == 0
    assert pipeline.text_encoder.config.hidden_act == "gelu"
    heads = {attn.inner_dim // attn.heads for attn in attentions(pipeline)}
    assert heads == {16}


def test_like_15_it_has_as_many_heads_everywhere(pipeline: StableDiffusionPipeline) -> None:
    assert {attn.heads for attn in attentions(pipeline)} == {4}


def attentions(pipeline: StableDiffusionPipeline) -> list[torch.nn.Module]:
    return [
        module
        for name, module in pipeline.unet.named_modules()
        if name.endswith(("attn1", "attn2"))
    ]


def test_default_image_has_64_pixels_a_side(pipeline: StableDiffusionPipeline) -> None:
    assert draw(pipeline, "a dog").shape == (64, 64, 3)


def test_built_twice_is_bit_for_bit_the_same_and_another_seed_is_not(
    pipeline: StableDiffusionPipeline,
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        before = torch.get_rng_state()
        first, second, other = (
            weights(pipeline),
            weights(build_mini_sd()),
            weights(build_mini_sd(1)),
        )
        assert torch.equal(before, torch.get_rng_state())
    first = weights(pipeline)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["unet.conv_in.weight"], other["unet.conv_in.weight"])


@pytest.mark.parametrize("version", VERSIONS)
def test_two_prompts_give_two_finite_images_that_vary(version: str) -> None:
    pipeline = build_mini_sd(version=version)
    first, second = (draw(pipeline, prompt) for prompt in PROMPTS)
    for image in (first, second):
        assert np.isfinite(image).all()
        assert image.std() > 0.02
    assert np.abs(first - second).max() > 2 / 255


def test_prediction_depends_on_the_timestep_and_the_text(pipeline: StableDiffusionPipeline) -> None:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def predict(timestep: int, prompt: str) -> torch.Tensor:
        text, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        return pipeline.unet(latents, timestep, text).sample

    prediction = predict(500, PROMPTS[0])
    # neither vanished nor saturated
    assert 0.05 < prediction.std() < 5
    for changed in (predict(20, PROMPTS[0]), predict(500, PROMPTS[1])):
        assert (changed - prediction).std() > 1e-3 * prediction.std()


def test_latents_of_the_demo_photos_have_a_deviation_near_one(
    pipeline: StableDiffusionPipeline, photos: Path
) -> None:
    images = [Image.open(path).resize((64, 64)) for path in sorted(photos.iterdir())]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    latents = posterior.sample(torch.Generator().manual_seed(0))
    assert latents.shape == (5, 4, 16, 16)
    assert 0.8 < (latents * pipeline.vae.config.scaling_factor).std() < 1.25


def test_saved_pipeline_draws_the_same_image(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(loaded, PROMPTS[1]), draw(pipeline, PROMPTS[1]))
