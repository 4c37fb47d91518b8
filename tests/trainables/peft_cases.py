"""A small network, peft's adapters of each kind for it, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastppt.families.attention import Projections
from fastppt.families.base import Family
from fastppt.mini.sdxl import LATENT_CHANNELS, TEXT_WIDTH_2
from fastppt.trainables.peft_files import adapter_files
from fastppt.trainables.peft_tuners import PeftAdapters
from fastppt.trainables_config import (
    AdapterConfig,
    BoftConfig,
    DoraConfig,
    LohaConfig,
    LokrConfig,
    OftConfig,
)

KINDS: dict[str, AdapterConfig] = {
    "dora": DoraConfig(rank=3, alpha=6.0),
    "loha": LohaConfig(rank=3, alpha=6.0),
    "lokr": LokrConfig(rank=2, alpha=6.0),
    "lokr, whole": LokrConfig(rank=16, decompose_factor=4),
    "oft": OftConfig(block_size=8),
    "oft, blocks": OftConfig(num_blocks=4, targets=["*.to_k", "*.to_out.0"]),
    "boft": BoftConfig(block_size=4),
}
BUTTERFLY = BoftConfig(block_size=4, factors=3)


class Small(nn.Module):
    """Four projections, as an attention has them, and nothing between them that needs a module."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            attention = nn.Module()
            for name in ("to_q", "to_k", "to_v"):
                attention.add_module(name, nn.Linear(48, 64, bias=False))
            attention.add_module("to_out", nn.ModuleList([nn.Linear(64, 48)]))
        self.attn1 = attention
        self.requires_grad_(False).double()

    def groups(self) -> list[Projections]:
        linears = dict(self.named_modules())
        return [
            Projections(names, tuple(linears[name] for name in names))
            for names in (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn1.to_out.0",))
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = (self.attn1.get_submodule(f"to_{x}")(inputs) for x in "qkv")
        return self.attn1.to_out[0](query * key.sigmoid() + value)


def small_adapters(
    network: Small, config: AdapterConfig, *, moved: float = 0.3, seed: int = 0
) -> tuple[PeftAdapters, Callable[[Tensor], Tensor]]:
    """Adapters, each value moved at random, and the network that they change."""
    groups = network.groups()
    dtype = torch.promote_types(groups[0].linears[0].weight.dtype, torch.float32)
    adapters = PeftAdapters(
        groups, config, seed=seed, device=torch.device("cpu"), dtype=dtype, key="trainables.kind"
    )
    move(adapters, moved)

    def run(inputs: Tensor) -> Tensor:
        query, key, value = groups[0](inputs)
        (output,) = groups[1](query * key.sigmoid() + value)
        return output

    return adapters, run


def move(adapters: PeftAdapters, distance: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for tensor in adapters.tensors.values():
        tensor.add_(distance * torch.randn(tensor.shape, generator=generator))


def adapters_for(family: Family, config: AdapterConfig, *, moved: float = 0.3) -> PeftAdapters:
    adapters = PeftAdapters(
        family.make_adaptable(),
        config,
        seed=0,
        device=family.device,
        dtype=torch.promote_types(family.dtype, torch.float32),
        key="stage.0.trainables.kind",
    )
    move(adapters, moved)
    return adapters


def prediction_of(network: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    conditions = {"text_embeds": draw(2, TEXT_WIDTH_2), "time_ids": draw(2, 6)}
    return network(
        draw(2, LATENT_CHANNELS, 16, 16),
        torch.tensor([5, 900]),
        draw(2, 24, 128),
        added_cond_kwargs=conditions,
    ).sample


def draw_inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)


def written(folder: Path, adapters: PeftAdapters, dtype: torch.dtype = torch.float64) -> Path:
    folder.mkdir()
    for name, content in adapter_files(adapters, dtype, {"made": "here"}).items():
        (folder / name).write_bytes(content)
    return folder
