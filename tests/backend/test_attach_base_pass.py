"""Base passes are the network's without adapters, whatever computes it and whatever came later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from torch import Tensor, nn

from fastppt.backend import attach
from tests.backend.foreign_networks import ScriptsLora, make_passes, with_modules, with_peft


def run(network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        prediction: Tensor = network(**inputs).sample
    return prediction


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)])
def test_a_base_pass_is_that_of_the_processor_which_was_there(processor: Any) -> None:
    passes = make_passes(dtype=torch.float32)
    other = run(passes.network, passes.base)
    passes.network.set_attn_processor(processor)
    wanted = run(passes.network, passes.base)
    assert not torch.equal(wanted, other)
    network = with_peft(passes.network).network
    with attach(network, attentions=["*.attn2"]) as attached, attached.base():
        base = network(**passes.base).sample
    assert torch.equal(base, wanted)


def add_peft(network: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["attn1.to_q"], init_lora_weights=False)
    network.add_adapter(config, adapter_name="later")
    network.set_adapter(["default", "later"])


LATER: dict[str, Callable[[Any], object]] = {
    "peft": add_peft,
    "sd-scripts": lambda network: with_modules(network, ScriptsLora),
}


@pytest.mark.parametrize("kind", LATER)
def test_adapters_that_came_after_a_base_pass_are_left_out_of_the_next(kind: str) -> None:
    passes = make_passes(dtype=torch.float32)
    wanted = run(passes.network, passes.base)
    network = with_peft(passes.network, targets=["attn2.to_q"]).network
    with attach(network) as attached:
        with attached.base():
            first = network(**passes.base).sample
        before = run(network, passes.base)
        LATER[kind](network)
        with attached.base():
            second = network(**passes.base).sample
        assert (run(network, passes.base) - before).abs().max() > 1e-3
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)


def test_adapters_that_were_merged_after_a_base_pass_are_refused_in_the_next() -> None:
    passes = make_passes(dtype=torch.float32)
    network: Any = with_peft(passes.network).network
    with attach(network) as attached:
        with attached.base():
            network(**passes.base)
        network.fuse_lora()
        with pytest.raises(ValueError, match="unfuse_lora"), attached.base():
            network(**passes.base)


def test_a_kind_of_peft_without_flags_of_its_own_needs_a_switch() -> None:
    passes = make_passes(dtype=torch.float32)
    wanted = run(passes.network, passes.base)
    config = peft.LNTuningConfig(target_modules=["transformer_blocks.0.norm1"])
    network: Any = peft.get_peft_model(passes.network, config)
    with pytest.raises(ValueError, match=r"norm1: its adapter is a LNTuningLayer.* switch="):
        attach(network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    with attach(network, switch=network.disable_adapter) as attached, attached.base():
        base = network(**passes.base).sample
    assert torch.equal(base, wanted)
    assert (run(network, passes.base) - wanted).abs().max() > 1e-3
