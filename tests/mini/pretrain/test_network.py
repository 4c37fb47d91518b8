"""The network learns the weighted velocity, and its training can be stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastppt.mini.pretrain import network as module
from fastppt.mini.pretrain.network import (
    NO_PROMPT,
    SNR_GAMMA,
    encode_prompts,
    encode_scenes,
    train_network,
)
from fastppt.mini.pretrain.scenes import Scenes, draw_world
from fastppt.mini.pretrain.training import Deadline, OutOfTimeError, Schedule
from fastppt.mini.sdxl import build_mini_sdxl


class DeadlineAtOnce(Deadline):
    def passed(self) -> bool:
        return True


class Recorder(nn.Module):
    """In the place of the UNet: answers with a function of what it is shown, and keeps that."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.answer, self.calls = answer, []

    def set_attn_processor(self, processor: object) -> None:
        pass

    def set_default_attn_processor(self) -> None:
        pass

    def forward(
        self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, added_cond_kwargs: dict[str, Tensor]
    ) -> Any:
        self.calls.append((noisy, timesteps, tokens, added_cond_kwargs))
        return SimpleNamespace(sample=self.answer(noisy, timesteps))


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_world(6, seed=10_000)


@pytest.fixture
def pipeline() -> Any:
    return build_mini_sdxl(0)


def random_latents() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 8, 16, 16, generator=generator).half()


@pytest.fixture
def latents() -> Tensor:
    return random_latents()


def loss_of_training(
    pipeline: Any, latents: Tensor, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> Callable[[torch.Generator], Tensor]:
    """The loss that the training is given."""
    given = []
    monkeypatch.setattr(
        module, "train", lambda name, networks, loss_of, *_, **__: given.append(loss_of)
    )
    train_network(pipeline, latents, scenes, Path(), Deadline(None))
    return given[0]


def test_perfect_velocity_has_no_loss_and_none_has_the_weighted_square(
    pipeline: Any, latents: Tensor, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every latent is the same, so what was added to it can be told.
    latents[:] = latents[0, 0]
    clean, abar = latents[0, 0].double(), pipeline.scheduler.alphas_cumprod.double()

    def velocity(noisy: Tensor, timesteps: Tensor) -> Tensor:
        signal, remains = (
            share.sqrt()[:, None, None, None] for share in (abar[timesteps], 1 - abar[timesteps])
        )
        return signal * (noisy.double() - signal * clean) / remains - remains * clean

    monkeypatch.setattr(module, "BATCH", 8)
    for part, expected in ((1.0, 0.0), (0.0, 1.0)):
        pipeline.unet = Recorder(lambda noisy, times, part=part: part * velocity(noisy, times))
        loss_of = loss_of_training(pipeline, latents, scenes, monkeypatch)
        loss = loss_of(torch.Generator().manual_seed(3))
        ((noisy, timesteps, _, _),) = pipeline.unet.calls
        snr = (abar / (1 - abar))[timesteps]
        # Min-SNR weights of velocity prediction: min(snr, gamma) / (snr + 1).
        weights = snr.clamp(max=SNR_GAMMA) / (snr + 1)
        squares = velocity(noisy, timesteps).square().mean((1, 2, 3))
        wanted = expected * (weights * squares).mean()
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-6)


def test_some_prompts_are_left_out_as_zeros_and_sizes_are_in_range(
    pipeline: Any, latents: Tensor, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 200)
    pipeline.unet = Recorder(lambda noisy, timesteps: noisy)
    loss_of_training(pipeline, latents, scenes, monkeypatch)(torch.Generator().manual_seed(0))
    ((_, timesteps, tokens, added),) = pipeline.unet.calls
    without = (tokens == 0).all(-1).all(-1)
    assert torch.equal(without, (added["text_embeds"] == 0).all(-1))
    assert abs(without.double().mean() - NO_PROMPT) < 5 * (NO_PROMPT / 200) ** 0.5
    assert timesteps.min() < 50 and timesteps.max() > 949
    sizes = added["time_ids"]
    assert sizes[:, :2].min() >= 64 and sizes[:, :2].max() <= 1024
    assert 0.1 < (sizes[:, 2:4] > 0).any(1).double().mean() < 0.35
    assert (sizes[:, 4:] == 64).all()


def test_prompts_are_encoded_as_the_pipeline_encodes_them(pipeline: Any) -> None:
    prompts = ["a photo of a red boat on the beach", "a sketch of an umbrella"]
    with torch.no_grad():
        tokens, pooled = encode_prompts(pipeline, prompts)
        expected, _, expected_pooled, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False
        )
    assert torch.equal(tokens, expected)
    assert torch.equal(pooled, expected_pooled)


def test_latents_are_encoded_once_with_those_of_mirror_images(
    pipeline: Any, scenes: Scenes, tmp_path: Path
) -> None:
    vae = pipeline.vae
    latents = encode_scenes(vae, scenes.pixels, tmp_path)
    assert latents.shape == (2, 6, 8, 16, 16) and latents.dtype == torch.float16
    mirrored = np.ascontiguousarray(scenes.pixels[:, :, ::-1])
    for side, pixels in enumerate((scenes.pixels, mirrored)):
        pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            means = vae.encode(pictures).latent_dist.mean
        torch.testing.assert_close(latents[side].float(), means, rtol=1e-3, atol=1e-3)
    # What is there is read, not made again.
    assert torch.equal(encode_scenes(vae, scenes.pixels[:0], tmp_path), latents)


def test_latents_of_another_encoder_are_not_taken(
    pipeline: Any, scenes: Scenes, tmp_path: Path
) -> None:
    latents = encode_scenes(pipeline.vae, scenes.pixels[:1], tmp_path)
    other = build_mini_sdxl(1).vae
    assert not torch.equal(encode_scenes(other, scenes.pixels[:1], tmp_path), latents)
    # The decoder's weights do not decide them.
    other.load_state_dict(pipeline.vae.state_dict())
    with torch.no_grad():
        other.decoder.conv_in.weight.zero_()
    assert torch.equal(encode_scenes(other, scenes.pixels[:0], tmp_path), latents)
    assert len(list(tmp_path.iterdir())) == 2


def trained_state(
    latents: Tensor, scenes: Scenes, work: Path, num_steps: int, pieces: bool = False
) -> dict[str, Tensor]:
    """All weights of a fresh network after a training, in pieces of one step or in one go."""
    work.mkdir()
    schedule = Schedule(num_steps=num_steps, learning_rate=1e-3, warmup=2, decay=0.5)
    for _ in range(num_steps - 1 if pieces else 0):
        with pytest.raises(OutOfTimeError):
            train_network(build_mini_sdxl(0), latents, scenes, work, DeadlineAtOnce(None), schedule)
    pipeline = build_mini_sdxl(0)
    train_network(pipeline, latents, scenes, work, Deadline(None), schedule)
    networks = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    assert not any(network.training for network in networks)
    return {
        f"{index}.{key}": value
        for index, network in enumerate(networks)
        for key, value in network.state_dict().items()
    }


def is_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_resumed_network_equals_uninterrupted_network(
    latents: Tensor, scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    whole = trained_state(latents, scenes, tmp_path / "whole", 2)
    assert is_equal(whole, trained_state(latents, scenes, tmp_path / "pieces", 2, pieces=True))


@pytest.mark.slow
def test_first_fifty_steps_are_the_same_bit_for_bit_in_another_process(
    latents: Tensor, scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 4)
    one = trained_state(latents, scenes, tmp_path / "one", 50)
    program = f"""
import importlib.util, pathlib, safetensors.torch, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("network_tests", {__file__!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
tests.module.BATCH = 4
work = pathlib.Path({str(tmp_path / "two")!r})
scenes = tests.draw_world(6, seed=10_000)
state = tests.trained_state(tests.random_latents(), scenes, work, 50)
safetensors.torch.save_file(state, work / "all")
"""
    # Another order of sets than in this process.
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    assert is_equal(one, load_file(tmp_path / "two" / "all"))
    start = build_mini_sdxl(0).unet.state_dict()
    assert all(not torch.equal(one[f"0.{key}"], value) for key, value in start.items())
