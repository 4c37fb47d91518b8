"""Which layers of full-size and of mini models are held to the base by default."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.attention import make_adaptable, text_attentions
from fastppt.families.loading import load_family
from fastppt.families.names import MINI_MODELS
from fastppt.families.sdxl import StableDiffusionXL, blocks_with_attention
from fastppt.objectives.attention_alignment import aligned_attentions
from fastppt.objectives.feature_alignment import aligned_layers
from fastppt.objectives.layers import Outbox, collect, match_layers
from fastppt.stage_config import AttentionAlignmentConfig, FeatureAlignmentConfig
from tests.training.plain_step import ATTENTION_LAYERS, FEATURE_LAYERS, TEMPERATURES


def full_size_unet() -> nn.Module:
    """SDXL's UNet as published, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def test_full_size_defaults_are_those_of_the_paper() -> None:
    network = full_size_unet()
    make_adaptable(network, lambda query, key, value, mask: value)
    layers = StableDiffusionXL.feature_layers(SimpleNamespace(network=network))
    blocks = blocks_with_attention(network.config.up_block_types)
    assert blocks == ("up_blocks.0", "up_blocks.1")
    features = match_layers(None, layers, blocks, "key")
    wanted = [f"up_blocks.{block}.attentions.{layer}" for block in (0, 1) for layer in (0, 1, 2)]
    assert features == wanted
    attentions = match_layers(None, text_attentions(network), blocks, "key")
    assert len(attentions) == 36
    assert sum(name.startswith("up_blocks.0.") for name in attentions) == 30
    assert all(name.endswith(".attn2") for name in attentions)
    # Down blocks without attention, and the finest up block, end their layers in resnets.
    assert [name for name in layers if name.startswith("up_blocks.2.")] == [
        f"up_blocks.2.resnets.{layer}" for layer in (0, 1, 2)
    ]
    assert sum(name.startswith("down_blocks.") for name in layers) == 6


@pytest.mark.parametrize("model", MINI_MODELS)
def test_mini_models_have_their_equivalents(model: str) -> None:
    family = load_family(ModelConfig(path=model, device="cpu"))
    family.make_adaptable()
    layers = aligned_layers(family, FeatureAlignmentConfig(), "key")
    assert list(layers) == FEATURE_LAYERS[model]
    assert all(family.network.get_submodule(name) is layer for name, layer in layers.items())
    held = aligned_attentions(family, AttentionAlignmentConfig(), "key")
    assert list(held) == ATTENTION_LAYERS[model]
    assert held.items() <= family.text_attentions().items()
    assert family.indicator_temperature == TEMPERATURES[model]


def test_blocks_without_a_layer_are_refused() -> None:
    with pytest.raises(UserError, match=r"key: is not set, and up\.1 of this model have no such"):
        match_layers(None, ["down.0.attn"], ["up.1"], "key")
    # A block's name is not a mere prefix.
    with pytest.raises(UserError):
        match_layers(None, ["up.10.attn"], ["up.1"], "key")


def test_what_is_sent_again_is_not_counted() -> None:
    senders = [SimpleNamespace(outbox=Outbox((torch.tensor(float(n)),))) for n in (1, 2)]
    assert [float(loss) for (loss,) in collect(senders)] == [1.0, 2.0]
    for sender in senders:
        sender.outbox.losses = (torch.tensor(9.0),)
    assert senders[0].outbox is senders[1].outbox
    with pytest.raises(AssertionError, match="did not reach"):
        collect([SimpleNamespace(outbox=Outbox())])
