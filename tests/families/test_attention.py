"""Our attention processor is the stock one while adapters are off, and the switch switches."""

from __future__ import annotations

import contextlib

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from fastppt.config import ModelConfig
from fastppt.families.attention import AdapterSwitch, make_adaptable
from fastppt.families.backends import resolve_attention
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables_config import LoraConfig


def predict(family: Family) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 8, 16, 16, generator=generator, dtype=torch.float64)
    prompts = family.encode_prompts(["a photo of a dog", "a red toy on the beach"])
    sizes = torch.tensor([[64.0, 48, 0, 3, 64, 64]] * 2, dtype=family.dtype)
    return family.predict(noisy, torch.tensor([5, 900]), prompts, sizes)


def adapted(family: Family) -> LoraAdapters:
    adapters = LoraAdapters(
        family.make_adaptable(), LoraConfig(rank=4), seed=0, device=family.device
    )
    for pair in adapters.pairs:
        pair.up.normal_(generator=torch.Generator().manual_seed(2))
    adapters.refresh()
    return adapters


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # float64's products of three widths in one round otherwise than one by one.
    [(torch.float32, 0), (torch.bfloat16, 0), (torch.float64, 1e-13)],
)
def test_base_pass_equals_the_untouched_network(dtype: torch.dtype, tolerance: float) -> None:
    family = load_family(ModelConfig(path="mini-sdxl", device="cpu"), dtype=dtype)
    with torch.no_grad():
        untouched = predict(family)
        adapters = adapted(family)
        tuned = predict(family)
        with adapters.switch.base():
            base = predict(family)
        assert (base - untouched).abs().max() <= tolerance * untouched.abs().max()
        assert not torch.equal(tuned, untouched)
        assert torch.equal(predict(family), tuned)


def test_base_pass_does_no_adapter_work(family: Family) -> None:
    adapters = adapted(family)
    for pair in adapters.pairs:
        pair.up.fill_(float("nan"))
    adapters.refresh()
    with torch.no_grad(), adapters.switch.base():
        assert predict(family).isfinite().all()


def test_switch_comes_back_after_an_error() -> None:
    switch = AdapterSwitch()
    with contextlib.suppress(RuntimeError), switch.base():
        assert not switch.enabled
        raise RuntimeError
    assert switch.enabled


@pytest.mark.parametrize("cross", [False, True])
def test_attention_mask_is_applied_as_the_stock_processor_does(cross: bool) -> None:
    torch.manual_seed(0)
    network = torch.nn.ModuleDict(
        {"attn": Attention(16, cross_attention_dim=12 if cross else None, heads=2, dim_head=8)}
    )
    image = torch.randn(2, 9, 16)
    text = torch.randn(2, 5, 12) if cross else None
    # Additive, over the keys; attention gets it repeated for each head.
    mask = torch.randn(4, 1, 5 if cross else 9)
    stock = network["attn"](image, text, attention_mask=mask)
    make_adaptable(network, resolve_attention("sdpa", torch.device("cpu"), torch.float32))
    assert torch.equal(network["attn"](image, text, attention_mask=mask), stock)
