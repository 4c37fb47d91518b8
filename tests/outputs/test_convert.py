"""Every form is written and read back without a bit lost, and stock readers see the same change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.errors import UserError
from fastppt.families.lora_keys import LAYOUTS
from fastppt.mini import build_mini
from fastppt.outputs.adapters import Adapter, LoraFile
from fastppt.outputs.convert import convert
from fastppt.outputs.lora_forms import read_lora, write_lora
from tests.outputs.lora_cases import FAMILIES, change, peft_changes, random_lora

FORMS = {"sd": ["kohya", "diffusers", "peft"], "sdxl": ["kohya", "diffusers", "peft"]}
FORMS["sd3"] = ["diffusers", "peft"]
PAIRS = [(family, a, b) for family in FAMILIES for a in FORMS[family] for b in FORMS[family]]


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {family: build_mini(f"mini-{family}") for family in FAMILIES}


@pytest.fixture
def loras(pipelines: dict[str, Any]) -> dict[str, LoraFile]:
    return {family: random_lora(pipelines[family], family) for family in FAMILIES}


def write(folder: Path, lora: LoraFile, form: str) -> Path:
    path = folder / ("lora" if form == "peft" else f"lora-{form}.safetensors")
    write_lora(path, lora, form)
    return path


def assert_same(ours: LoraFile, theirs: LoraFile) -> None:
    assert ours.adapters.keys() == theirs.adapters.keys()
    for layer, one in ours.adapters.items():
        other = theirs.adapters[layer]
        assert torch.equal(one.down, other.down) and one.down.dtype == other.down.dtype
        assert torch.equal(one.up, other.up) and one.up.dtype == other.up.dtype
        assert one.alpha == other.alpha


def without_hashes(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if not key.startswith("sshs_")}


@pytest.mark.parametrize(("family", "first", "second"), PAIRS)
def test_there_and_back_loses_nothing(
    loras: dict[str, LoraFile], tmp_path: Path, family: str, first: str, second: str
) -> None:
    source = write(tmp_path, loras[family], first)
    there = convert(
        source, second, tmp_path / f"there{'' if second == 'peft' else '.safetensors'}", None
    )
    back = convert(
        there, first, tmp_path / f"back{'' if first == 'peft' else '.safetensors'}", None
    )
    for path, form in ((source, first), (there, second), (back, first)):
        lora = read_lora(path)
        assert lora.form == form and lora.detection.family == family
        assert_same(loras[family], lora)
        assert without_hashes(lora.metadata) == loras[family].metadata
    if first != "peft":
        ours, theirs = load_file(source), load_file(back)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        with safe_open(source, "pt") as one, safe_open(back, "pt") as other:
            assert one.metadata() == other.metadata()


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_every_kohya_key_names_its_layer_by_the_published_rule(
    pipelines: dict[str, Any], loras: dict[str, LoraFile], tmp_path: Path, family: str
) -> None:
    """A reader of its own, from sd-scripts' rule: prefix, path with underscores, alpha / dim."""
    tensors = load_file(write(tmp_path, loras[family], "kohya"))
    prefixes = {"lora_unet": "unet", "lora_te": "text_encoder"}
    if family == "sdxl":
        prefixes = {
            "lora_unet": "unet",
            "lora_te1": "text_encoder",
            "lora_te2": "text_encoder_2",
        }
    layers = {}
    for prefix, component in prefixes.items():
        for path, module in pipelines[family].components[component].named_modules():
            # The name that sd-scripts' CLIPTextModel has for what transformers 5 shortened.
            shortened = component.startswith("text") and path.startswith("encoder.")
            whole = f"text_model.{path}" if shortened else path
            layers[f"{prefix}_{whole.replace('.', '_')}"] = (component, whole, module)
    read: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = key.split(".", 1)
        component, path, module = layers[name]
        assert isinstance(module, nn.Linear | nn.Conv2d)
        read.setdefault((component, path), {})[part] = tensor
    assert read.keys() == loras[family].adapters.keys()
    for layer, parts in read.items():
        down, up = parts["lora_down.weight"].double(), parts["lora_up.weight"].double()
        scale = parts["alpha"].item() / down.shape[0]
        delta = scale * (up.flatten(1) @ down.flatten(1))
        assert torch.equal(delta, change(loras[family].adapters[layer]))


def stock_changes(pipeline: Any, layers: LoraFile) -> dict[tuple[str, str], torch.Tensor]:
    """What a stock pipeline's loaded adapters add, by the layers' names in files."""
    found = {}
    for component in layers.components:
        for path, delta in peft_changes(pipeline.components[component]).items():
            whole = f"text_model.{path}" if path.startswith("encoder.layers") else path
            found[component, whole] = delta
    return found


def loadable(lora: LoraFile, family: str) -> LoraFile:
    """Without what diffusers has no loader for (sd3's T5)."""
    kept = {layer: one for layer, one in lora.adapters.items() if layer[0] != "text_encoder_3"}
    return LoraFile(kept, lora.metadata, lora.form, lora.detection)


@pytest.mark.parametrize(
    ("family", "form"), [(f, form) for f in FAMILIES for form in FORMS[f] if form != "peft"]
)
def test_stock_diffusers_applies_every_adapter_at_its_strength(
    loras: dict[str, LoraFile],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    form: str,
) -> None:
    lora = loadable(loras[family], family)
    if form == "kohya":
        # diffusers 0.42 takes one alpha for all layers of a kohya file where they differ.
        same = {k: Adapter(a.down, a.up, 6.0) for k, a in lora.adapters.items()}
        lora = LoraFile(same, lora.metadata, lora.form, lora.detection)
    path = write(tmp_path, lora, form)
    stock = build_mini(f"mini-{family}")
    diffusers_logging.enable_propagation()
    try:
        stock.load_lora_weights(str(tmp_path), weight_name=path.name)
    finally:
        diffusers_logging.disable_propagation()
    assert not [r for r in caplog.records if "unexpected key" in r.getMessage()]
    found = stock_changes(stock, lora)
    assert found.keys() == lora.adapters.keys()
    for layer, delta in found.items():
        torch.testing.assert_close(delta, change(lora.adapters[layer]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_every_component_with_the_same_change(
    loras: dict[str, LoraFile], tmp_path: Path, family: str
) -> None:
    lora = loras[family]
    folder = write(tmp_path, lora, "peft")
    stock = build_mini(f"mini-{family}")
    assert {path.name for path in folder.iterdir()} == set(LAYOUTS[family].components)
    for component in LAYOUTS[family].components:
        PeftModel.from_pretrained(stock.components[component], str(folder / component))
    found = stock_changes(stock, lora)
    assert found.keys() == lora.adapters.keys()
    for layer, delta in found.items():
        torch.testing.assert_close(delta, change(lora.adapters[layer]), rtol=1e-12, atol=0)


def test_a_folder_that_peft_saved_is_read(pipelines: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    unet = build_mini("mini-sdxl").unet
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False)
    model = get_peft_model(unet, config)
    model.save_pretrained(str(tmp_path / "unet"))
    for path in (tmp_path, tmp_path / "unet"):
        lora = read_lora(path)
        assert lora.form == "peft" and lora.detection.family == "sdxl"
        theirs = peft_changes(model)
        assert {name for _, name in lora.adapters} == theirs.keys()
        for (component, name), one in lora.adapters.items():
            assert component == "unet" and one.alpha == 3.0
            torch.testing.assert_close(change(one), theirs[name], rtol=1e-12, atol=0)


def test_alpha_is_exact_where_float32_is_not(loras: dict[str, LoraFile], tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path, loras["sdxl"], "kohya"))
    alphas = {tensor.item(): tensor.dtype for key, tensor in tensors.items() if ".alpha" in key}
    assert alphas == {4.0: torch.float32, 6.0: torch.float32, 0.1: torch.float64}


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype_changes_the_tensors_and_not_alpha(
    loras: dict[str, LoraFile], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    lora = loras["sdxl"]
    path = convert(write(tmp_path, lora, "kohya"), "diffusers", None, name)
    assert path == tmp_path / f"lora-kohya-diffusers-{name}.safetensors"
    for layer, one in read_lora(path).adapters.items():
        assert torch.equal(one.down, lora.adapters[layer].down.to(dtype))
        assert one.up.dtype == dtype and one.alpha == lora.adapters[layer].alpha


def test_alpha_that_only_diffusers_will_see_is_noted(
    loras: dict[str, LoraFile], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, loras["sd"], "kohya")
    convert(file, "peft", None, None)
    assert not caplog.records
    convert(file, "diffusers", None, None)
    assert "alpha is not the rank" in caplog.text
    caplog.clear()
    plain = tmp_path / "plain.safetensors"
    write_lora(plain, loras["sd"].folded(), "kohya")
    convert(plain, "diffusers", None, None)
    assert not caplog.records


def test_nothing_is_overwritten(loras: dict[str, LoraFile], tmp_path: Path) -> None:
    source = write(tmp_path, loras["sdxl"], "kohya")
    for form in ("diffusers", "peft"):
        target = convert(source, form, None, None)
        with pytest.raises(UserError, match="is there already"):
            convert(source, form, None, None)
        assert target.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lora-kohya-diffusers.safetensors",
        "lora-kohya-peft",
        "lora-kohya.safetensors",
    ]


def test_no_kohya_form_for_a_transformer(loras: dict[str, LoraFile], tmp_path: Path) -> None:
    source = write(tmp_path, loras["sd3"], "diffusers")
    with pytest.raises(UserError, match="would load such a file and change nothing"):
        convert(source, "kohya", None, None)
    assert list(tmp_path.iterdir()) == [source]


def test_text_encoder_of_an_unknown_family_has_no_kohya_key(tmp_path: Path) -> None:
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    source = tmp_path / "a.safetensors"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, 4), f"{key}.lora_B.weight": torch.ones(4, 2)}, source
    )
    with pytest.raises(UserError, match="nothing tells the model family"):
        convert(source, "kohya", None, None)
    with pytest.raises(UserError, match="nothing tells the model family"):
        convert(source, "peft", None, None)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--to", "onnx"], "must be one of kohya, diffusers, peft"),
        (["--to", "kohya", "--dtype", "int8"], "must be one of fp32, bf16, fp16"),
        (["--to", "kohya", "--output", "x.pt"], "must end with .safetensors"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: list[str], text: str) -> None:
    source = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, source)
    result = CliRunner().invoke(app, ["convert", str(source), *arguments])
    assert result.exit_code == 2 and text in " ".join(result.output.split())


def test_the_command_prints_where_the_file_is(loras: dict[str, LoraFile], tmp_path: Path) -> None:
    source = write(tmp_path, loras["sd"], "kohya")
    result = CliRunner().invoke(app, ["convert", str(source), "--to", "peft"])
    assert result.exit_code == 0, result.output
    folder = Path(result.output.strip().replace("\n", ""))
    assert json.loads((folder / "unet" / "adapter_config.json").read_text())["peft_type"] == "LORA"
