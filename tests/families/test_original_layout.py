"""Published models in full size, and back through diffusers' own conversion: nothing is lost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from bench.networks import SD3_TRANSFORMER, SDXL_VAE, build_network
from fastppt.errors import UserError
from fastppt.families import original_layout
from fastppt.families.checkpoints import check_marks
from fastppt.families.original_layout import original_layout as to_original
from fastppt.mini import build_mini
from fastppt.mini.sd import build_mini_sd

State = dict[str, Tensor]
NETWORK = "model.diffusion_model."
# What transformer/config.json of SD 3.5 medium says beside SD 3's.
SD35_MEDIUM: dict[str, Any] = SD3_TRANSFORMER | {
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
    "pos_embed_max_size": 384,
}


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def with_prefix(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_layer_of_a_full_unet_comes_back(name: Any) -> None:
    unet = build_network(name, "meta")
    original = with_prefix(original_layout._unet(unet), NETWORK)
    assert len(original) == len(unet.state_dict())
    back = convert_ldm_unet_checkpoint(original, unet.config)
    assert shapes(back) == shapes(unet.state_dict())


@pytest.mark.parametrize("config", [SD3_TRANSFORMER, SD35_MEDIUM], ids=["3", "3.5"])
def test_every_layer_of_a_full_joint_transformer_comes_back(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config)
    original = original_layout._joint_transformer(transformer)
    back = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    assert shapes(back) == shapes(transformer.state_dict())
    # Keys of the published file that differ between the two.
    norm = "joint_blocks.0.context_block.attn.ln_q.weight" in original
    dual = "joint_blocks.12.x_block.attn2.qkv.weight" in original
    assert norm == dual == (config is SD35_MEDIUM)


def test_norms_and_second_attention_keep_their_values() -> None:
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
    widths = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16}
    more = {"dual_attention_layers": (0,), "pos_embed_max_size": 8}
    transformer = SD3Transformer2DModel(**(SD35_MEDIUM | small | widths | more))
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_()
    original = dict(original_layout._joint_transformer(transformer))
    back = convert_sd3_transformer_checkpoint_to_diffusers(original)
    for key, tensor in transformer.state_dict().items():
        assert torch.equal(back[key], tensor), key


def test_every_layer_of_a_full_vae_comes_back() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**SDXL_VAE)
    original = with_prefix(original_layout._vae(vae), "first_stage_model.")
    back = convert_ldm_vae_checkpoint(original, vae.config)
    assert back.keys() == vae.state_dict().keys()
    # The 1x1 convolutions of the attention come back as matrices when they are loaded.
    assert {key: t.numel() for key, t in back.items()} == {
        key: t.numel() for key, t in vae.state_dict().items()
    }


def test_text_encoder_of_the_second_generation_comes_back() -> None:
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_hidden_layers=23,
        hidden_act="gelu",
        vocab_size=100,
    )
    encoder = CLIPTextModel(config)
    original = with_prefix(original_layout._open_clip(encoder), "cond_stage_model.model.")
    assert "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight" in original
    assert "cond_stage_model.model.text_projection" not in original
    back = convert_open_clip_checkpoint(SimpleNamespace(config=config), original)
    wanted = original_layout._clip(encoder)
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in wanted.items())


def test_checkpoint_says_what_it_predicts_where_programs_look(tmp_path: Path) -> None:
    pipeline = build_mini("mini-sdxl")
    pipeline.register_modules(
        scheduler=DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    )
    file = tmp_path / "model.safetensors"
    original = to_original(pipeline)
    save_file({key: tensor.clone().contiguous() for key, tensor in original.items()}, file)
    check_marks(file, pipeline.scheduler.config)
    for wrong in ({}, {"prediction_type": "v_prediction"}):
        with pytest.raises(UserError, match="it has the key"):
            check_marks(file, wrong)
    marks = {"v_pred", "ztsnr"}
    assert marks & to_original(build_mini("mini-sdxl")).keys() == {"v_pred"}
    assert not marks & to_original(build_mini("mini-sd")).keys()


def test_second_generation_loads_offline_with_its_weights(tmp_path: Path) -> None:
    pipeline = build_mini_sd(3, version="2.1")
    pipeline.save_pretrained(tmp_path / "folder")
    original = to_original(pipeline)
    assert "cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.weight" in original
    file = tmp_path / "model.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in original.items()}, file)
    loaded = type(pipeline).from_single_file(
        str(file), config=str(tmp_path / "folder"), local_files_only=True
    )
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            wanted, found = part.state_dict(), loaded.components[name].state_dict()
            assert wanted.keys() == found.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
