"""Stock diffusers reads both files whole, and draws what we draw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastppt.config import LoraConfig, RunConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.mini.sdxl import build_mini_sdxl
from fastppt.outputs.lora_files import find_lora_file, read_lora_file, write_lora_files
from fastppt.trainables.lora import LoraAdapters

PROMPT = "a photo of sks robot in the snow"


def trained(family: Family, alpha: float | None = None) -> LoraAdapters:
    """Adapters strong enough to change a picture."""
    config = LoraConfig(rank=4, alpha=alpha)
    adapters = LoraAdapters(family.make_adaptable(), config, seed=0, device=family.device)
    generator = torch.Generator().manual_seed(5)
    for pair in adapters.pairs:
        pair.up.copy_(0.2 * torch.randn(pair.up.shape, generator=generator))
    return adapters


def draw(family: Family) -> np.ndarray:
    (image,) = family.sample(
        family.encode_prompts([PROMPT]),
        family.encode_negative(),
        seeds=[3],
        resolution=64,
        steps=4,
        guidance_scale=4.0,
    )
    return np.asarray(image, dtype=np.int16)


@pytest.fixture
def written(
    family: Family, make_config: Callable[..., RunConfig], tmp_path: Path
) -> tuple[list[Path], LoraAdapters, Family]:
    config = make_config(photos__resolution=64, name="my robot")
    adapters = trained(family, alpha=6.0)
    return write_lora_files(tmp_path / "lora", config, family, adapters, 5), adapters, family


def load_into(
    stock: StableDiffusionXLPipeline,
    folder: Path,
    weight_name: str | None,
    caplog: pytest.LogCaptureFixture,
) -> list[str]:
    """Load a LoRA with stock diffusers and return what it complains of."""
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level("INFO"):
            stock.load_lora_weights(str(folder), weight_name=weight_name)
    finally:
        diffusers_logging.disable_propagation()
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if "unexpected key" in text or "missing key" in text.lower()]


@pytest.mark.parametrize("change", ["a key too many", "a key too few"])
def test_a_key_too_many_or_too_few_does_not_pass_unseen(
    written: tuple[list[Path], LoraAdapters, Family],
    change: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (diffusers_file, _), _, _ = written
    tensors = load_file(diffusers_file)
    key = next(iter(tensors))
    if change == "a key too many":
        tensors[key.replace("to_q", "to_z").replace("lora_A", "lora_C")] = torch.ones(1)
    else:
        del tensors[key]
    save_file(tensors, diffusers_file)
    assert load_into(build_mini_sdxl(), diffusers_file.parent, diffusers_file.name, caplog)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "folder"])
def test_stock_diffusers_loads_every_key_and_draws_the_same(
    written: tuple[list[Path], LoraAdapters, Family],
    form: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (diffusers_file, kohya_file), adapters, family = written
    stock = build_mini_sdxl()
    stock.set_progress_bar_config(disable=True)
    if form == "folder":
        complaints = load_into(stock, diffusers_file.parent, None, caplog)
    else:
        file = diffusers_file if form == "diffusers" else kohya_file
        complaints = load_into(stock, file.parent, file.name, caplog)
    assert complaints == []
    names = {
        name.removesuffix(".lora_A.default_0.weight")
        for name, _ in stock.unet.named_parameters()
        if ".lora_A." in name
    }
    assert names == {pair.name for pair in adapters.pairs}
    modules = dict(stock.unet.named_modules())
    for pair in adapters.pairs:
        layer = modules[pair.name]
        down, up = layer.lora_A["default_0"].weight, layer.lora_B["default_0"].weight
        theirs = layer.scaling["default_0"] * up @ down
        torch.testing.assert_close(theirs, pair.scale * pair.up @ pair.down, rtol=1e-5, atol=1e-6)
    generator = torch.Generator().manual_seed(3)
    image = stock(PROMPT, num_inference_steps=4, guidance_scale=4.0, generator=generator).images[0]
    difference = np.abs(draw(family) - np.asarray(image, dtype=np.int16))
    assert (difference <= 2).mean() >= 0.999
    with adapters.switch.base():
        assert (np.abs(draw(family) - np.asarray(image, dtype=np.int16)) > 2).mean() > 0.5


def test_kohya_keys_follow_the_published_rule(
    written: tuple[list[Path], LoraAdapters, Family],
) -> None:
    (_, kohya_file), adapters, family = written
    tensors = load_file(kohya_file)
    linears = {
        f"lora_unet_{name.replace('.', '_')}": module
        for name, module in family.network.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert len(tensors) == 3 * len(adapters.pairs)
    for key in tensors:
        layer, _, part = key.partition(".")
        linear = linears[layer]
        wanted = {
            "lora_down.weight": (4, linear.in_features),
            "lora_up.weight": (linear.out_features, 4),
            "alpha": (),
        }
        assert tensors[key].shape == wanted[part]
    assert {float(tensors[key]) for key in tensors if key.endswith(".alpha")} == {6.0}


def test_kohya_metadata_says_what_it_is(
    written: tuple[list[Path], LoraAdapters, Family],
) -> None:
    (_, kohya_file), _, _ = written
    assert kohya_file.name == "my robot.safetensors"
    with safe_open(kohya_file, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "6"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "my robot"
    assert json.loads(metadata["ss_tag_frequency"]) == {"sks robot": {"sks robot": 5}}
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.trigger_phrase"] == "sks robot"
    assert metadata["modelspec.resolution"] == "64x64"
    assert metadata["modelspec.hash_sha256"].startswith("0x")


@pytest.mark.parametrize("place", [0, 1])
def test_both_forms_read_back_as_the_same_weights(
    written: tuple[list[Path], LoraAdapters, Family], place: int
) -> None:
    files, adapters, family = written
    weights = read_lora_file(files[place], family)
    assert weights.keys() == {pair.name for pair in adapters.pairs}
    for pair in adapters.pairs:
        down, up, scale = weights[pair.name]
        torch.testing.assert_close(scale * up @ down, pair.scale * pair.up @ pair.down)


def test_alpha_in_the_metadata_of_a_peft_file_counts(family: Family, tmp_path: Path) -> None:
    adapters = trained(family)
    pair = adapters.pairs[0]
    stock = build_mini_sdxl()
    layers = {f"{pair.name}.lora_A.weight": pair.down, f"{pair.name}.lora_B.weight": pair.up}
    metadata = {"r": 4, "lora_alpha": 12, "target_modules": ["to_q"]}
    stock.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    ((name, (down, up, scale)),) = read_lora_file(tmp_path, family).items()
    assert name == pair.name and scale == 3.0
    assert torch.equal(down, pair.down) and torch.equal(up, pair.up)


def test_lora_of_something_else_is_refused(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, 4), f"{key}.lora_B.weight": torch.ones(4, 2)}, path
    )
    with pytest.raises(UserError, match="is not LoRA of the unet"):
        read_lora_file(path, family)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"{}"])
def test_broken_file_is_named(family: Family, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read") as error:
        read_lora_file(path, family)
    assert str(path) in str(error.value)


def test_file_without_pairs_is_refused(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"unet.mid_block.x.to_q.lora_A.weight": torch.ones(2, 4)}, path)
    with pytest.raises(UserError, match="no complete down and up pairs"):
        read_lora_file(path, family)


def test_kohya_file_without_its_up_side_is_named(
    written: tuple[list[Path], LoraAdapters, Family], tmp_path: Path
) -> None:
    (_, kohya_file), _, family = written
    tensors = {k: v for k, v in load_file(kohya_file).items() if "lora_up" not in k}
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"half\.safetensors"):
        read_lora_file(tmp_path / "half.safetensors", family)


def test_missing_file_and_pickle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the run finished"):
        find_lora_file(tmp_path)
    pickle = tmp_path / "a.pt"
    pickle.write_bytes(b"x")
    with pytest.raises(UserError, match=r"must be a \.safetensors file"):
        find_lora_file(pickle)
