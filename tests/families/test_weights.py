"""Sizes from headers are the sizes of the models that load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.loading import detect_family
from fastppt.families.names import MINI_MODELS
from fastppt.families.weights import WeightCount, count_weights
from fastppt.mini import build_mini
from fastppt.mini.single_file import original_state


def count(model: ModelConfig) -> WeightCount | None:
    return count_weights(model, detect_family(model))


def loaded(pipeline: Any, without: tuple[str, ...] = ()) -> WeightCount:
    sizes = {
        name: sum({t.data_ptr(): t.numel() for t in part.state_dict().values()}.values())
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module) and name not in without
    }
    text = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    return WeightCount(sum(sizes.values()) - text - sizes["vae"], text, sizes["vae"])


@pytest.fixture(scope="module", params=list(MINI_MODELS))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, Path]:
    """A mini model: name, pipeline, diffusers folder, which has its checkpoint file beside it."""
    pipeline = build_mini(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    pipeline.save_pretrained(folder)
    save_file(original_state(pipeline), folder.with_suffix(".safetensors"))
    return request.param, pipeline, folder


def test_folder_file_and_mini_model_are_of_one_size(exported: tuple[str, Any, Path]) -> None:
    name, pipeline, folder = exported
    exact = loaded(pipeline)
    assert count(ModelConfig(path=name)) == exact
    assert count(ModelConfig(path=str(folder))) == exact
    single = ModelConfig(path=str(folder.with_suffix(".safetensors")), config_folder=folder)
    assert count(single) == exact


def test_text_encoder_that_is_left_out_is_not_counted(tmp_path: Path) -> None:
    pipeline = build_mini("mini-sd3")
    pipeline.save_pretrained(tmp_path / "model")
    save_file(original_state(pipeline), tmp_path / "model.safetensors")
    exact = loaded(pipeline, without=("text_encoder_3",))
    folder = tmp_path / "model"
    for model in (
        ModelConfig(path="mini-sd3", large_text_encoder=False),
        ModelConfig(path=str(folder), large_text_encoder=False),
        ModelConfig(
            path=str(tmp_path / "model.safetensors"),
            config_folder=folder,
            large_text_encoder=False,
        ),
    ):
        assert count(model) == exact, model


def test_other_vae_is_counted_instead(tmp_path: Path) -> None:
    save_file({"decoder.weight": torch.zeros(3, 5)}, tmp_path / "vae.safetensors")
    model = ModelConfig(path="mini-sdxl", vae=str(tmp_path / "vae.safetensors"))
    counted = count(model)
    assert counted is not None
    assert counted.vae == 15
    build_mini("mini-sdxl").vae.save_pretrained(tmp_path / "vae")
    model = ModelConfig(path="mini-sdxl", vae=str(tmp_path / "vae"))
    assert count(model) == loaded(build_mini("mini-sdxl"))


def test_bytes_follow_the_precision_and_the_vae_stays_precise() -> None:
    weights = WeightCount(network=1000, text_encoders=100, vae=10)
    assert weights.num_bytes(torch.bfloat16) == {"network": 2000, "text encoders": 200, "VAE": 40}
    assert weights.num_bytes(torch.float32) == {"network": 4000, "text encoders": 400, "VAE": 40}


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_mini("mini-sdxl").save_pretrained(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is truncated") as error:
        count(ModelConfig(path=str(folder)))
    assert str(weights) in str(error.value)
    weights.unlink()
    with pytest.raises(UserError, match=r"has no \.safetensors weights"):
        count(ModelConfig(path=str(folder)))


def test_hub_id_is_counted_in_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = ModelConfig(path="someone/model")
    assert count_weights(model, "sdxl") is None
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    build_mini("mini-sdxl").save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert count_weights(model, "sdxl") == loaded(build_mini("mini-sdxl"))
    (snapshot / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no vae/config\.json"):
        count_weights(model, "sdxl")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert count_weights(model, "sdxl") is None
