"""Which layers of a network are held to the base's, and which unless a run says so.

All that the alignments need of a network, whoever loaded it: a family of ours or another trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


@dataclass(frozen=True)
class AlignableNetwork:
    """A network seen through the layers that can be held to the base's.

    Attributes:
        network: A UNet or a transformer of joint blocks, of diffusers.
        aligned_blocks: Paths of the blocks whose layers are held unless a run says which.
        feature_layers: The modules whose outputs are the network's features, by path.
        feature_channel_dim: Where features have their channels: 1 or -1.
        features_of: Finds the image's features in the output of a feature layer.
        with_features: Returns such an output with others in their place.
        text_attentions: The attentions in which the image looks at the text, by path.
        is_joint: Whether these are joint attentions, or cross-attentions.
    """

    network: nn.Module
    aligned_blocks: tuple[str, ...]
    feature_layers: dict[str, nn.Module]
    feature_channel_dim: int
    features_of: Callable[[Any], Tensor]
    with_features: Callable[[Any, Tensor], Any]
    text_attentions: dict[str, Attention]
    is_joint: bool


def alignable_network(network: nn.Module) -> AlignableNetwork:
    """Look at a network, which may have adapters and processors of anybody's.

    Raises:
        ValueError: it is none of the kinds that are known here; they are named.
    """
    attentions = {
        name: module for name, module in network.named_modules() if isinstance(module, Attention)
    }
    if isinstance(network, UNet2DConditionModel):
        return AlignableNetwork(
            network,
            aligned_unet_blocks(network.config),
            unet_feature_layers(network),
            UNET_CHANNEL_DIM,
            unet_features_of,
            with_unet_features,
            {name: attn for name, attn in attentions.items() if attn.is_cross_attention},
            is_joint=False,
        )
    if isinstance(network, SD3Transformer2DModel):
        return AlignableNetwork(
            network,
            late_joint_blocks(network.config.num_layers),
            joint_feature_layers(network),
            JOINT_CHANNEL_DIM,
            joint_features_of,
            with_joint_features,
            {name: attn for name, attn in attentions.items() if attn.added_kv_proj_dim is not None},
            is_joint=True,
        )
    raise ValueError(
        f"network: got a {type(network).__module__}.{type(network).__qualname__}, want diffusers' "
        "UNet2DConditionModel or SD3Transformer2DModel, which may be wrapped by peft, accelerate, "
        "DistributedDataParallel or torch.compile; pass the network itself, no pipeline"
    )


UNET_CHANNEL_DIM = 1


def aligned_unet_blocks(config: Any) -> tuple[str, ...]:
    """Return the up blocks of a UNet whose layers are held, by its configuration.

    The UNet of SDXL is the one that is told sizes and pooled text.
    """
    if config.addition_embed_type == "text_time":
        return blocks_with_attention(config.up_block_types)
    return finest_blocks(config.up_block_types)


def blocks_with_attention(up_block_types: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of the up blocks whose layers Adaptive Personalized Training holds.

    Those with attention: of the published UNet the coarser two, as in the paper
    (arXiv 2507.02687).
    """
    return tuple(
        f"up_blocks.{index}" for index, kind in enumerate(up_block_types) if "CrossAttn" in kind
    )


def finest_blocks(up_block_types: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of the last two up blocks, of UNets of one text encoder.

    As many as elsewhere: the finer two, since the coarsest has no attention (our choice).
    """
    num_blocks = len(up_block_types)
    return tuple(f"up_blocks.{index}" for index in range(num_blocks - 2, num_blocks))


def unet_feature_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return what ends each layer of a block, a resnet or the attention after it, by path."""
    layers: dict[str, nn.Module] = {}
    for name, block in network.named_modules():
        if hasattr(block, "resnets"):
            resnets, attentions = block.resnets, getattr(block, "attentions", ())
            layers |= {f"{name}.resnets.{i}": resnet for i, resnet in enumerate(resnets)}
            for i, attention in enumerate(attentions):
                del layers[f"{name}.resnets.{i}"]
                layers[f"{name}.attentions.{i}"] = attention
    return layers


def unet_features_of(output: Any) -> Tensor:
    """Return [B, C, h, w]: a resnet's output, or what stands first in an attention's."""
    features: Tensor = output[0] if isinstance(output, tuple) else output
    return features


def with_unet_features(output: Any, features: Tensor) -> Any:
    """Return a layer's output with other features, a tuple where it was one."""
    return (features, *output[1:]) if isinstance(output, tuple) else features


JOINT_CHANNEL_DIM = -1


def late_joint_blocks(num_layers: int) -> tuple[str, ...]:
    """Return the paths of the second half of the joint blocks."""
    return tuple(f"transformer_blocks.{index}" for index in range(num_layers // 2, num_layers))


def joint_feature_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the joint blocks, by path."""
    blocks = network.get_submodule("transformer_blocks")
    return {f"transformer_blocks.{name}": block for name, block in blocks.named_children()}


def joint_features_of(output: Any) -> Tensor:
    """Return the image tokens [B, Q, C] of a block's output, which are second in it."""
    features: Tensor = output[1]
    return features


def with_joint_features(output: Any, features: Tensor) -> Any:
    """Return a block's output with other image tokens."""
    return (output[0], features)
