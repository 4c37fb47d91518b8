"""What tells one family's LoRA from another's."""

from __future__ import annotations

import pytest

from fastppt.families.lora_keys import detect_family

JOINT = "transformer_blocks.0.attn.to_q"
UNET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def family_of(*paths: str) -> str | None:
    return detect_family([("transformer", path) for path in paths], {}).family


def test_joint_attention_is_that_of_sd3() -> None:
    assert family_of(JOINT) == "sd3"
    assert family_of("transformer_blocks.0.ff.net.2", "transformer_blocks.9.attn2.to_q", JOINT)


@pytest.mark.parametrize(
    "other",
    [
        # Flux; PixArt; Qwen-Image.
        "single_transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.img_mlp.net.2",
    ],
)
def test_other_transformers_are_not_taken_for_sd3(other: str) -> None:
    assert family_of(JOINT, other) is None
    assert family_of(other) is None


@pytest.mark.parametrize(
    ("version", "family"), [("sd_1.5", "sd"), ("sd_2.1", "sd"), ("sdxl_1.0", "sdxl")]
)
def test_names_that_ai_toolkit_gives_to_models_are_known(version: str, family: str) -> None:
    assert detect_family([("unet", UNET)], {"ss_base_model_version": version}).family == family


def test_a_fine_tuned_model_is_told_by_its_layers_and_an_unknown_transformer_is_not() -> None:
    metadata = {"ss_base_model_version": "illustrious"}
    layer = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert detect_family([("unet", layer)], metadata).family == "sdxl"
    assert detect_family([("transformer", JOINT)], metadata).family is None
    assert detect_family([("unet", layer)], {"ss_base_model_version": ""}).family == "sdxl"


def test_a_small_sdxl_may_have_attention_where_only_sd_has_it() -> None:
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    deep = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    assert detect_family([("unet", first)], {}).family == "sd"
    for layers in ([first, deep], [deep, first]):
        assert detect_family([("unet", path) for path in layers], {}).family == "sdxl"
    # Text encoders of both kinds speak against each other all the same.
    unet, names = [("unet", first), ("unet", deep)], ["lora_te_text_model_encoder_layers_0_mlp_fc1"]
    assert detect_family(unet, {}, names).family is None
