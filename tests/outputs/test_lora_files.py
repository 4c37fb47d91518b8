"""A run's files: stock diffusers reads both whole, and draws what we draw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastppt.config import ModelConfig, RunConfig
from fastppt.config_io import render_toml
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.mini import build_mini
from fastppt.mini.tokenizer import MODEL_MAX_LENGTH
from fastppt.outputs.adapters import Adapter
from fastppt.outputs.generate import install_lora
from fastppt.outputs.lora_files import (
    DIFFUSERS_FILE,
    find_lora_file,
    lora_of_run,
    read_lora_file,
    write_lora_files,
)
from fastppt.outputs.lora_forms import read_lora, write_lora
from fastppt.outputs.model_card import model_card
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables.trainables import Trainables
from fastppt.trainables_config import LoraConfig
from tests.outputs.lora_cases import FAMILIES, peft_changes

PROMPT = "a photo of sks robot in the snow"


def trained(family: Family, alpha: float | None = None) -> LoraAdapters:
    """Adapters strong enough to change a picture."""
    config = LoraConfig(rank=4, alpha=alpha)
    adapters = LoraAdapters(family.make_adaptable(), config, seed=0, device=family.device)
    generator = torch.Generator().manual_seed(5)
    for pair in adapters.pairs:
        pair.up.copy_(0.2 * torch.randn(pair.up.shape, generator=generator))
    return adapters


def draw(family: Family) -> np.ndarray:
    (image,) = family.sample(
        family.encode_prompts([PROMPT]),
        family.encode_negative(),
        seeds=[3],
        resolution=64,
        steps=4,
        guidance_scale=4.0,
    )
    return np.asarray(image, dtype=np.int16)


Written = tuple[list[Path], LoraAdapters, Family]
Write = Callable[..., Written]


@pytest.fixture
def write(make_config: Callable[..., RunConfig], tmp_path: Path) -> Write:
    """Return a writer of the files of a run on a mini model."""

    def write_run(name: str = "sdxl", **settings: object) -> Written:
        family = load_family(ModelConfig(path=f"mini-{name}", device="cpu"))
        config = make_config(
            photos__resolution=64, name="my robot", model__path=f"mini-{name}", **settings
        )
        adapters = trained(family, alpha=6.0)
        files = write_lora_files(
            tmp_path / "lora", config, family, Trainables({"lora": adapters}), {(64, 64): 5}
        )
        return files, adapters, family

    return write_run


@pytest.fixture
def written(write: Write) -> Written:
    return write()


def load_into(
    stock: Any, folder: Path, weight_name: str | None, caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Load a LoRA with stock diffusers and return what it complains of."""
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level("INFO"):
            stock.load_lora_weights(str(folder), weight_name=weight_name)
    finally:
        diffusers_logging.disable_propagation()
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if "unexpected key" in text or "missing key" in text.lower()]


@pytest.mark.parametrize("change", ["a key too many", "a key too few"])
def test_a_key_too_many_or_too_few_does_not_pass_unseen(
    written: Written, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    (diffusers_file, _), _, _ = written
    tensors = load_file(diffusers_file)
    key = next(iter(tensors))
    if change == "a key too many":
        tensors[key.replace("to_q", "to_z").replace("lora_A", "lora_C")] = torch.ones(1)
    else:
        del tensors[key]
    save_file(tensors, diffusers_file)
    assert load_into(build_mini("mini-sdxl"), diffusers_file.parent, diffusers_file.name, caplog)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("place", [0, 1, None])
def test_stock_diffusers_loads_every_key_at_its_strength(
    write: Write, name: str, place: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    files, adapters, family = write(name)
    stock = build_mini(f"mini-{name}")
    # None: the folder, where diffusers finds its file by itself.
    weight_name = None if place is None else files[place].name
    assert load_into(stock, files[0].parent, weight_name, caplog) == []
    changes = peft_changes(stock.components[family.lora_component])
    assert changes.keys() == {pair.name for pair in adapters.pairs}
    for pair in adapters.pairs:
        wanted = pair.scale * (pair.up.double() @ pair.down.double())
        torch.testing.assert_close(changes[pair.name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_diffusers_draws_the_same(
    write: Write, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (_, file), adapters, family = write(name)
    stock = build_mini(f"mini-{name}")
    stock.set_progress_bar_config(disable=True)
    load_into(stock, file.parent, file.name, caplog)
    generator = torch.Generator().manual_seed(3)
    (image,) = stock(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=generator,
        height=64,
        width=64,
        **({"max_sequence_length": stock.tokenizer.model_max_length} if name == "sd3" else {}),
    ).images
    difference = np.abs(draw(family) - np.asarray(image, dtype=np.int16))
    assert (difference <= 2).mean() >= 0.999
    with adapters.switch.base():
        assert (np.abs(draw(family) - np.asarray(image, dtype=np.int16)) > 2).mean() > 0.2


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_kohya_keys_follow_the_published_rule(write: Write, name: str) -> None:
    (_, kohya_file), adapters, family = write(name)
    tensors = load_file(kohya_file)
    linears = {
        f"lora_unet_{path.replace('.', '_')}": module
        for path, module in family.network.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert len(tensors) == 3 * len(adapters.pairs)
    for key in tensors:
        layer, _, part = key.partition(".")
        linear = linears[layer]
        wanted = {
            "lora_down.weight": (4, linear.in_features),
            "lora_up.weight": (linear.out_features, 4),
            "alpha": (),
        }
        assert tensors[key].shape == wanted[part]
    assert {float(tensors[key]) for key in tensors if key.endswith(".alpha")} == {6.0}


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_kohya_metadata_says_what_it_is(written: Written) -> None:
    (_, kohya_file), _, _ = written
    assert kohya_file.name == "my robot.safetensors"
    metadata = metadata_of(kohya_file)
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "6"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_v2"] == "False" and metadata["ss_clip_skip"] == "None"
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "my robot"
    assert json.loads(metadata["ss_tag_frequency"]) == {"sks robot": {"sks robot": 5}}
    assert metadata["ss_enable_bucket"] == "False" and metadata["ss_bucket_info"] == "null"
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.trigger_phrase"] == "sks robot"
    assert metadata["modelspec.resolution"] == "64x64"


@pytest.mark.parametrize(
    ("name", "version", "architecture"),
    [
        ("sd", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd3", "3-medium", "stable-diffusion-3-medium/lora"),
    ],
)
def test_other_families_name_their_base_model(
    write: Write, name: str, version: str, architecture: str
) -> None:
    (_, file), _, _ = write(name)
    metadata = metadata_of(file)
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == architecture
    assert ("modelspec.prediction_type" in metadata) == (name == "sd")
    # sd-scripts' module reads the kohya form alone.
    assert ("ss_network_module" in metadata) == (name == "sd")


@pytest.mark.parametrize(("name", "alpha"), [("sd", "6"), ("sd3", "4")])
def test_alpha_in_the_metadata_is_that_of_the_file(write: Write, name: str, alpha: str) -> None:
    (_, file), _, _ = write(name)
    assert metadata_of(file)["ss_network_alpha"] == alpha
    assert {one.alpha for one in read_lora(file).adapters.values()} == {float(alpha)}


def test_buckets_are_in_the_metadata(
    make_config: Callable[..., RunConfig], family: Family, tmp_path: Path
) -> None:
    config = make_config(photos__resolution=64, photos__buckets=True, name="a")
    counts = {(64, 64): 2, (48, 80): 3}
    trainables = Trainables({"lora": trained(family)})
    _, file = write_lora_files(tmp_path / "lora", config, family, trainables, counts)
    metadata = metadata_of(file)
    assert metadata["ss_enable_bucket"] == "True" and metadata["ss_num_train_images"] == "5"
    assert json.loads(metadata["ss_bucket_info"])["buckets"] == {
        "0": {"resolution": [64, 64], "count": 2},
        "1": {"resolution": [80, 48], "count": 3},
    }


def test_hashes_are_of_the_tensors_as_other_tools_take_them(written: Written) -> None:
    for file in written[0][1:]:
        content = file.read_bytes()
        body = content[8 + int.from_bytes(content[:8], "little") :]
        metadata = metadata_of(file)
        assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
        assert metadata["modelspec.hash_sha256"] == f"0x{metadata['sshs_model_hash']}"
        # A file of less than a MiB has nothing where the old hash looks.
        assert len(content) < 0x100000
        assert metadata["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_save_dtype_is_that_of_all_tensors_but_alpha(write: Write, name: str) -> None:
    files, adapters, _ = write(name, save_dtype="bf16")
    pair = adapters.pairs[0]
    for file in files:
        tensors = load_file(file)
        others = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
        assert {tensor.dtype for tensor in others.values()} == {torch.bfloat16}
        alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
        assert all(alpha.item() == 6.0 for alpha in alphas)
    down = load_file(files[0])[f"{written_component(name)}.{pair.name}.lora_A.weight"]
    assert torch.equal(down, pair.down.to(torch.bfloat16))


@pytest.mark.parametrize(("name", "places"), [("sdxl", [0]), ("sd3", [0, 1])])
def test_programs_that_know_no_alpha_in_the_diffusers_form_see_the_same_change(
    write: Write, name: str, places: list[int]
) -> None:
    files, adapters, family = write(name)
    for place in places:
        assert "lora_adapter_metadata" not in metadata_of(files[place])
        tensors = load_file(files[place])
        for pair in adapters.pairs:
            key = f"{family.lora_component}.{pair.name}"
            theirs = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            torch.testing.assert_close(theirs, pair.scale * pair.up @ pair.down)


def written_component(name: str) -> str:
    return "transformer" if name == "sd3" else "unet"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("place", [0, 1])
def test_both_forms_read_back_as_the_same_weights(write: Write, name: str, place: int) -> None:
    files, adapters, family = write(name)
    weights = read_lora_file(files[place], family).network
    assert weights.keys() == {pair.name for pair in adapters.pairs}
    for pair in adapters.pairs:
        down, up, scale = weights[pair.name]
        torch.testing.assert_close(scale * up @ down, pair.scale * pair.up @ pair.down)
        if files[place].name != DIFFUSERS_FILE and name != "sd3":
            assert torch.equal(up, pair.up) and scale == pair.scale


@pytest.mark.parametrize("other", [name for name in FAMILIES if name != "sdxl"])
@pytest.mark.parametrize("place", [0, 1])
def test_lora_of_another_family_is_refused_and_both_are_named(
    write: Write, family: Family, other: str, place: int
) -> None:
    files, _, _ = write(other)
    with pytest.raises(UserError, match=rf"of the family {other} .* of the family sdxl"):
        read_lora_file(files[place], family)


def test_adapter_that_nothing_reads_is_left_out_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = load_family(ModelConfig(path="mini-sd3", device="cpu"))
    (unread,) = family.unread_projections
    lora = lora_of_run(family, Trainables({"lora": trained(family)}), {})
    assert ("transformer", unread) not in lora.adapters
    adapters = dict(lora.adapters)
    one = next(iter(adapters.values()))
    adapters["transformer", unread] = Adapter(one.down.clone(), one.up.clone(), one.alpha)
    file = tmp_path / "a.safetensors"
    write_lora(file, type(lora)(adapters, {}, "diffusers", lora.detection), "diffusers")
    assert read_lora_file(file, family).network.keys() == {name for _, name in lora.adapters}
    assert unread in caplog.text and "left out" in caplog.text


def test_text_adapters_that_nothing_reads_are_left_out_with_one_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other trainers adapt the last layer of SDXL's first text encoder too."""
    family = load_family(ModelConfig(path="mini-sdxl", device="cpu"))
    config = LoraConfig(rank=2)
    text = LoraAdapters(family.text.make_adaptable(), config, seed=0, device=family.device)
    lora = lora_of_run(family, Trainables({"lora": trained(family), "text_encoder_lora": text}), {})
    file = tmp_path / "a.safetensors"
    write_lora(file, lora, "kohya")
    weights = read_lora_file(file, family)
    names = {pair.name for pair in text.pairs}
    assert len(family.unread_projections) == 4 and names > set(family.unread_projections)
    assert weights.text.keys() == names - set(family.unread_projections)
    (note,) = caplog.messages
    assert all(name in note for name in family.unread_projections)
    again = load_family(ModelConfig(path="mini-sdxl", device="cpu"))
    trainables = install_lora(again, weights)
    assert {pair.name for pair in trainables.text_encoder_lora.pairs} == weights.text.keys()


def test_run_folder_stands_for_the_file_with_unfolded_alpha(
    make_config: Callable[..., RunConfig], write: Write, tmp_path: Path
) -> None:
    files, _, _ = write()
    folder = files[0].parent
    assert find_lora_file(folder) == files[0]
    config = make_config(name="my robot", output=str(folder))
    (folder / "config.toml").write_text(render_toml(config))
    assert find_lora_file(folder) == files[1]
    files[1].unlink()
    assert find_lora_file(folder) == files[0]


def test_model_card_loads_the_model_as_the_run_did(
    make_config: Callable[..., RunConfig], family: Family
) -> None:
    adapters = Trainables({"lora": trained(family)})
    card = model_card(make_config(photos__resolution=64), family, adapters, 5, 1.0)
    assert 'pipe = build_mini("mini-sdxl")' in card and "A1111" in card
    single = make_config(
        photos__resolution=64,
        model__path="/models/a.safetensors",
        model__config_folder="/models/config",
        model__vae="owner/vae",
    )
    card = model_card(single, family, adapters, 5, 1.0)
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'StableDiffusionXLPipeline.from_single_file(\n    "/models/a.safetensors"' in code
    assert (
        'config="/models/config"' in code and 'AutoencoderKL.from_pretrained("owner/vae")' in code
    )


def test_card_and_metadata_say_what_pulled_and_what_held(
    write: Write, make_config: Callable[..., RunConfig], family: Family
) -> None:
    objectives = "stage.0.objectives"
    settings = {
        "gradient_checkpointing": True,
        "stage.0.base_every": 4,
        f"{objectives}.denoising.weighting": "adaptive",
        f"{objectives}.anchor.weight": 0.25,
        f"{objectives}.attention_alignment.weight": 3e-4,
    }
    wanted = (
        "denoising 1 (adaptive), anchor 0.25 (effective), attention_alignment 0.0003, "
        "base asked every 4 steps"
    )
    (_, file), adapters, _ = write(**settings)
    metadata = metadata_of(file)
    assert metadata["ss_training_comment"] == f"fastppt, ppt-lora: {wanted}"
    assert metadata["ss_gradient_checkpointing"] == "True"
    config = make_config(photos__resolution=64, **settings)
    assert f"| {wanted} |" in model_card(config, family, Trainables({"lora": adapters}), 5, 1.0)
    plain = model_card(
        make_config(photos__resolution=64), family, Trainables({"lora": adapters}), 5, 1.0
    )
    assert "| denoising 1 (uniform), anchor 0.003 (effective) |" in plain


def test_model_card_of_a_family_without_kohya_form_names_comfyui_alone(
    make_config: Callable[..., RunConfig],
) -> None:
    family = load_family(ModelConfig(path="mini-sd3", device="cpu"))
    config = make_config(photos__resolution=64, model__path="mini-sd3")
    card = model_card(config, family, Trainables({"lora": trained(family)}), 5, 1.0)
    assert "ComfyUI" in card and "A1111" not in card


@pytest.mark.parametrize(
    ("settings", "num_tokens"),
    [({}, MODEL_MAX_LENGTH), ({"large_text_encoder": False}, 0)],
)
def test_model_card_reads_prompts_as_the_run_did(
    make_config: Callable[..., RunConfig], settings: dict[str, bool], num_tokens: int
) -> None:
    family = load_family(ModelConfig(path="mini-sd3", device="cpu", **settings))
    keys = {f"model__{key}": value for key, value in settings.items()}
    config = make_config(photos__resolution=64, model__path="owner/model", **keys)
    code = model_card(config, family, Trainables({"lora": trained(family)}), 5, 1.0).split(
        "```python\n"
    )[1]
    assert f'pipe("a photo of sks robot", max_sequence_length={num_tokens}).images' in code
    assert ("text_encoder_3=None, tokenizer_3=None" in code) == bool(settings)


def test_model_card_finds_the_vae_of_a_whole_model(
    make_config: Callable[..., RunConfig], family: Family, tmp_path: Path
) -> None:
    (tmp_path / "vae").mkdir()
    config = make_config(photos__resolution=64, model__path="owner/model", model__vae=str(tmp_path))
    card = model_card(config, family, Trainables({"lora": trained(family)}), 5, 1.0)
    assert f'AutoencoderKL.from_pretrained("{tmp_path}", subfolder="vae")' in card


def test_alpha_in_the_metadata_of_a_peft_file_counts(family: Family, tmp_path: Path) -> None:
    adapters = trained(family)
    # A layer that tells SDXL from SD.
    pair = next(each for each in adapters.pairs if ".transformer_blocks.1." in each.name)
    stock = build_mini("mini-sdxl")
    layers = {f"{pair.name}.lora_A.weight": pair.down, f"{pair.name}.lora_B.weight": pair.up}
    metadata = {"r": 4, "lora_alpha": 12, "target_modules": ["to_q"]}
    stock.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    ((name, (down, up, scale)),) = read_lora_file(tmp_path, family).network.items()
    assert name == pair.name and scale == 3.0
    assert torch.equal(down, pair.down) and torch.equal(up, pair.up)


def test_lora_of_something_else_is_refused(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    key = "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, 4), f"{key}.lora_B.weight": torch.ones(4, 2)}, path
    )
    with pytest.raises(UserError, match="is no layer of unet, text_encoder, text_encoder_2"):
        read_lora_file(path, family)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"{}"])
def test_broken_file_is_named(family: Family, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read") as error:
        read_lora_file(path, family)
    assert str(path) in str(error.value)


def test_file_without_pairs_is_refused(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"unet.mid_block.x.to_q.lora_A.weight": torch.ones(2, 4)}, path)
    with pytest.raises(UserError, match="has no up side"):
        read_lora_file(path, family)


def test_kohya_file_without_its_up_side_is_named(written: Written, tmp_path: Path) -> None:
    (_, kohya_file), _, family = written
    tensors = {k: v for k, v in load_file(kohya_file).items() if "lora_up" not in k}
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"half\.safetensors"):
        read_lora_file(tmp_path / "half.safetensors", family)


def test_missing_file_and_pickle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the run finished"):
        find_lora_file(tmp_path)
    pickle = tmp_path / "a.pt"
    pickle.write_bytes(b"x")
    with pytest.raises(UserError, match=r"must be a \.safetensors file"):
        find_lora_file(pickle)
