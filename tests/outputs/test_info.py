"""`fastppt info` says what a file is, from the file alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.errors import UserError
from fastppt.families.lora_keys import Detection
from fastppt.mini import build_mini
from fastppt.outputs.adapters import Adapter, LoraFile
from fastppt.outputs.info import block_of, read_info, squared_norm, target_patterns
from fastppt.outputs.lora_forms import write_lora
from tests.outputs.lora_cases import FAMILIES, change, random_lora


def lora_of(layers: dict[tuple[str, str], Adapter], metadata: dict[str, str]) -> LoraFile:
    return LoraFile(layers, metadata, "diffusers", Detection(None, ""))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_each_family_and_form_is_told_and_measured(tmp_path: Path, family: str, form: str) -> None:
    if (family, form) == ("sd3", "kohya"):
        pytest.skip("there is no such form")
    lora = random_lora(build_mini(f"mini-{family}"), family)
    path = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    write_lora(path, lora, form)
    info = read_info(path)
    assert (info.lora.form, info.lora.detection.family) == (form, family)
    squares: dict[str, float] = {}
    for layer, one in lora.adapters.items():
        square = float((change(one) ** 2).sum())
        squares[block_of(layer)] = squares.get(block_of(layer), 0.0) + square
    assert info.norms.keys() == squares.keys()
    for block, square in squares.items():
        assert info.norms[block] == pytest.approx(square**0.5, rel=1e-12)
    result = CliRunner().invoke(app, ["info", str(path)])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    for text in (form, f"{family} (", "4 (", "0.1 (", "float32", "norm of the change", "mine"):
        assert text in words


@pytest.mark.parametrize(
    ("component", "path", "block"),
    [
        ("unet", "down_blocks.1.attentions.0.proj_in", "unet down_blocks.1"),
        ("unet", "mid_block.attentions.0.proj_in", "unet mid_block"),
        ("unet", "conv_in", "unet conv_in"),
        ("transformer", "transformer_blocks.11.attn.to_q", "transformer transformer_blocks.11"),
        (
            "text_encoder",
            "text_model.encoder.layers.10.mlp.fc1",
            "text_encoder text_model.encoder.layers.10",
        ),
        (
            "text_encoder_3",
            "encoder.block.2.layer.0.SelfAttention.q",
            "text_encoder_3 encoder.block.2",
        ),
    ],
)
def test_layers_count_to_their_block(component: str, path: str, block: str) -> None:
    assert block_of((component, path)) == block


def test_blocks_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    layers = {
        ("transformer", f"transformer_blocks.{number}.attn.to_q"): Adapter(
            torch.ones(2, 4), torch.ones(4, 2), 2.0
        )
        for number in (10, 2, 0)
    }
    path = tmp_path / "a.safetensors"
    write_lora(path, lora_of(layers, {}), "diffusers")
    blocks = [f"transformer transformer_blocks.{number}" for number in (0, 2, 10)]
    assert list(read_info(path).norms) == blocks


def test_targets_are_shown_as_patterns() -> None:
    blocks = "up_blocks.0.attentions.0.transformer_blocks"
    layers = [
        ("unet", f"{blocks}.0.attn1.to_out.0"),
        ("unet", f"{blocks}.1.attn1.to_out.0"),
        ("unet", f"{blocks}.1.ff.net.0.proj"),
        ("transformer", "transformer_blocks.0.attn.to_q"),
    ]
    assert target_patterns(layers) == {
        "*.attn1.to_out.0": 2,
        "*.ff.net.0.proj": 1,
        "*.attn.to_q": 1,
    }


def test_norm_needs_no_product() -> None:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(3, 7, generator=generator)
    up = torch.randn(63, 3, generator=generator)
    adapter = Adapter(down, up, 5.0)
    assert squared_norm(adapter) == pytest.approx(float((change(adapter) ** 2).sum()), rel=1e-12)
    assert math.isnan(squared_norm(Adapter(down * torch.nan, up, 5.0)))


def test_bad_and_silent_adapters_are_told(tmp_path: Path) -> None:
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    layers = {
        ("unet", "mid_block.attentions.0.proj_in"): Adapter(down * torch.inf, up, 2.0),
        ("unet", "mid_block.attentions.0.proj_out"): Adapter(down.clone(), up * 0, 2.0),
        ("unet", "mid_block.attentions.1.proj_out"): Adapter(down.clone(), up.clone(), 2.0),
    }
    path = tmp_path / "a.safetensors"
    write_lora(path, lora_of(layers, {}), "diffusers")
    assert read_info(path).warnings == [
        "1 of 3 adapters hold NaN or infinity (the first: unet.mid_block.attentions.0.proj_in)",
        "1 of 3 adapters change nothing: a side or alpha is all zero "
        "(the first: unet.mid_block.attentions.0.proj_out)",
    ]


def test_unknown_stays_unknown(tmp_path: Path) -> None:
    layers = {
        ("unet", "mid_block.attentions.0.proj_in"): Adapter(torch.ones(2, 4), torch.ones(4, 2), 2.0)
    }
    path = tmp_path / "a.safetensors"
    write_lora(path, lora_of(layers, {}), "diffusers")
    assert read_info(path).lora.detection.family is None
    result = CliRunner().invoke(app, ["info", str(path)])
    assert "unknown" in result.output


@pytest.mark.parametrize("content", [b"", b"\xff" * 40])
def test_file_that_is_not_whole_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be read"):
        read_info(path)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"unet.conv_in.lora_A.weight": torch.ones(64, 64)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is the file whole"):
        read_info(path)
