"""Small networks of diffusers, what they are asked, and adapters of everybody's kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from fastppt.backend import AlignmentLosses, Attached
from fastppt.families.attention import make_adaptable
from fastppt.families.joint_attention import make_joint_adaptable
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables_config import LoraConfig

RANK = 3
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TOKENS = 5


@dataclass(frozen=True)
class Passes:
    """A network and one batch for it.

    Attributes:
        network: Frozen.
        base: What the base is asked.
        tuned: What the tuned network is asked: other text.
    """

    network: nn.Module
    base: dict[str, Tensor]
    tuned: dict[str, Tensor]


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def tiny_joint(qk_norm: str | None = None) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        dual_attention_layers=(2,) if qk_norm else (),
        qk_norm=qk_norm,
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": tiny_unet,
    "joint": tiny_joint,
    "joint-qk-norm": lambda: tiny_joint("rms_norm"),
}


def asked(network: nn.Module, batch_size: int, dtype: torch.dtype, text: int) -> dict[str, Tensor]:
    """What a network is asked of a batch; latents are the same for all texts."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    latents = draw(batch_size, 4, 8, 8)
    generator.manual_seed(text)
    tokens = draw(batch_size, TEXT_TOKENS, 16)
    timestep = torch.arange(batch_size) * 300 + 50
    if isinstance(network, UNet2DConditionModel):
        return {"sample": latents, "timestep": timestep, "encoder_hidden_states": tokens}
    return {
        "hidden_states": latents,
        "timestep": timestep,
        "encoder_hidden_states": tokens,
        "pooled_projections": draw(batch_size, 12),
    }


def make_passes(
    kind: str = "unet", *, dtype: torch.dtype = torch.float64, batch_size: int = 2
) -> Passes:
    """A small frozen network with one batch; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[kind]()
    network.to(dtype).eval().requires_grad_(False)
    texts = [asked(network, batch_size, dtype, text) for text in (1, 2)]
    return Passes(network, *texts)


def step(
    attached: Attached, network: nn.Module, passes: Passes, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, AlignmentLosses]:
    """Base pass, tuned pass, losses."""
    with attached.base(columns):
        base = network(**passes.base).sample
    tuned = network(**passes.tuned).sample
    return base, tuned, attached.losses()


class ScriptsLora(nn.Module):
    """An adapter as sd-scripts has it: its `forward` takes the place of the layer's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.lora_down = nn.Linear(layer.in_features, RANK, bias=False)
        self.lora_up = nn.Linear(RANK, layer.out_features, bias=False)
        self.scale, self.multiplier = 0.5, 1.0
        self.org_forward = layer.forward
        layer.forward = self.forward

    def forward(self, inputs: Tensor) -> Tensor:
        change = self.lora_up(self.lora_down(inputs)) * self.multiplier * self.scale
        return self.org_forward(inputs) + change


class TrainerLora(nn.Module):
    """An adapter as OneTrainer has it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.lora_down = nn.Linear(layer.in_features, RANK, bias=False)
        self.lora_up = nn.Linear(RANK, layer.out_features, bias=False)
        self.rank, self.alpha = RANK, torch.tensor(RANK / 2)
        self.orig_forward = layer.forward
        layer.forward = self.forward

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        change = self.lora_up(self.lora_down(inputs)) * (self.alpha / self.rank)
        return self.orig_forward(inputs) + change


def linears_of(network: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(PROJECTIONS)
    }


def randomize(tensors: list[Tensor]) -> None:
    """Fill adapters with values that change what the network does."""
    generator = torch.Generator().manual_seed(5)
    for tensor in tensors:
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data.copy_(0.3 * values)


@dataclass(frozen=True)
class Adapted:
    """A network with adapters.

    Attributes:
        network: As the loop has it, perhaps wrapped.
        parameters: What trains, by any names.
        pairs: (layer, down, up, scale) in the order of the network's modules.
    """

    network: nn.Module
    parameters: dict[str, Tensor]
    pairs: list[tuple[str, Tensor, Tensor, float]]


def with_modules(network: nn.Module, kind: type) -> Adapted:
    """Adapters that live beside the network."""
    adapters = {name: kind(layer) for name, layer in linears_of(network).items()}
    dtype = next(network.parameters()).dtype
    for adapter in adapters.values():
        adapter.to(dtype)
    parameters = {
        f"{name}.{part}": value
        for name, adapter in adapters.items()
        for part, value in adapter.named_parameters()
    }
    randomize([*parameters.values()])
    pairs = [(name, a.lora_down.weight, a.lora_up.weight, 0.5) for name, a in adapters.items()]
    return Adapted(network, parameters, pairs)


def with_peft(
    network: nn.Module,
    *,
    wrapped: bool = False,
    targets: Sequence[str] = PROJECTIONS,
    **settings: Any,
) -> Adapted:
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK / 2, target_modules=[*targets], **settings)
    dtype = next(network.parameters()).dtype
    if wrapped:
        outer: nn.Module = peft.get_peft_model(network, config)
    else:
        network.add_adapter(config)
        outer = network
    network.to(dtype)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    randomize([*parameters.values()])
    pairs = [
        (name, layer.lora_A["default"].weight, layer.lora_B["default"].weight, 0.5)
        for name, layer in network.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    ]
    return Adapted(outer, parameters, pairs)


def with_ours(network: nn.Module) -> Adapted:
    attend = lambda query, key, value, mask: F.scaled_dot_product_attention(  # noqa: E731
        query, key, value, attn_mask=mask
    )
    is_unet = isinstance(network, UNet2DConditionModel)
    make = make_adaptable if is_unet else make_joint_adaptable
    groups = [group for processor in make(network, attend) for group in processor.groups]
    config = LoraConfig(rank=RANK, alpha=RANK / 2, targets=[f"*.{name}" for name in PROJECTIONS])
    dtype = next(network.parameters()).dtype
    adapters = LoraAdapters(groups, config, seed=0, device=torch.device("cpu"), dtype=dtype)
    randomize([tensor for pair in adapters.pairs for tensor in (pair.down, pair.up)])
    adapters.refresh()
    pairs = [(pair.name, pair.down, pair.up, pair.scale) for pair in adapters.pairs]
    return Adapted(network, {"arena": adapters.arena.flat}, pairs)


ADAPTERS: dict[str, Callable[[nn.Module], Adapted]] = {
    "add_adapter": with_peft,
    "get_peft_model": lambda network: with_peft(network, wrapped=True),
    "sd-scripts": lambda network: with_modules(network, ScriptsLora),
    "OneTrainer": lambda network: with_modules(network, TrainerLora),
    "ours": with_ours,
}
