"""Model files that are damaged, incomplete or of another kind are refused, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.checkpoints import read_shapes
from fastppt.families.loading import detect_family, load_family

# `Export` is defined beside its fixture.
Exports = Callable[[str], Any]
Refusal = Callable[..., str]


def on_cpu(path: Path | str, **keys: object) -> ModelConfig:
    return ModelConfig(path=str(path), device="cpu", **keys)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "missing", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler"]
)
def test_folder_without_a_component_is_refused(
    copied: Path, missing: str, refusal: Refusal
) -> None:
    shutil.rmtree(copied / missing)
    assert f"model {copied}: has no {missing}/" in refusal(copied)


def test_folder_whose_index_names_no_network_is_refused(copied: Path, refusal: Refusal) -> None:
    edit_json(copied / "model_index.json", unet=[None, None])
    assert "model_index.json names no unet" in refusal(copied)


def test_folder_without_a_transformer_is_refused(
    exports: Exports, tmp_path: Path, refusal: Refusal
) -> None:
    folder = shutil.copytree(exports("sd3").folder, tmp_path / "model")
    shutil.rmtree(folder / "transformer")
    assert f"model {folder}: has no transformer/config.json" in refusal(folder)


WEIGHT_FILES = [
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder_2/model.safetensors",
]


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_component_without_weights_is_refused(copied: Path, name: str, refusal: Refusal) -> None:
    (copied / name).unlink()
    message = refusal(copied)
    assert f"{(copied / name).parent}: has no .safetensors weights" in message
    (copied / name).with_suffix(".bin").write_bytes(b"x")
    assert "but pickles" in refusal(copied)


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_truncated_weights_are_refused_by_file(copied: Path, name: str, refusal: Refusal) -> None:
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[:-1])
    assert f"{copied / name}: is truncated" in refusal(copied)


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_missing_tensor_is_refused_not_drawn_at_random(
    copied: Path, name: str, refusal: Refusal
) -> None:
    state = load_file(copied / name)
    del state[sorted(state)[3]]
    save_file(state, copied / name, metadata={"format": "pt"})
    message = refusal(copied)
    assert name.split("/")[0] in message and "is it complete?" in message


@pytest.mark.parametrize("name", WEIGHT_FILES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_refused_by_tensor(
    copied: Path, name: str, value: float, refusal: Refusal
) -> None:
    state = load_file(copied / name)
    key = sorted(state)[-1]
    state[key].view(-1)[-1] = value
    save_file(state, copied / name, metadata={"format": "pt"})
    message = refusal(copied)
    part, tensor = name.split("/")[0], key.removeprefix("text_model.")
    assert f"{part} has NaN or infinite values in " in message and message.endswith(tensor)


def test_a_value_past_the_end_of_fp16_says_so(copied: Path, refusal: Refusal) -> None:
    name = copied / WEIGHT_FILES[0]
    state = load_file(name)
    state["conv_in.bias"][0] = 1e5
    save_file(state, name, metadata={"format": "pt"})
    load_family(on_cpu(copied, precision="bf16"))
    assert "try --precision bf16" in refusal(copied, precision="fp16")


def test_weights_of_another_shape_are_refused(copied: Path, refusal: Refusal) -> None:
    edit_json(copied / "unet" / "config.json", cross_attention_dim=64)
    assert f"model {copied}: cannot be loaded" in refusal(copied)


@pytest.mark.parametrize("key", ["text_model.final_layer_norm.weight", "out.2.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(
    exports: Exports, tmp_path: Path, key: str, refusal: Refusal
) -> None:
    export = exports("sdxl")
    state = {k: v for k, v in load_file(export.file).items() if not k.endswith(key)}
    assert len(state) < len(load_file(export.file))
    save_file(state, tmp_path / "model.safetensors")
    refused = refusal(tmp_path / "model.safetensors", config_folder=export.folder)
    assert refused.startswith(f"model {tmp_path / 'model.safetensors'}:")


def test_a_checkpoint_with_a_value_that_is_no_number_is_refused(
    exports: Exports, tmp_path: Path, refusal: Refusal
) -> None:
    export = exports("sdxl")
    state = load_file(export.file)
    state["model.diffusion_model.out.2.bias"][0] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    message = refusal(tmp_path / "model.safetensors", config_folder=export.folder)
    assert "unet has NaN or infinite values in conv_out.bias" in message


NETWORK = "model.diffusion_model."
UNET = {
    f"{NETWORK}input_blocks.0.0.weight": (8, 4, 3, 3),
    f"{NETWORK}out.2.weight": (4, 8, 3, 3),
}
CONDITIONS = {f"{NETWORK}label_emb.0.0.weight": (8, 8)}
VAE = {"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)}
SD = UNET | VAE | {"cond_stage_model.transformer.text_model.x": (1,)}
SDXL = UNET | VAE | CONDITIONS | {"conditioner.embedders.1.model.x": (1,)}
JOINT_BLOCK = "joint_blocks.0.context_block.adaLN_modulation.1.bias"
CLIPS = {"text_encoders.clip_l.x": (1,), "text_encoders.clip_g.x": (1,)}
SD3 = VAE | CLIPS | {f"{NETWORK}{JOINT_BLOCK}": (8,), "text_encoders.t5xxl.x": (1,)}
# SD 2: reads text of width 1024.
SD2 = SD | {f"{NETWORK}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}


def checkpoint(file: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, file)
    return file


@pytest.mark.parametrize(("family", "shapes"), [("sd", SD), ("sdxl", SDXL), ("sd3", SD3)])
def test_the_header_tells_the_family(
    tmp_path: Path, family: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    assert detect_family(on_cpu(checkpoint(tmp_path / "m.safetensors", shapes))) == family


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lora_unet_x_attn1_to_q.lora_down.weight": (4, 8)}, "is a LoRA, not a model"),
        ({"transformer.x.attn.to_q.lora_A.weight": (4, 8)}, "is a LoRA, not a model"),
        ({"unet.x.attn1.to_q.lora.up.weight": (8, 4)}, "is a LoRA, not a model"),
        ({"lora_unet_x.hada_w1_a": (8, 4)}, "is a LoRA, not a model"),
        (VAE, "is a VAE, not a model; pass it with --vae"),
        ({"decoder.conv_in.weight": (8, 4, 3, 3)}, "is a VAE, not a model; pass it with --vae"),
        ({"down_blocks.0.resnets.0.norm1.weight": (8,)}, "holds one component"),
        ({"transformer_blocks.0.norm1.weight": (8,)}, "holds one component"),
        ({"model.layers.0.mlp.weight": (8,)}, "holds no model that fastppt knows"),
        (SD | {f"{NETWORK}input_blocks.0.0.weight": (8, 9, 3, 3)}, "reads 9 channels and writes 4"),
        ({k: v for k, v in SD.items() if "out.2" not in k}, "lacks model.diffusion_model.out.2"),
        (SDXL | {"edm_mean": (4,)}, "is trained by EDM"),
        (UNET, "but not the text encoders"),
        (UNET | CONDITIONS | {"conditioner.embedders.0.model.x": (1,)}, "no refiner"),
        # An image's embedding beside the text, as unCLIP has it.
        (SD | CONDITIONS, "but not the text encoders"),
        (SD3 | {f"{NETWORK}joint_blocks.0.x.scale_weight": (1,)}, "holds scaled 8-bit weights"),
        (SD3 | {f"{NETWORK}joint_blocks.0.x.weight_scale": (1,)}, "holds scaled 8-bit weights"),
        ({key: shape for key, shape in SD.items() if key not in VAE}, "pass one with --vae"),
        (SD2, "whether it predicts noise or velocity; pass --model-config"),
        ({key: shape for key, shape in SD3.items() if key not in CLIPS}, "no text encoders"),
        ({key: shape for key, shape in SD3.items() if "t5" not in key}, "holds no T5"),
    ],
)
def test_a_file_that_cannot_be_trained_is_refused_by_what_it_is(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    file = checkpoint(tmp_path / "m.safetensors", shapes)
    with pytest.raises(UserError) as error:
        detect_family(on_cpu(file))
    assert str(error.value).startswith(f"model {file}: ") and message in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_a_truncated_checkpoint_is_refused_by_name(
    exports: Exports, tmp_path: Path, refusal: Refusal, keep: int
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(exports("sd").file.read_bytes()[:keep])
    assert refusal(file, config_folder=exports("sd").folder).startswith(f"{file}: is truncated")


def test_a_git_lfs_pointer_is_refused_by_name(tmp_path: Path, refusal: Refusal) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n")
    assert refusal(file).startswith(f"{file}: is truncated, or no .safetensors file")


def test_a_checkpoint_marked_for_velocity_needs_a_configuration_that_says_so(
    exports: Exports, copied: Path, refusal: Refusal
) -> None:
    file = exports("sdxl").file
    scheduler = copied / "scheduler" / "scheduler_config.json"
    edit_json(scheduler, prediction_type="epsilon")
    message = refusal(file, config_folder=copied)
    assert "predicts velocity (it has the key v_pred)" in message and "epsilon" in message
    edit_json(scheduler, prediction_type="v_prediction")
    assert load_family(on_cpu(file, config_folder=copied)).prediction_type == "v_prediction"


def test_a_checkpoint_marked_for_zero_signal_needs_a_configuration_that_says_so(
    exports: Exports, copied: Path, tmp_path: Path, refusal: Refusal
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(load_file(exports("sdxl").file) | {"ztsnr": torch.zeros(0)}, file)
    scheduler = copied / "scheduler" / "scheduler_config.json"
    message = refusal(file, config_folder=copied)
    assert "it has the key ztsnr" in message and '"rescale_betas_zero_snr": true' in message
    edit_json(scheduler, rescale_betas_zero_snr=True)
    family = load_family(on_cpu(file, config_folder=copied))
    latents, noise = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    assert family.add_noise(latents, noise, torch.tensor([999])).abs().max() < 1e-6


def test_headers_are_read_without_the_weights(exports: Exports) -> None:
    file = exports("sdxl").file
    wanted = {key: tuple(tensor.shape) for key, tensor in load_file(file).items()}
    assert read_shapes(file) == wanted
