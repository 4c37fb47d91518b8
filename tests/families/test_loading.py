"""Models are found by what users call them, or refused with the next thing to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastppt import config_io
from fastppt.config import ModelConfig, RunConfig
from fastppt.errors import UserError
from fastppt.families.loading import (
    check_model,
    detect_family,
    load_family,
    resolve_device,
    resolve_dtype,
    resolve_path,
)
from fastppt.families.names import MINI_MODELS
from fastppt.mini import build_mini
from fastppt.outputs import generate
from fastppt.training import loop

FAMILIES = {family: mini for mini, family in MINI_MODELS.items()}
# `Export` is defined beside its fixture.
Exports = Callable[[str], Any]
Refusal = Callable[..., str]


def weights(pipeline: Any) -> dict[str, Tensor]:
    """All tensors of all networks of a pipeline, by component and name."""
    parts = pipeline.components.items()
    return {
        f"{name}/{key}": tensor
        for name, part in parts
        if isinstance(part, torch.nn.Module)
        for key, tensor in part.state_dict().items()
    }


def on_cpu(path: Path | str, **keys: object) -> ModelConfig:
    return ModelConfig(path=str(path), device="cpu", **keys)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["folder", "single file"])
def test_weights_are_those_of_the_model_bit_for_bit(
    exports: Exports, family: str, form: str
) -> None:
    export = exports(family)
    model = on_cpu(export.folder)
    if form == "single file":
        model = on_cpu(export.file, config_folder=export.folder)
    loaded = load_family(model)
    assert loaded.name == family
    found, wanted = weights(loaded._pipeline), weights(export.pipeline)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    ours, theirs = loaded._pipeline.scheduler, export.pipeline.scheduler
    assert type(ours) is type(theirs)
    settings = {key: value for key, value in ours.config.items() if not key.startswith("_")}
    assert settings == {k: v for k, v in theirs.config.items() if not k.startswith("_")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_reads_prompts_as_its_folder_does(exports: Exports, family: str) -> None:
    export = exports(family)
    prompts = ["a photo of sks dog", "a sketch of a boat in the snow"]
    folder = load_family(on_cpu(export.folder)).encode_prompts(prompts)
    file = load_family(on_cpu(export.file, config_folder=export.folder)).encode_prompts(prompts)
    assert torch.equal(folder.tokens, file.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_leaves_the_vae_in_float32(exports: Exports, family: str) -> None:
    export = exports(family)
    for model in (
        on_cpu(export.folder, precision="bf16"),
        on_cpu(export.file, config_folder=export.folder, precision="bf16"),
    ):
        found, wanted = weights(load_family(model)._pipeline), weights(export.pipeline)
        for name, tensor in found.items():
            if name.startswith("vae/"):
                # Not rounded on the way either.
                assert torch.equal(tensor, wanted[name]), name
        network = "transformer/" if family == "sd3" else "unet/"
        dtypes = {tensor.dtype for name, tensor in found.items() if name.startswith(network)}
        assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("form", ["mini", "folder", "single file", "with a VAE"])
def test_half_precision_is_loaded_without_warnings(
    exports: Exports, tmp_path: Path, diffusers_log: pytest.LogCaptureFixture, form: str
) -> None:
    export = exports("sd3")
    vae = tmp_path / "vae.safetensors"
    save_file(export.pipeline.vae.state_dict(), vae)
    model = {
        "mini": on_cpu("mini-sd3", precision="bf16"),
        "folder": on_cpu(export.folder, precision="bf16"),
        "single file": on_cpu(export.file, config_folder=export.folder, precision="bf16"),
        "with a VAE": on_cpu(export.folder, vae=str(vae), precision="bf16"),
    }[form]
    load_family(model)
    assert diffusers_log.text == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_told_without_loading(exports: Exports, family: str) -> None:
    export = exports(family)
    assert detect_family(on_cpu(FAMILIES[family])) == family
    assert detect_family(on_cpu(export.folder)) == family
    assert detect_family(on_cpu(export.file, config_folder=export.folder)) == family


def test_a_folder_may_hold_what_training_does_not_use(copied: Path) -> None:
    # As the hub's SD 1.5 names a safety checker: neither its code nor its 1.2 GB are needed.
    index = {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    edit_json(copied / "model_index.json", **index)
    pipeline = load_family(on_cpu(copied))._pipeline
    assert pipeline.image_encoder is None


def test_the_safety_checker_is_not_loaded(
    exports: Exports, tmp_path: Path, diffusers_log: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(exports("sd").folder, tmp_path / "model")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index = {"safety_checker": checker, "requires_safety_checker": True}
    edit_json(folder / "model_index.json", **index)
    assert load_family(on_cpu(folder))._pipeline.safety_checker is None
    assert "safety checker" not in diffusers_log.text


# ---- hub


@pytest.fixture
def hub(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache that holds the SDXL folder as owner/model; returns the snapshot's folder."""
    commit = "0" * 40
    repository = tmp_path / "models--owner--model"
    snapshot = shutil.copytree(exports("sdxl").folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v2").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return snapshot


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_cached_hub_id_loads_without_the_hub(hub: Path, revision: str | None) -> None:
    model = on_cpu("owner/model", revision=revision)
    assert detect_family(model) == "sdxl"
    found = weights(load_family(model)._pipeline)
    assert torch.equal(found["unet/conv_in.weight"], build_mini("mini-sdxl").unet.conv_in.weight)


def test_a_hub_id_that_is_not_there_is_refused_with_the_reason(hub: Path, refusal: Refusal) -> None:
    for path, revision in (("owner/other", None), ("owner/model", "v3")):
        message = refusal(path, revision=revision)
        assert message.startswith(f"model {path}: cannot be loaded")
        assert message.endswith("is its name right, and is the hub within reach?")


def test_a_damaged_hub_model_is_refused_like_a_folder(hub: Path, refusal: Refusal) -> None:
    (hub / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    assert "diffusion_pytorch_model.safetensors: is truncated" in refusal("owner/model")


# ---- what goes with what


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ("mini-sdxl", "revision", "main"),
        ("mini-sdxl", "variant", "fp16"),
        ("mini-sdxl", "config_folder", "FOLDER"),
        ("FOLDER", "revision", "main"),
        ("FOLDER", "config_folder", "FOLDER"),
        ("FILE", "revision", "main"),
        ("FILE", "variant", "fp16"),
        ("owner/model", "config_folder", "FOLDER"),
    ],
)
def test_a_key_that_does_not_go_with_the_model_is_refused(
    exports: Exports, path: str, key: str, value: str
) -> None:
    export = exports("sdxl")
    places = {"FOLDER": str(export.folder), "FILE": str(export.file)}
    model = ModelConfig(path=places.get(path, path), **{key: places.get(value, value)})
    with pytest.raises(UserError, match=rf"model\.{key}: goes with a .*; leave it out"):
        check_model(model)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(("key", "value"), [("large_text_encoder", False), ("max_tokens", 77)])
def test_a_choice_that_a_family_does_not_leave_is_refused(
    family: str, key: str, value: object, refusal: Refusal
) -> None:
    message = refusal(FAMILIES[family], **{key: value})
    assert f"model.{key}: is for sd3, and model {FAMILIES[family]} is {family}" in message


@pytest.mark.parametrize("form", ["mini", "folder", "single file"])
def test_the_large_text_encoder_is_not_even_read(
    exports: Exports, tmp_path: Path, form: str
) -> None:
    export = exports("sd3")
    folder = shutil.copytree(export.folder, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    state = {k: v for k, v in load_file(export.file).items() if "t5xxl" not in k}
    save_file(state, tmp_path / "no_t5.safetensors")
    choice = {"large_text_encoder": False}
    model = {
        "mini": on_cpu("mini-sd3", **choice),
        "folder": on_cpu(folder, **choice),
        "single file": on_cpu(tmp_path / "no_t5.safetensors", config_folder=folder, **choice),
    }[form]
    family = load_family(model)
    assert family._pipeline.text_encoder_3 is None and family._pipeline.tokenizer_3 is None
    assert family.encode_prompts(["a dog"]).tokens.isfinite().all()


def test_a_model_saved_without_its_large_text_encoder_does_without(
    exports: Exports, tmp_path: Path
) -> None:
    pipeline = build_mini("mini-sd3")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "model")
    assert load_family(on_cpu(tmp_path / "model"))._pipeline.text_encoder_3 is None


def test_a_checkpoint_without_t5_says_how_to_do_without(
    exports: Exports, tmp_path: Path, refusal: Refusal
) -> None:
    export = exports("sd3")
    state = {k: v for k, v in load_file(export.file).items() if "t5xxl" not in k}
    save_file(state, tmp_path / "no_t5.safetensors")
    message = refusal(tmp_path / "no_t5.safetensors", config_folder=export.folder)
    assert "holds no T5" in message and "--set model.large_text_encoder=false" in message


def test_a_configuration_of_another_family_is_refused(exports: Exports) -> None:
    model = on_cpu(exports("sd").file, config_folder=exports("sdxl").folder)
    with pytest.raises(UserError, match=r"model\.config_folder .*: is of sdxl, .* is sd;"):
        detect_family(model)


def test_a_configuration_folder_that_lacks_a_file_is_named(
    exports: Exports, copied: Path, refusal: Refusal
) -> None:
    (copied / "tokenizer_2" / "tokenizer_config.json").unlink()
    message = refusal(exports("sdxl").file, config_folder=copied)
    assert f"model {copied}: has no tokenizer_2/tokenizer_config.json" in message


def test_a_checkpoint_without_its_configuration_and_without_a_hub_says_what_to_pass(
    exports: Exports, refusal: Refusal
) -> None:
    assert "pass --model-config" in refusal(exports("sdxl").file)


# ---- variants


def rename_weights(folder: Path, variant: str) -> None:
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


def test_a_variant_is_loaded_by_name(copied: Path) -> None:
    plain = copied / "unet" / "diffusion_pytorch_model.safetensors"
    half = {key: (0.5 * tensor).half() for key, tensor in load_file(plain).items()}
    save_file(half, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = weights(load_family(on_cpu(copied, variant="fp16"))._pipeline)["unet/conv_in.weight"]
    assert torch.equal(found, half["conv_in.weight"].float())
    plain_weights = weights(load_family(on_cpu(copied))._pipeline)["unet/conv_in.weight"]
    assert not torch.equal(found, plain_weights)


def test_a_missing_variant_is_refused_and_those_there_are_named(
    copied: Path, refusal: Refusal
) -> None:
    message = refusal(copied, variant="fp16")
    assert "has no weights of the variant fp16 (it has: the plain ones alone)" in message
    rename_weights(copied, "bf16")
    message = refusal(copied, variant="fp16")
    assert "has no weights of the variant fp16 (it has: bf16)" in message


def test_a_folder_of_a_variant_alone_says_which_to_pass(copied: Path, refusal: Refusal) -> None:
    rename_weights(copied, "fp16")
    assert "pass --variant fp16" in refusal(copied)
    load_family(on_cpu(copied, variant="fp16"))


def test_base_weights_are_frozen_and_of_the_asked_precision() -> None:
    family = load_family(ModelConfig(path="mini-sdxl", device="cpu", precision="bf16"))
    assert {parameter.dtype for parameter in family.network.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in family.network.parameters())
    mean, std = family.encode_photos(torch.zeros(1, 3, 64, 64))
    assert mean.dtype == std.dtype == torch.float32


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="is a pickle"):
        check_model(ModelConfig(path=str(path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no model_index.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "cannot be read as JSON"),
        (json.dumps({"_class_name": "FluxPipeline"}), "is a FluxPipeline"),
    ],
)
def test_folder_of_something_else_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        check_model(ModelConfig(path=str(tmp_path)))


def test_what_is_neither_folder_nor_hub_id_is_refused() -> None:
    with pytest.raises(UserError, match="no file, no folder, no hub id"):
        check_model(ModelConfig(path="mini-sdx"))


def test_hub_id_passes_the_door() -> None:
    check_model(ModelConfig(path="stabilityai/stable-diffusion-xl-base-1.0"))


def test_precision_follows_the_device() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("fp32", torch.device("cuda")) == torch.float32


def test_missing_gpu_is_named() -> None:
    with pytest.raises(UserError, match="torch sees"):
        resolve_device("cuda:99")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"give a \.safetensors checkpoint"):
        check_model(ModelConfig(path=str(tmp_path / "model.gguf")))


def test_a_checkpoint_that_is_not_there_is_no_hub_id() -> None:
    with pytest.raises(UserError, match="there is no such file"):
        check_model(ModelConfig(path="models/sdxl.safetensors"))


# ---- runs


def test_a_recipe_for_other_families_is_refused_before_anything_is_loaded(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_sdxl(name: str, *model: str | None) -> object:
        recipe, table = load_recipe(name, *model)
        return recipe.model_copy(update={"families": ["sd3"]}), table

    load_recipe = config_io.load_recipe
    config = make_config()
    monkeypatch.setattr(config_io, "load_recipe", without_sdxl)
    monkeypatch.setattr(loop, "load_family", lambda model: pytest.fail("was loaded"))
    with pytest.raises(UserError, match="recipe ppt-lora: is for sd3; mini-sdxl is sdxl"):
        loop.train(config, Console(quiet=True))


def test_a_run_names_its_model_so_that_it_is_found_from_elsewhere(
    exports: Exports,
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export = exports("sdxl")
    monkeypatch.chdir(export.file.parent)
    config = make_config(
        model__path=export.file.name, model__config_folder="folder", model__vae="folder/vae"
    )
    result = loop.train(config, Console(quiet=True))
    monkeypatch.chdir("/")
    written = generate.run_config_of(tmp_path / "out")
    assert written is not None and written.model == result.config.model
    assert written.model.path == str(export.file)
    assert written.model.config_folder == export.folder
    assert written.model.vae == str(export.folder / "vae")
    assert detect_family(written.model) == "sdxl"
    (path,) = generate.generate(
        tmp_path / "out",
        "a dog",
        count=1,
        seed=None,
        steps=1,
        guidance_scale=None,
        resolution=None,
        output=None,
        model={"device": "cpu"},
    )
    assert path.is_file()


def test_pictures_are_drawn_with_the_run_s_model_or_with_another(
    make_config: Callable[..., RunConfig],
) -> None:
    keys = {"variant": "fp16", "revision": "v2", "vae": "a/vae", "max_tokens": 99}
    config = make_config(**{f"model__{key}": value for key, value in keys.items()})
    same = generate._model_config(config, {"device": "cpu"})
    assert same == ModelConfig(path="mini-sdxl", device="cpu", **keys)
    other = generate._model_config(config, {"path": "a/b", "device": None})
    assert other == ModelConfig(path="a/b", max_tokens=99)


def test_names_that_are_no_places_stay_as_they_are(tmp_path: Path) -> None:
    assert resolve_path("mini-sdxl") == "mini-sdxl"
    assert resolve_path("owner/model") == "owner/model"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_path(str(tmp_path / "model.safetensors")) == str(tmp_path / "model.safetensors")
