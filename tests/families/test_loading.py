"""Models are found by what users call them, or refused with the next thing to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.loading import check_model, load_family, resolve_device, resolve_dtype
from fastppt.mini.sdxl import build_mini_sdxl


def test_a_diffusers_folder_loads_like_the_model_it_was_saved_from(tmp_path: Path) -> None:
    pipeline = build_mini_sdxl()
    pipeline.save_pretrained(tmp_path / "model")
    family = load_family(ModelConfig(path=str(tmp_path / "model"), device="cpu"))
    assert family.name == "sdxl"
    assert family.native_resolution == 64
    state = family.network.state_dict()
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(state[name], tensor)


def test_base_weights_are_frozen_and_of_the_asked_precision() -> None:
    family = load_family(ModelConfig(path="mini-sdxl", device="cpu", precision="bf16"))
    assert {parameter.dtype for parameter in family.network.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in family.network.parameters())
    mean, std = family.encode_photos(torch.zeros(1, 3, 64, 64))
    assert mean.dtype == std.dtype == torch.float32


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="is a pickle"):
        check_model(ModelConfig(path=str(path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no model_index.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "cannot be read as JSON"),
        (json.dumps({"_class_name": "FluxPipeline"}), "is a FluxPipeline"),
    ],
)
def test_folder_of_something_else_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        check_model(ModelConfig(path=str(tmp_path)))


def test_folder_without_weights_is_refused_by_name(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "X"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_family(ModelConfig(path=str(tmp_path), device="cpu"))
    assert str(tmp_path) in str(error.value)


def test_what_is_neither_folder_nor_hub_id_is_refused() -> None:
    with pytest.raises(UserError, match="no folder, no hub id"):
        check_model(ModelConfig(path="mini-sdx"))


def test_hub_id_passes_the_door() -> None:
    check_model(ModelConfig(path="stabilityai/stable-diffusion-xl-base-1.0"))


def test_precision_follows_the_device() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("fp32", torch.device("cuda")) == torch.float32


def test_missing_gpu_is_named() -> None:
    with pytest.raises(UserError, match="torch sees"):
        resolve_device("cuda:99")
