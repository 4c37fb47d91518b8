"""What is done to the VAE keeps what it decodes, and its training can be stopped."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fastppt.mini.judge import Judge
from fastppt.mini.pretrain import vae as module
from fastppt.mini.pretrain.judge import as_tensor
from fastppt.mini.pretrain.scenes import draw_world
from fastppt.mini.pretrain.training import Deadline, OutOfTimeError, Schedule
from fastppt.mini.pretrain.vae import (
    draw_pictures,
    fold_statistics_,
    pixel_loss,
    train_decoder,
    train_vae,
)
from fastppt.mini.sdxl import build_mini_sdxl

SHORT = Schedule(num_steps=2, learning_rate=1e-3, warmup=2, average=0.5)


class DeadlineAtOnce(Deadline):
    def passed(self) -> bool:
        return True


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return draw_world(6, seed=10_000).pixels


def build() -> AutoencoderKL:
    return build_mini_sdxl(0).vae


def is_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@torch.no_grad()
def test_folding_keeps_what_is_decoded_and_normalises_the_latents(pixels: np.ndarray) -> None:
    vae, pictures = build().double(), as_tensor(pixels[:3]).double()
    before = vae.encode(pictures).latent_dist
    decoded = vae.decode(before.mean).sample
    fold_statistics_(vae, pictures)
    after = vae.encode(pictures).latent_dist
    assert after.mean.mean((0, 2, 3)).abs().max() < 1e-12
    assert after.mean.std().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded, rtol=0, atol=1e-12)
    # The posterior is as wide as it was, in units of the new latents.
    scale = (before.mean - before.mean.mean((0, 2, 3), keepdim=True)).std()
    torch.testing.assert_close(after.std * scale, before.std, rtol=1e-12, atol=0)
    # It was needed, and once folded there is nothing left to fold.
    assert abs(scale.item() - 1) > 0.1
    state = {key: value.clone() for key, value in vae.state_dict().items()}
    fold_statistics_(vae, pictures)
    for key, value in vae.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-10, atol=1e-10)


def test_pixel_loss_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    decoded, pictures = (
        torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    difference = (decoded - pictures).numpy()
    across = [
        abs(difference[b, c, y, x + 1] - difference[b, c, y, x])
        for b, c, y, x in np.ndindex(2, 3, 4, 4)
    ]
    down = [
        abs(difference[b, c, y + 1, x] - difference[b, c, y, x])
        for b, c, y, x in np.ndindex(2, 3, 3, 5)
    ]
    expected = np.abs(difference).mean() + 0.5 * (np.mean(across) + np.mean(down))
    assert pixel_loss(decoded, pictures).item() == pytest.approx(expected, rel=1e-12)


def test_drawn_pictures_are_scenes_mirrored_or_of_exchanged_colours(
    pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 150)
    drawn = draw_pictures(pixels, torch.Generator().manual_seed(0))
    scenes = as_tensor(pixels)
    orders = [torch.tensor(order) for order in permutations(range(3))]
    seen = []
    for picture in drawn:
        seen += [
            (mirrored, order)
            for mirrored in (False, True)
            for order in range(6)
            for scene in scenes
            if torch.equal(picture, (scene.flip(2) if mirrored else scene)[orders[order]])
        ]
    assert len(seen) == 150
    assert 0.35 < sum(mirrored for mirrored, _ in seen) / 150 < 0.65
    # A third is exchanged at random; one in six of those stays what it was.
    kept = sum(order == 0 for _, order in seen) / 150
    assert 2 / 3 + 1 / 18 - 0.15 < kept < 2 / 3 + 1 / 18 + 0.15
    assert {order for _, order in seen} == set(range(6))


def test_resumed_vae_equals_uninterrupted_vae(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "SCHEDULE", SHORT)
    (tmp_path / "whole").mkdir()
    (tmp_path / "pieces").mkdir()
    whole, pieces = build(), build()
    train_vae(whole, pixels, tmp_path / "whole", Deadline(None))
    with pytest.raises(OutOfTimeError):
        train_vae(build(), pixels, tmp_path / "pieces", DeadlineAtOnce(None))
    train_vae(pieces, pixels, tmp_path / "pieces", Deadline(None))
    assert is_equal(whole.state_dict(), pieces.state_dict())
    # A finished training is folded once, however often it is read.
    again = build()
    train_vae(again, pixels, tmp_path / "whole", Deadline(None))
    assert is_equal(whole.state_dict(), again.state_dict())


def test_decoder_is_trained_on_latents_that_stay(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "DECODER_SCHEDULE", SHORT)
    vae, judge = build(), Judge().eval()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    train_decoder(vae, judge, pixels, tmp_path, Deadline(None))
    changed = {
        key for key, value in vae.state_dict().items() if not torch.equal(before[key], value)
    }
    assert changed
    assert all(key.startswith(("decoder.", "post_quant_conv.")) for key in changed)
    assert not any(weight.grad is not None for weight in vae.encoder.parameters())
