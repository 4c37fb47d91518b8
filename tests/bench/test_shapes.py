from collections import Counter
from math import prod

import pytest
import torch

from bench import shapes

# As published with SDXL base 1.0; whatever is not named is diffusers' default.
SDXL_CONFIG = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
SD15_CONFIG = {"cross_attention_dim": 768, "sample_size": 64}
SD3_CONFIG = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "pooled_projection_dim": 2048,
    "sample_size": 128,
}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
PROJECTIONS += ("to_add_out",)


def build_on_meta(name, config):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return getattr(diffusers, name)(**config)


def list_adapters_of(network, rank, leave_out=()):
    shapes_ = []
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(PROJECTIONS):
            if ".attn" not in name or name in leave_out:
                continue
            shapes_ += [(rank, module.in_features), (module.out_features, rank)]
    return shapes_


@pytest.mark.parametrize(
    ("listed", "tensors", "millions"),
    [
        (shapes.list_sdxl_adapters(32), 1120, 46.4),
        (shapes.list_sd15_adapters(32), 256, 6.4),
        # One projection less than the 191 that SD3-M has: the last add_q_proj gets no gradient.
        (shapes.list_sd3_adapters(32), 382 - 2, 18.8 - 0.1),
        (shapes.list_sd15_unet(), 686, 859.5),
    ],
    ids=["SDXL", "SD1.5", "SD3-M", "SD1.5 UNet"],
)
def test_lists_have_the_sizes_that_the_targets_speak_of(listed, tensors, millions):
    assert len(listed) == tensors
    assert shapes.count_elements(listed) / 1e6 == pytest.approx(millions, abs=0.05)
    assert shapes.count_elements(listed) == sum(prod(shape) for shape in listed)


def test_sdxl_adapters_are_those_of_the_network():
    network = build_on_meta("UNet2DConditionModel", SDXL_CONFIG)
    assert Counter(list_adapters_of(network, 4)) == Counter(shapes.list_sdxl_adapters(4))


def test_sd15_adapters_and_unet_are_those_of_the_network():
    network = build_on_meta("UNet2DConditionModel", SD15_CONFIG)
    assert Counter(list_adapters_of(network, 4)) == Counter(shapes.list_sd15_adapters(4))
    parameters = Counter(tuple(p.shape) for p in network.parameters())
    assert parameters == Counter(shapes.list_sd15_unet())


def test_sd3_adapters_are_those_of_the_network_but_the_one_without_a_gradient():
    network = build_on_meta("SD3Transformer2DModel", SD3_CONFIG)
    dead = "transformer_blocks.23.attn.add_q_proj"
    adapters = list_adapters_of(network, 4, leave_out=(dead,))
    assert dead in dict(network.named_modules())
    assert Counter(adapters) == Counter(shapes.list_sd3_adapters(4))


def test_scaling_lists_are_as_long_as_asked():
    assert [len(shapes.list_scaling(n)) for n in shapes.SCALING_COUNTS] == [10, 100, 1_000, 10_000]
