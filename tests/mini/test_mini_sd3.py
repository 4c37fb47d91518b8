"""The mini SD3 is a whole SD3 in structure, small, and the same at every call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from fastppt.mini import build_mini, draw_demo_photos
from fastppt.mini.sd3 import build_mini_sd3
from fastppt.mini.tokenizer import MODEL_MAX_LENGTH

NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
PROMPTS = ("a photo of a dog", "a red boat in the snow")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return build_mini_sd3()


def draw(pipeline: StableDiffusion3Pipeline, prompt: str) -> np.ndarray:
    return pipeline(
        prompt,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=MODEL_MAX_LENGTH,
        output_type="np",
    ).images[0]


def weights(pipeline: StableDiffusion3Pipeline) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name in NETWORKS
        for key, value in getattr(pipeline, name).state_dict().items()
    }


def test_pipeline_is_sd3_in_evaluation_mode_and_float32(pipeline) -> None:
    assert type(build_mini("mini-sd3")) is type(pipeline) is StableDiffusion3Pipeline
    assert type(pipeline.text_encoder).__name__ == "CLIPTextModelWithProjection"
    assert type(pipeline.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    assert type(pipeline.text_encoder_3).__name__ == "T5EncoderModel"
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.tokenizer_2.pad_token_id == 0
    assert not any(getattr(pipeline, name).training for name in NETWORKS)
    assert {weight.dtype for weight in weights(pipeline).values()} == {torch.float32}


def test_fewer_than_four_million_parameters(pipeline) -> None:
    networks = [getattr(pipeline, name) for name in NETWORKS]
    assert sum(w.numel() for net in networks for w in net.parameters()) < 4_000_000


def test_latents_have_sixteen_channels_a_shift_and_no_quant_convolutions(pipeline) -> None:
    config = pipeline.vae.config
    assert config.latent_channels == pipeline.transformer.config.in_channels == 16
    assert config.shift_factor not in (None, 0)
    assert pipeline.vae.quant_conv is None
    assert pipeline.vae.post_quant_conv is None


def test_last_block_alone_drops_the_text(pipeline) -> None:
    blocks = pipeline.transformer.transformer_blocks
    assert [block.context_pre_only for block in blocks] == [False, False, True]


def test_prompts_are_both_clips_padded_to_the_t5_and_the_t5_below(pipeline) -> None:
    tokens, pooled = conditions(pipeline)
    assert tokens.shape == (2, 2 * MODEL_MAX_LENGTH, 160)
    assert pooled.shape == (2, 128)
    assert (tokens[:, :MODEL_MAX_LENGTH, 128:] == 0).all()
    assert (tokens[:, MODEL_MAX_LENGTH:, 128:] != 0).all()


def test_default_image_has_64_pixels_a_side(pipeline) -> None:
    assert draw(pipeline, "a dog").shape == (64, 64, 3)


def test_built_twice_is_bit_for_bit_the_same_and_another_seed_is_not(pipeline) -> None:
    first, second = weights(pipeline), weights(build_mini_sd3())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    key = "transformer.proj_out.weight"
    assert not torch.equal(first[key], weights(build_mini_sd3(1))[key])


def test_callers_random_state_is_untouched_and_does_not_matter(pipeline) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        before = torch.get_rng_state()
        rebuilt = weights(build_mini_sd3())
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(rebuilt[key], value) for key, value in weights(pipeline).items())


def test_two_prompts_give_two_finite_images_that_vary(pipeline) -> None:
    first, second = (draw(pipeline, prompt) for prompt in PROMPTS)
    for image in (first, second):
        assert np.isfinite(image).all()
        assert image.std() > 0.02
    assert np.abs(first - second).max() > 2 / 255


def conditions(pipeline) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            list(PROMPTS),
            None,
            None,
            device="cpu",
            do_classifier_free_guidance=False,
            max_sequence_length=MODEL_MAX_LENGTH,
        )
    return tokens, pooled


def predict(pipeline, timestep=500.0, clip_of=0, t5_of=0, pooled_of=0) -> Tensor:
    tokens, pooled = conditions(pipeline)
    clip = tokens[clip_of : clip_of + 1, :MODEL_MAX_LENGTH]
    text = torch.cat([clip, tokens[t5_of : t5_of + 1, MODEL_MAX_LENGTH:]], dim=1)
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipeline.transformer(
            latents, text, pooled[pooled_of : pooled_of + 1], torch.tensor([timestep])
        ).sample


@pytest.mark.parametrize(
    "change",
    [{"timestep": 20.0}, {"clip_of": 1}, {"t5_of": 1}, {"pooled_of": 1}],
    ids=["timestep", "text of the CLIPs", "text of the T5", "pooled"],
)
def test_prediction_depends_on_each_condition(pipeline, change) -> None:
    prediction, changed = predict(pipeline), predict(pipeline, **change)
    assert torch.isfinite(prediction).all()
    # neither vanished nor saturated
    assert 0.05 < prediction.std() < 5
    assert (changed - prediction).std() > 1e-3 * prediction.std()


def test_latents_of_the_demo_photos_have_a_deviation_near_one(pipeline, tmp_path: Path) -> None:
    photos = [Image.open(path).resize((64, 64)) for path in draw_demo_photos(tmp_path)]
    pixels = torch.from_numpy(np.stack([np.asarray(photo) for photo in photos]))
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    latents = posterior.sample(torch.Generator().manual_seed(0))
    assert latents.shape == (5, 16, 16, 16)
    config = pipeline.vae.config
    assert 0.8 < ((latents - config.shift_factor) * config.scaling_factor).std() < 1.25


def test_saved_pipeline_draws_the_same_image(pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(loaded, PROMPTS[1]), draw(pipeline, PROMPTS[1]))
