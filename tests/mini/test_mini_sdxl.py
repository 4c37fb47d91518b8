import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import Attention
from PIL import Image

from fastppt.mini.sdxl import build_mini_sdxl

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
PROMPTS = ("a photo of a dog", "a red boat in the snow")


@pytest.fixture(autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def pipeline():
    return build_mini_sdxl()


def draw(pipeline, prompt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        prompt, num_inference_steps=3, guidance_scale=5.0, generator=generator, output_type="np"
    ).images[0]


def weights(pipeline):
    return {
        f"{name}.{key}": value
        for name in NETWORKS
        for key, value in getattr(pipeline, name).state_dict().items()
    }


def test_pipeline_is_sdxl_in_evaluation_mode_and_float32(pipeline):
    assert type(pipeline) is StableDiffusionXLPipeline
    assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"
    assert type(pipeline.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipeline.config.force_zeros_for_empty_prompt
    assert not any(getattr(pipeline, name).training for name in NETWORKS)
    assert {weight.dtype for weight in weights(pipeline).values()} <= {torch.float32, torch.int64}


def test_fewer_than_four_million_parameters(pipeline):
    networks = [getattr(pipeline, name) for name in NETWORKS]
    assert sum(w.numel() for net in networks for w in net.parameters()) < 4_000_000


def test_cross_attention_at_two_resolutions_of_different_depth(pipeline):
    tokens = {}

    def note(name):
        return lambda module, inputs: tokens.__setitem__(name, inputs[0].shape[1])

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in pipeline.unet.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2")
    ]
    predict(pipeline)
    for hook in hooks:
        hook.remove()
    # down, then up (two layers of blocks there), by the number of image tokens seen
    for part, layers in (("down_blocks", 1), ("up_blocks", 2)):
        seen = [number for name, number in tokens.items() if name.startswith(part)]
        assert seen.count(16 * 16) == 1 * layers
        assert seen.count(8 * 8) == 2 * layers
        assert len(seen) == 3 * layers
    assert [number for name, number in tokens.items() if name.startswith("mid_block")] == [4 * 4]
    assert pipeline.unet.config.use_linear_projection


def test_pooled_text_and_time_ids_enter_the_time_embedding(pipeline):
    assert pipeline.unet.config.addition_embed_type == "text_time"
    # six numbers of 32 and a pooled text of 80, as the pipeline's own check computes it
    assert pipeline.unet.add_embedding.linear_1.in_features == 6 * 32 + 80


def test_attention_reads_the_tokens_of_two_encoders_of_different_width(pipeline):
    widths = [
        encoder.config.hidden_size for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    ]
    assert widths == [48, 80]
    assert pipeline.unet.config.cross_attention_dim == sum(widths)


def test_default_image_has_64_pixels_a_side(pipeline):
    assert draw(pipeline, "a dog").shape == (64, 64, 3)


def test_built_twice_is_bit_for_bit_the_same_and_another_seed_is_not(pipeline):
    first, second, other = (
        weights(pipeline),
        weights(build_mini_sdxl()),
        weights(build_mini_sdxl(1)),
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["unet.conv_in.weight"], other["unet.conv_in.weight"])


def test_callers_random_state_is_untouched_and_does_not_matter(pipeline):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        before = torch.get_rng_state()
        rebuilt = weights(build_mini_sdxl())
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(rebuilt[key], value) for key, value in weights(pipeline).items())


def test_two_prompts_give_two_finite_images_that_vary(pipeline):
    first, second = (draw(pipeline, prompt) for prompt in PROMPTS)
    for image in (first, second):
        assert np.isfinite(image).all()
        assert image.std() > 0.02
    assert np.abs(first - second).max() > 2 / 255


def conditions(pipeline):
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(
            list(PROMPTS), device="cpu", do_classifier_free_guidance=False
        )
    return text, pooled


def predict(pipeline, timestep=500, text_of=0, pooled_of=0, time_ids=(64, 64, 0, 0, 64, 64)):
    text, pooled = conditions(pipeline)
    latents = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    added = {
        "text_embeds": pooled[pooled_of : pooled_of + 1],
        "time_ids": torch.tensor([time_ids], dtype=torch.float32),
    }
    with torch.no_grad():
        return pipeline.unet(
            latents, timestep, text[text_of : text_of + 1], added_cond_kwargs=added
        ).sample


@pytest.mark.parametrize(
    "change",
    [
        {"timestep": 20},
        {"text_of": 1},
        {"pooled_of": 1},
        {"time_ids": (128, 96, 0, 0, 64, 64)},
        {"time_ids": (64, 64, 16, 8, 64, 64)},
    ],
    ids=["timestep", "text", "pooled", "original size", "crop corner"],
)
def test_prediction_depends_on_each_condition(pipeline, change):
    prediction, changed = predict(pipeline), predict(pipeline, **change)
    assert torch.isfinite(prediction).all()
    # neither vanished nor saturated
    assert 0.05 < prediction.std() < 5
    assert (changed - prediction).std() > 1e-3 * prediction.std()


def test_pooled_text_is_taken_at_the_first_end_token(pipeline):
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer("a dog", padding="max_length", return_tensors="pt").input_ids
        first_end = 3
        # With transformers' legacy value of 2 a learned token, of a higher id, would be taken.
        assert encoder.config.eos_token_id == tokenizer.eos_token_id
        assert ids[0, first_end] == tokenizer.eos_token_id
        with torch.no_grad():
            output = encoder(ids)
        wanted = output.last_hidden_state[:, first_end]
        if encoder is pipeline.text_encoder_2:
            with torch.no_grad():
                wanted = encoder.text_projection(wanted)
            assert torch.equal(output.text_embeds, wanted)
        else:
            assert torch.equal(output.pooler_output, wanted)


def test_latents_of_the_demo_photos_have_a_deviation_near_one(pipeline, photos):
    images = [Image.open(path).resize((64, 64)) for path in sorted(photos.iterdir())]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pixels = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    latents = posterior.sample(torch.Generator().manual_seed(0))
    assert latents.shape == (5, 8, 16, 16)
    assert 0.8 < (latents * pipeline.vae.config.scaling_factor).std() < 1.25


def test_saved_pipeline_draws_the_same_image(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.force_zeros_for_empty_prompt
    np.testing.assert_array_equal(draw(loaded, PROMPTS[1]), draw(pipeline, PROMPTS[1]))
