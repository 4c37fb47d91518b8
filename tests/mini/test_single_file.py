"""Single-file checkpoints load in stock diffusers, and are laid out as published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastppt.mini import MINI_MODELS, build_mini
from fastppt.mini.single_file import original_state

# Keys of the published checkpoints, each with its shape there in terms of the mini models' sizes.
PUBLISHED = {
    "mini-sd": {
        "model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (32, 32, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (32, 32, 1, 1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 64),
        "model.diffusion_model.input_blocks.2.0.op.weight": (32, 32, 3, 3),
        "model.diffusion_model.middle_block.2.out_layers.3.weight": (64, 64, 3, 3),
        # No attention in the lowest block: its upsampler is right behind the resnet.
        "model.diffusion_model.output_blocks.1.1.conv.weight": (64, 64, 3, 3),
        "model.diffusion_model.output_blocks.3.2.conv.weight": (64, 64, 3, 3),
        "model.diffusion_model.output_blocks.7.0.skip_connection.weight": (32, 64, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 32, 3, 3),
        "first_stage_model.encoder.down.0.downsample.conv.weight": (16, 16, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (64, 64, 1, 1),
        # The decoder's blocks are numbered from the image: the last one upsamples first.
        "first_stage_model.decoder.up.2.upsample.conv.weight": (64, 64, 3, 3),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (16, 32, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (256, 64),
    },
    "mini-sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (192, 272),
        "model.diffusion_model.input_blocks.3.1.proj_in.weight": (64, 64),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (
            *(24, 48),
        ),
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight": (240, 80),
        "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_proj.bias": (80,),
        "conditioner.embedders.1.model.positional_embedding": (24, 80),
        "conditioner.embedders.1.model.text_projection": (80, 80),
    },
    "mini-sd3": {
        "model.diffusion_model.pos_embed": (1, 576, 96),
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (288, 96),
        "model.diffusion_model.joint_blocks.2.x_block.adaLN_modulation.1.weight": (576, 96),
        "model.diffusion_model.joint_blocks.2.context_block.adaLN_modulation.1.bias": (192,),
        "model.diffusion_model.final_layer.linear.weight": (64, 96),
        "text_encoders.clip_g.transformer.text_model.final_layer_norm.weight": (80,),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (64, 160),
    },
}


@pytest.mark.parametrize("model", MINI_MODELS)
def test_checkpoint_loads_offline_with_the_weights_of_the_exported_folder(
    model: str, tmp_path: Path
) -> None:
    pipeline = build_mini(model, seed=3)
    pipeline.save_pretrained(tmp_path / "folder")
    save_file(original_state(pipeline), tmp_path / "model.safetensors")
    loaded = type(pipeline).from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    assert loaded.components.keys() == pipeline.components.keys()
    networks = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert len(networks) >= 3
    for name, network in networks.items():
        wanted, found = network.state_dict(), loaded.components[name].state_dict()
        assert found.keys() == wanted.keys()
        unlike = [key for key, tensor in wanted.items() if not torch.equal(found[key], tensor)]
        assert unlike == [], name


@pytest.mark.parametrize("model", MINI_MODELS)
def test_keys_and_shapes_are_those_of_published_checkpoints(model: str) -> None:
    state = original_state(build_mini(model))
    found = {key: tuple(state[key].shape) for key in PUBLISHED[model] if key in state}
    assert found == PUBLISHED[model]


@pytest.mark.parametrize("model", MINI_MODELS)
def test_no_two_tensors_share_memory_and_the_model_is_left_alone(model: str) -> None:
    pipeline = build_mini(model)
    state = original_state(pipeline)
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    before = {key: tensor.clone() for key, tensor in pipeline.vae.state_dict().items()}
    for tensor in state.values():
        tensor.zero_()
    for key, tensor in pipeline.vae.state_dict().items():
        assert torch.equal(tensor, before[key])
