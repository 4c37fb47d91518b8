"""What other programs write is read, and what is not plain LoRA is refused by its key."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import save_file
from torch import Tensor

from fastppt.errors import UserError
from fastppt.outputs.lora_forms import read_lora

UNET = "lora_unet_up_blocks_0_attentions_1_transformer_blocks_3_attn2_to_out_0"
CLIP = "text_model_encoder_layers_11_self_attn_out_proj"


def kohya(name: str, alpha: float | None = 3.0) -> dict[str, Tensor]:
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, 4),
        f"{name}.lora_up.weight": torch.randn(6, 2),
    }
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def saved(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "a.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("name", "component", "layer", "family"),
    [
        (
            UNET,
            "unet",
            "up_blocks.0.attentions.1.transformer_blocks.3.attn2.to_out.0",
            "sdxl",
        ),
        # sd-scripts' own names for SDXL.
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
            "unet",
            "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
            "sdxl",
        ),
        (
            "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
            "unet",
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
            "sdxl",
        ),
        (
            "lora_unet_middle_block_1_transformer_blocks_2_ff_net_2",
            "unet",
            "mid_block.attentions.0.transformer_blocks.2.ff.net.2",
            "sdxl",
        ),
        (
            "lora_unet_output_blocks_5_1_proj_in",
            "unet",
            "up_blocks.1.attentions.2.proj_in",
            None,
        ),
        (
            f"lora_te_{CLIP}",
            "text_encoder",
            "text_model.encoder.layers.11.self_attn.out_proj",
            "sd",
        ),
        (
            f"lora_te1_{CLIP}",
            "text_encoder",
            "text_model.encoder.layers.11.self_attn.out_proj",
            "sdxl",
        ),
        (
            "lora_te2_text_model_encoder_layers_31_mlp_fc2",
            "text_encoder_2",
            "text_model.encoder.layers.31.mlp.fc2",
            "sdxl",
        ),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k",
            "unet",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k",
            "sd",
        ),
    ],
)
def test_kohya_names_are_read(
    tmp_path: Path, name: str, component: str, layer: str, family: str | None
) -> None:
    tensors = kohya(name)
    lora = read_lora(saved(tmp_path, tensors))
    ((found, one),) = lora.adapters.items()
    assert found == (component, layer) and lora.detection.family == family
    assert one.alpha == 3.0 and torch.equal(one.up, tensors[f"{name}.lora_up.weight"])


def test_sdxl_names_of_sd_scripts_are_the_layers_that_diffusers_takes_them_for(
    tmp_path: Path,
) -> None:
    blocks = [f"input_blocks_{n}_1" for n in (4, 5, 7, 8)]
    blocks += ["middle_block_1", *(f"output_blocks_{n}_1" for n in range(6))]
    tensors: dict[str, Tensor] = {}
    for block in blocks:
        tensors |= kohya(f"lora_unet_{block}_transformer_blocks_1_attn2_to_k", alpha=None)
    state, _ = StableDiffusionXLPipeline.lora_state_dict(
        dict(tensors), unet_config=SimpleNamespace(layers_per_block=2)
    )
    theirs = convert_unet_state_dict_to_peft(state)
    ours = read_lora(saved(tmp_path, tensors)).adapters
    assert len(theirs) == 2 * len(ours) == 2 * len(blocks)
    for (component, path), one in ours.items():
        assert torch.equal(theirs[f"{component}.{path}.lora_A.weight"], one.down)
        assert torch.equal(theirs[f"{component}.{path}.lora_B.weight"], one.up)


def test_no_alpha_means_the_rank(tmp_path: Path) -> None:
    (one,) = read_lora(saved(tmp_path, kohya(UNET, alpha=None))).adapters.values()
    assert one.alpha == 2.0 and one.scale == 1.0


@pytest.mark.parametrize(
    ("version", "family"),
    [
        ("sd_v1", "sd"),
        ("sd_v2_v", "sd"),
        ("sdxl_base_v1-0", "sdxl"),
        ("3-medium", "sd3"),
    ],
)
def test_metadata_tells_the_family_first(tmp_path: Path, version: str, family: str) -> None:
    path = saved(tmp_path, kohya(UNET), {"ss_base_model_version": version})
    detection = read_lora(path).detection
    assert detection.family == family and version in detection.evidence


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("unet.mid_block.attentions.0.{}.attn1.processor.to_q_lora.{}.weight", "to_q"),
        ("unet.mid_block.attentions.0.{}.attn1.to_q.lora.{}.weight", "to_q"),
        ("unet.mid_block.attentions.0.{}.attn1.processor.to_out_lora.{}.weight", "to_out.0"),
    ],
)
def test_older_names_of_diffusers_are_read(tmp_path: Path, down: str, up: str) -> None:
    block = "transformer_blocks.0"
    tensors = {
        down.format(block, "down"): torch.randn(2, 4),
        down.format(block, "up"): torch.randn(4, 2),
    }
    ((layer, one),) = read_lora(saved(tmp_path, tensors)).adapters.items()
    assert layer == ("unet", f"mid_block.attentions.0.{block}.attn1.{up}")
    assert torch.equal(one.down, tensors[down.format(block, "down")])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self_attn.q_proj.lora_linear_layer.{}", "self_attn.q_proj"),
        ("mlp.fc1.lora_linear_layer.{}", "mlp.fc1"),
        ("self_attn.to_out_lora.{}", "self_attn.out_proj"),
    ],
)
def test_older_names_of_text_encoders_are_read(tmp_path: Path, old: str, new: str) -> None:
    stem = "text_model.encoder.layers.3."
    tensors = {
        f"text_encoder.{stem}{old.format('down')}.weight": torch.randn(2, 4),
        f"text_encoder.{stem}{old.format('up')}.weight": torch.randn(4, 2),
    }
    (layer,) = read_lora(saved(tmp_path, tensors)).adapters
    assert layer == ("text_encoder", stem + new)


def test_text_encoder_names_of_transformers_5_are_the_same_layers(tmp_path: Path) -> None:
    key = "text_encoder.encoder.layers.0.mlp.fc1"
    path = saved(
        tmp_path,
        {f"{key}.lora_A.weight": torch.randn(2, 4), f"{key}.lora_B.weight": torch.randn(4, 2)},
    )
    assert list(read_lora(path).adapters) == [
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
    ]


def pair(key: str, *kernel: int) -> dict[str, Tensor]:
    return {
        f"{key}.lora_down.weight": torch.randn(2, 4, *kernel),
        f"{key}.lora_up.weight": torch.randn(4, 2, *(1 for _ in kernel)),
    }


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (kohya(UNET) | {f"{UNET}.dora_scale": torch.ones(4)}, f"{UNET}.dora_scale is DoRA"),
        ({f"{UNET}.hada_w1_a": torch.ones(4)}, f"{UNET}.hada_w1_a is LoHa"),
        ({f"{UNET}.lokr_w1": torch.ones(4)}, f"{UNET}.lokr_w1 is LoKr"),
        (
            {"unet.conv_in.lora_magnitude_vector": torch.ones(4)},
            "unet.conv_in.lora_magnitude_vector is DoRA",
        ),
        (
            pair("lora_unet_down_blocks_0_resnets_0_conv1", 3, 3),
            "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight is LoCon",
        ),
        (kohya(UNET) | {"lora_unet_nonsense.alpha": torch.ones(1)}, "lora_unet_nonsense.alpha"),
        (kohya("lora_unet_joint_blocks_0_x_block_attn_qkv"), "lora_unet_joint_blocks_0"),
        (kohya("lora_unet_input_blocks_0_0"), "names no layer"),
        (kohya(UNET) | {"emb_params": torch.ones(4)}, "emb_params"),
        ({"base_model.model.conv_in.lora_A.weight": torch.ones(2, 4)}, "give the folder"),
        ({"unet.conv_in.weight": torch.ones(2, 4)}, "unet.conv_in.weight is not LoRA"),
        ({"controlnet.conv_in.lora_A.weight": torch.ones(2, 4)}, "begins with none of"),
        ({f"{UNET}.alpha": torch.tensor(1.0)}, "has no down and up side"),
        (kohya(UNET) | {f"{UNET}.alpha": torch.ones(2)}, "must be one number"),
        (
            {
                f"{UNET}.lora_down.weight": torch.ones(2, 4),
                f"{UNET}.lora_up.weight": torch.ones(4, 3),
            },
            r"\(2, 4\) and \(4, 3\)",
        ),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_its_key(
    tmp_path: Path, tensors: dict[str, Tensor], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        read_lora(saved(tmp_path, tensors))


def test_a_layer_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a second time"):
        read_lora(saved(tmp_path, kohya(f"lora_te_{CLIP}") | kohya(f"lora_te1_{CLIP}")))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"use_dora": True}, "sets use_dora"),
        ({"use_rslora": True}, "sets use_rslora"),
        ({"peft_type": "LOHA"}, "is LOHA, not LoRA"),
        ({"lora_alpha": None}, "has no lora_alpha"),
    ],
)
def test_peft_configuration_of_another_method_is_refused(
    tmp_path: Path, change: dict[str, object], text: str
) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"base_model.model.conv_in.lora_A.weight": torch.ones(2, 4)},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match=text):
        read_lora(tmp_path)


def test_peft_folder_must_say_what_it_adapts(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="one of unet, text_encoder"):
        read_lora(folder)
