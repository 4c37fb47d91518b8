"""A model on the meta device is the loaded one in all its shapes, and costs no weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family, outline_family
from fastppt.families.names import FAMILY_NAMES, MINI_MODELS

if TYPE_CHECKING:
    from conftest import Export

META = torch.device("meta")


def shapes(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


def check_outline(model: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """Compare a model's outline with the loaded model."""
    outlined, loaded = outline_family(model, dtype), load_family(model, dtype=dtype)
    assert outlined is not None
    assert outlined.device == META and type(outlined) is type(loaded)
    tensors = [*outlined.network.parameters(), *outlined.network.buffers()]
    assert {tensor.device for tensor in tensors} == {META}
    assert shapes(outlined.network) == shapes(loaded.network)
    assert outlined.weight_bytes() == loaded.weight_bytes()
    assert outlined.native_resolution == loaded.native_resolution
    for outline, real in zip(encodings(outlined), encodings(loaded), strict=True):
        assert (outline.shape, outline.dtype) == (real.shape, real.dtype)
        assert outline.device == META


def encodings(family: Family) -> list[torch.Tensor]:
    """Everything that a family computes, once."""
    prompts, negative = family.encode_prompts(["a dog"]), family.encode_negative()
    side = family.native_resolution
    mean, std = family.encode_photos(torch.zeros(1, 3, side, side, device=family.device))
    sizes = family.size_conditions((side, side), (0, 0), (side, side))[None]
    timesteps = torch.zeros(1, dtype=torch.int64, device=family.device)
    with torch.no_grad():
        prediction = family.predict(mean, timesteps, prompts, sizes)
    pixels = family.decode_latents(prediction)
    tensors = [prompts.tokens, prompts.pooled, negative.tokens, mean, std, prediction, pixels]
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("name", MINI_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outlined_mini_model_has_the_shapes_of_the_loaded_one(
    name: str, dtype: torch.dtype
) -> None:
    check_outline(ModelConfig(path=name, device="cpu"), dtype)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_folder_without_weights_is_outlined_as_the_whole_one_is_loaded(
    exports: Callable[[str], Export], tmp_path: Path, family: str
) -> None:
    whole = exports(family).folder
    check_outline(ModelConfig(path=str(whole), device="cpu"))
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    outlined = outline_family(ModelConfig(path=str(bare)), torch.float32)
    loaded = load_family(ModelConfig(path=str(whole), device="cpu"))
    assert outlined is not None
    assert shapes(outlined.network) == shapes(loaded.network)


def test_a_single_file_is_outlined_by_its_configuration(
    exports: Callable[[str], Export],
) -> None:
    export = exports("sdxl")
    alone = ModelConfig(path=str(export.file), device="cpu")
    assert outline_family(alone, torch.float32) is None
    check_outline(alone.model_copy(update={"config_folder": export.folder}))


def test_a_dropped_text_encoder_is_not_outlined() -> None:
    model = ModelConfig(path="mini-sd3", device="cpu", large_text_encoder=False)
    check_outline(model)


def test_a_folder_with_a_foreign_component_is_refused(copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    index["unet"] = ["os", "system"]
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="says of unet"):
        outline_family(ModelConfig(path=str(copied)), torch.float32)
