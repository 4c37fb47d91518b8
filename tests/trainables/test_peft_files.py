"""The files of peft's adapters: read by stock networks and pipelines, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.mini import build_mini
from fastppt.trainables.peft_files import dora_file, load_adapter
from tests.trainables.peft_cases import (
    BUTTERFLY,
    KINDS,
    Small,
    adapters_for,
    draw_inputs,
    prediction_of,
    small_adapters,
    written,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "boft, factors"])
def test_a_stock_network_takes_the_files(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network = Small().to(dtype)
    adapters, run = small_adapters(network, KINDS.get(kind, BUTTERFLY), moved=0.1)
    folder = written(tmp_path / "out", adapters, torch.float32)
    stock = Small().to(dtype)
    load_adapter(stock, folder)
    ours, theirs = run(draw_inputs(dtype)), stock(draw_inputs(dtype))
    assert theirs.dtype == dtype
    # Layers that are not there where adapters became part of the weights.
    added = [value for name, value in stock.named_parameters() if ".default" in name]
    assert all(value.dtype == torch.float32 for value in added)
    assert bool(added) == ("boft" not in kind)
    tolerance = 8 * torch.finfo(dtype).eps * ours.abs().max()
    assert (ours - theirs).abs().max() <= tolerance


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    adapters, _ = small_adapters(Small(), KINDS["oft"])
    folder = written(tmp_path / "out", adapters, torch.float32)
    with pytest.raises(UserError, match=r"no linear layer attn1\..*; they were made for another"):
        load_adapter(nn.Sequential(nn.Linear(8, 8)), folder)
    other = Small()
    other.attn1.to_q = nn.Linear(16, 64)
    with pytest.raises(
        UserError, match=r"to_q.* has the shape \(6, 28\) in the file and \(2, 28\)"
    ):
        load_adapter(other, folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"cannot be read .*; copy them anew"):
        load_adapter(Small(), folder)


def test_settings_of_other_peft_adapters_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "out", small_adapters(Small(), KINDS["oft"])[0], torch.float32)
    settings = folder / "adapter_config.json"
    settings.write_text(settings.read_text().replace('neumann": false', 'neumann": true'))
    with pytest.raises(UserError, match=r"is none that was written here; load the folder by"):
        load_adapter(Small(), folder)


@pytest.mark.slow
def test_pipeline_reads_dora_as_a_lora_file(family_float64: Family) -> None:
    adapters = adapters_for(family_float64, KINDS["dora"])
    pipe = build_mini("mini-sdxl")
    pipe.unet.double()
    pipe.load_lora_weights(dora_file(adapters, "unet"))
    torch.testing.assert_close(
        prediction_of(pipe.unet), prediction_of(family_float64.network), rtol=1e-9, atol=1e-9
    )
