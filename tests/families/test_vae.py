"""Another VAE takes the place of the model's own, if its latents are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import constants
from safetensors.torch import save_file

from fastppt.config import ModelConfig
from fastppt.families.loading import load_family
from fastppt.mini import build_mini
from fastppt.mini.single_file import original_state

# `Export` is defined beside its fixture.
Exports = Callable[[str], Any]
Refusal = Callable[..., str]


def on_cpu(path: Path | str, **keys: object) -> ModelConfig:
    return ModelConfig(path=str(path), device="cpu", **keys)


@pytest.fixture(scope="module")
def other_vae() -> AutoencoderKL:
    vae = build_mini("mini-sdxl", seed=9).vae
    own = build_mini("mini-sdxl").vae
    assert not torch.equal(vae.encoder.conv_in.weight, own.encoder.conv_in.weight)
    return vae


@pytest.mark.parametrize(
    ("base", "form"),
    [
        *(("folder", form) for form in ("VAE folder", "model folder", "original file", "hub")),
        *((base, "file") for base in ("mini", "folder", "single file")),
    ],
)
def test_another_vae_replaces_the_own_one(
    exports: Exports,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other_vae: AutoencoderKL,
    base: str,
    form: str,
) -> None:
    export = exports("sdxl")
    place = tmp_path / "vae"
    match form:
        case "VAE folder":
            other_vae.save_pretrained(place)
        case "model folder":
            other_vae.save_pretrained(place / "vae")
        case "file":
            place = tmp_path / "vae.safetensors"
            save_file(other_vae.state_dict(), place)
        case "original file":
            # As Stability AI publishes it: the keys of a checkpoint without their prefix.
            place = tmp_path / "vae.safetensors"
            state = original_state(build_mini("mini-sdxl", seed=9)).items()
            prefix = "first_stage_model."
            parts = {k.removeprefix(prefix): v for k, v in state if k.startswith(prefix)}
            save_file(parts, place)
        case "hub":
            repository = tmp_path / "models--owner--vae"
            other_vae.save_pretrained(repository / "snapshots" / ("0" * 40))
            (repository / "refs").mkdir()
            (repository / "refs" / "main").write_text("0" * 40)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
            place = Path("owner/vae")
    path, keys = {
        "mini": ("mini-sdxl", {}),
        "folder": (export.folder, {}),
        "single file": (export.file, {"config_folder": export.folder}),
    }[base]
    pipeline = load_family(on_cpu(path, vae=str(place), precision="bf16", **keys))._pipeline
    state = pipeline.vae.state_dict()
    assert state.keys() == other_vae.state_dict().keys()
    for name, tensor in other_vae.state_dict().items():
        assert torch.equal(state[name], tensor), name
    own = export.pipeline.vae.config
    assert pipeline.vae.config.scaling_factor == own.scaling_factor


def test_the_own_vae_is_not_read_when_another_is_given(
    copied: Path, tmp_path: Path, other_vae: AutoencoderKL
) -> None:
    other_vae.save_pretrained(tmp_path / "vae")
    (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    load_family(on_cpu(copied, vae=str(tmp_path / "vae")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 4}, "latent_channels 4, and the model's own VAE 8"),
        ({"scaling_factor": 0.5}, "scaling_factor 0.5, and the model's own VAE 1.0"),
        ({"shift_factor": 0.1}, "shift_factor 0.1, and the model's own VAE None"),
        ({"block_out_channels": (16, 32)}, "pixels a latent 2, and the model's own VAE 4"),
    ],
)
def test_a_vae_with_other_latents_is_refused(
    tmp_path: Path,
    other_vae: AutoencoderKL,
    change: dict[str, object],
    message: str,
    refusal: Refusal,
) -> None:
    config = dict(other_vae.config) | change
    blocks = len(config["block_out_channels"])
    config["down_block_types"] = ("DownEncoderBlock2D",) * blocks
    config["up_block_types"] = ("UpDecoderBlock2D",) * blocks
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")
    assert message in refusal("mini-sdxl", vae=str(tmp_path / "vae"))


def test_a_vae_that_is_not_there_or_no_vae_is_refused(
    exports: Exports, tmp_path: Path, refusal: Refusal
) -> None:
    def refused(vae: Path | str) -> str:
        return refusal("mini-sdxl", vae=str(vae))

    assert "there is no such file" in refused(tmp_path / "vae.safetensors")
    (tmp_path / "vae.pt").write_bytes(b"x")
    assert "is a pickle" in refused(tmp_path / "vae.pt")
    (tmp_path / "vae.safetensors").write_bytes(b"x" * 9)
    assert "vae.safetensors: is truncated" in refused(tmp_path / "vae.safetensors")
    (tmp_path / "empty").mkdir()
    assert "has no empty/config.json" in refused(tmp_path / "empty")
    assert "model.vae owner/vae: cannot be loaded" in refused("owner/vae")
    assert "cannot be loaded" in refused(exports("sdxl").folder / "unet")
    network = exports("sdxl").folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert f"model.vae {network}:" in refused(network)
