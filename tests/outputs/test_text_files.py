"""A run that trains text too: stock diffusers reads all of its files, and draws what we draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.config import ModelConfig, RunConfig
from fastppt.config_io import render_toml
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.mini import build_mini
from fastppt.outputs.adapters import Adapter
from fastppt.outputs.convert import convert
from fastppt.outputs.generate import generate, install_lora
from fastppt.outputs.lora_files import (
    DIFFUSERS_FILE,
    read_lora_file,
    write_diffusers_files,
)
from fastppt.outputs.lora_forms import read_lora, write_lora
from fastppt.outputs.model_card import model_card
from fastppt.outputs.results import files_of_run
from fastppt.trainables.trainables import Trainables
from fastppt.training.build import build_trainables
from tests.outputs.lora_cases import FAMILIES, ONE_FAST, peft_changes
from tests.outputs.test_lora_files import load_into
from tests.outputs.text_cases import TEXT_ALPHA, TEXT_RANK, WORD, text_settings, write_text_run

MakeConfig = Callable[..., RunConfig]
PROMPT = f"a photo of {WORD} in the snow"
# Of diffusers' pipelines: steps, guidance.
DEFAULTS = {"sd": (50, 7.5), "sdxl": (50, 5.0), "sd3": (28, 7.0)}


def draw(family: Family, prompt: str, steps: int, guidance_scale: float) -> np.ndarray:
    (image,) = family.sample(
        family.encode_prompts([prompt]),
        family.encode_negative(),
        seeds=[3],
        resolution=64,
        steps=steps,
        guidance_scale=guidance_scale,
    )
    return np.asarray(image, dtype=np.int16)


def share_that_differs(one: Any, other: Any) -> float:
    difference = np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)
    return float((np.abs(difference) > 2).mean())


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("place", [0, 1])
def test_stock_diffusers_loads_text_encoders_at_their_strength(
    make_config: MakeConfig,
    tmp_path: Path,
    name: str,
    place: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files, family, trainables, _ = write_text_run(tmp_path, make_config, name)
    stock = build_mini(f"mini-{name}")
    assert load_into(stock, tmp_path, files[place].name, caplog) == []
    found = {}
    for component in family.text.clips:
        for path, change in peft_changes(stock.components[component]).items():
            found[f"{component}.text_model.{path.removeprefix('text_model.')}"] = change
    assert trainables.text_encoder_lora is not None
    assert found.keys() == {pair.name for pair in trainables.text_encoder_lora.pairs}
    for pair in trainables.text_encoder_lora.pairs:
        wanted = pair.scale * (pair.up.double() @ pair.down.double())
        torch.testing.assert_close(found[pair.name], wanted, rtol=1e-5, atol=1e-6)
    changes = peft_changes(stock.components[family.lora_component])
    for pair in trainables.lora.pairs:
        wanted = pair.scale * (pair.up.double() @ pair.down.double())
        torch.testing.assert_close(changes[pair.name], wanted, rtol=1e-5, atol=1e-6)


def loaded_by_card(card: str) -> tuple[dict[str, Any], str]:
    """Run the card's code but for its last line; returns its names, and that line."""
    setup, line = code_of(card).rsplit("image = ", 1)
    names: dict[str, Any] = {}
    exec(setup, names)
    names["pipe"].set_progress_bar_config(disable=True)
    return names, f"image = {line}"


@pytest.mark.parametrize("vectors", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_code_of_the_card_gives_each_vector_its_place(
    make_config: MakeConfig,
    tmp_path: Path,
    name: str,
    vectors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, family, trainables, config = write_text_run(tmp_path, make_config, name, vectors)
    monkeypatch.chdir(tmp_path)
    names, _ = loaded_by_card(model_card(config, family, trainables, 5, 1.0))
    assert trainables.tokens is not None
    parts = names["pipe"].components
    for component, rows in trainables.tokens.rows.items():
        tokenizer = parts[component.replace("text_encoder", "tokenizer")]
        ids = tokenizer.convert_tokens_to_ids(list(trainables.tokens.words))
        table = parts[component].get_input_embeddings().weight
        assert len(set(ids)) == vectors and torch.equal(table.detach()[ids], rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_code_of_the_card_draws_what_was_trained(
    make_config: MakeConfig, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, family, trainables, config = write_text_run(tmp_path, make_config, name)
    monkeypatch.chdir(tmp_path)
    names, line = loaded_by_card(model_card(config, family, trainables, 5, 1.0))
    torch.manual_seed(3)
    exec(line, names)
    prompt = f"a photo of {WORD}"
    assert share_that_differs(draw(family, prompt, *DEFAULTS[name]), names["image"]) <= 0.001
    # Each of the three matters.
    ours = draw(family, prompt, 3, 4.0)
    for part in (trainables.lora.switch.base(), family.text.base()):
        with part:
            assert share_that_differs(draw(family, prompt, 3, 4.0), ours) > 0.05
    assert trainables.tokens is not None
    trainables.tokens.load({name: rows.roll(1, 1) for name, rows in trainables.tokens.rows.items()})
    assert share_that_differs(draw(family, prompt, 3, 4.0), ours) > 0.05


def drawn_by_generate(lora: Path, prompt: str = PROMPT, **options: Any) -> np.ndarray:
    (path,) = generate(
        lora,
        prompt,
        count=1,
        seed=3,
        steps=3,
        guidance_scale=4.0,
        resolution=64,
        output=lora.parent / "pictures" if lora.is_file() else lora / "pictures",
        **{"model": {"path": None, "device": "cpu"}, **options},
    )
    return np.asarray(Image.open(path), dtype=np.int16)


@pytest.mark.parametrize("name", ONE_FAST)
def test_generate_uses_every_file_of_the_run(
    make_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    files, family, _, config = write_text_run(tmp_path, make_config, name)
    (tmp_path / "config.toml").write_text(render_toml(config))
    ours = draw(family, PROMPT, 3, 4.0)
    assert share_that_differs(drawn_by_generate(tmp_path), ours) <= 0.001
    checkpoint = tmp_path / "checkpoints" / "step-000006"
    assert [file.name for file in files] == files_of_run(config)
    for file in (files[0], files[2]):
        checkpoint.mkdir(parents=True, exist_ok=True)
        file.rename(checkpoint / file.name)
    assert share_that_differs(drawn_by_generate(checkpoint), ours) <= 0.001
    # Without one of the three, the picture is another.
    whole = read_lora(checkpoint / DIFFUSERS_FILE)
    for without_text in (True, False):
        kept = {
            layer: one
            if layer[0].startswith("text") != without_text
            else Adapter(one.down, one.up * 0, one.alpha)
            for layer, one in whole.adapters.items()
        }
        write_lora(
            checkpoint / DIFFUSERS_FILE,
            type(whole)(kept, whole.metadata, "diffusers", whole.detection),
            "diffusers",
        )
        assert share_that_differs(drawn_by_generate(checkpoint), ours) > 0.05


def test_lone_lora_asks_for_its_word_where_the_prompt_says_it(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, family, _, _ = write_text_run(tmp_path / "run", make_config, "sdxl")
    model = {"path": "mini-sdxl", "device": "cpu"}
    for file in files[:2]:
        alone = tmp_path / "alone" / file.name
        alone.parent.mkdir(exist_ok=True)
        file.rename(alone)
        with pytest.raises(UserError, match=r"learned word <v>.* pass --embedding FILE") as error:
            drawn_by_generate(alone, model=model)
        assert str(alone.parent / "v.safetensors") in str(error.value)
    # Nothing of the word is needed where it is not said.
    drawn_by_generate(alone, "a photo of a robot", model=model)
    picture = drawn_by_generate(alone, model=model, embedding=files[2])
    assert share_that_differs(picture, draw(family, PROMPT, 3, 4.0)) <= 0.001
    assert caplog.text == ""
    command = ["generate", "--lora", str(alone), "--prompt", PROMPT, "--model", "mini-sdxl"]
    command += ["--steps", "2", "--device", "cpu", "--output", str(tmp_path / "drawn")]
    assert CliRunner().invoke(app, command).exit_code == 2
    result = CliRunner().invoke(app, [*command, "--embedding", str(files[2])])
    assert result.exit_code == 0 and len(list((tmp_path / "drawn").iterdir())) == 1
    drawn_by_generate(alone, "a photo of a robot", model=model, embedding=files[2])
    assert "does not say its word <v>" in caplog.text


@pytest.mark.parametrize("name", FAMILIES)
def test_every_form_keeps_text_encoders_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    files, *_ = write_text_run(tmp_path, make_config, name)
    forms = ["diffusers", "peft"] if name == "sd3" else ["kohya", "diffusers", "peft"]
    source = read_lora(files[1])
    assert any(component.startswith("text_encoder") for component, _ in source.adapters)
    for form in forms:
        target = tmp_path / ("peft" if form == "peft" else f"{form}.safetensors")
        other = read_lora(convert(files[1], form, target, None))
        assert other.adapters.keys() == source.adapters.keys()
        for layer, one in source.adapters.items():
            assert torch.equal(one.down, other.adapters[layer].down)
            assert torch.equal(one.up, other.adapters[layer].up)
            assert one.alpha == other.adapters[layer].alpha


@pytest.mark.parametrize("save_dtype", ["fp32", "bf16", "fp16"])
def test_all_files_are_of_the_save_dtype(
    make_config: MakeConfig, tmp_path: Path, save_dtype: str
) -> None:
    files, _, trainables, _ = write_text_run(tmp_path, make_config, "sdxl", save_dtype=save_dtype)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[save_dtype]
    for file in files:
        tensors = load_file(file)
        assert {t.dtype for key, t in tensors.items() if not key.endswith(".alpha")} == {dtype}
    assert trainables.tokens is not None
    saved = load_file(files[2])
    for component, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        assert torch.equal(saved[key], trainables.tokens.rows[component].to(dtype))


def test_metadata_says_how_text_was_trained(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = {"stage.0.trainables.text_encoder_lora.learning_rate": 5e-6}
    files, *_ = write_text_run(tmp_path, make_config, "sdxl", **settings)
    with safe_open(files[1], "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_unet_lr"] == "0.001" and metadata["ss_text_encoder_lr"] == "5e-06"
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "6"
    assert metadata["modelspec.trigger_phrase"] == metadata["fastppt.word"] == WORD
    told = CliRunner().invoke(app, ["info", str(files[1])]).output
    assert "learned word" in told and "text_encoder_2 (" in told
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "fastppt.family": "sdxl",
            "fastppt.word": WORD,
        }


def test_init_lora_with_text_encoders_needs_a_place_for_them(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    files, _, trainables, _ = write_text_run(tmp_path, make_config, "sdxl")
    family = load_family(ModelConfig(path="mini-sdxl", device="cpu"))
    with pytest.raises(UserError, match=r"text_encoder_lora\.rank=2 to train both"):
        read_lora_file(files[0], family, text=False)
    loaded = install_lora(family, read_lora_file(files[1], family))
    assert loaded.text_encoder_lora is not None and trainables.text_encoder_lora is not None
    assert loaded.text_encoder_lora.rank == TEXT_RANK
    for ours, theirs in zip(
        trainables.text_encoder_lora.pairs, loaded.text_encoder_lora.pairs, strict=True
    ):
        assert ours.name == theirs.name and torch.equal(ours.down, theirs.down)
        torch.testing.assert_close(ours.scale * ours.up, theirs.scale * theirs.up)
    assert TEXT_ALPHA != TEXT_RANK


@pytest.mark.parametrize("word", [WORD, "<w>", None])
def test_init_lora_says_which_learned_word_is_left_out(
    make_config: MakeConfig, tmp_path: Path, word: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    files, *_ = write_text_run(tmp_path, make_config, "sd")
    settings = text_settings("sd") | {"stage.0.trainables.lora.init": str(files[0])}
    if word is None:
        del settings["stage.0.trainables.tokens.vectors"]
    config = make_config(**settings | {"prompts.token": word or WORD})
    build_trainables(config, load_family(config.model))
    told = f"{files[0]}: goes with the learned word <v>, which this run does not train"
    assert (told in caplog.text) == (word != WORD)


def test_layer_of_a_text_encoder_that_has_no_place_is_named(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    files, family, _, _ = write_text_run(tmp_path, make_config, "sdxl")
    lora = read_lora(files[0])
    one = Adapter(torch.ones(2, 4), torch.ones(4, 2), 2.0)
    lora.adapters["text_encoder", "text_model.encoder.layers.0.mlp.fc1"] = one
    write_lora(files[0], lora, "diffusers")
    with pytest.raises(UserError, match=r"mlp\.fc1; of a text encoder fastppt adapts .*out_proj"):
        read_lora_file(files[0], family)


def test_checkpoint_files_are_the_diffusers_lora_and_the_word(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    files, family, trainables, config = write_text_run(tmp_path / "run", make_config, "sd")
    written = write_diffusers_files(tmp_path / "step", config, family, trainables)
    assert [file.name for file in written] == [DIFFUSERS_FILE, "v.safetensors"]
    assert written[0].read_bytes() == files[0].read_bytes()
    plain = make_config(model__path="mini-sd", photos__resolution=64)
    alone = write_diffusers_files(
        tmp_path / "b", plain, family, Trainables({"lora": trainables.lora})
    )
    assert [file.name for file in alone] == [DIFFUSERS_FILE]


@pytest.mark.parametrize("name", FAMILIES)
def test_card_says_where_files_go_and_what_prompts_say(
    make_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    _, family, trainables, config = write_text_run(tmp_path, make_config, name)
    card = model_card(config, family, trainables, 5, 1.0)
    assert "| program | `my robot.safetensors` | `v.safetensors` | prompt |" in card
    assert "`models/embeddings/` | `a photo of embedding:v` |" in card
    automatic = "| `models/Lora/` | `embeddings/` | `a photo of v <lora:my robot:1>` |"
    assert (automatic in card) == (name != "sd3")
    assert "| rank, alpha of the text encoders | 2, 3 |" in card
    assert "| learned word | `<v>`: 2 vectors, from `robot` |" in card
    assert f"| trained parameters | {trainables.num_parameters:,} |" in card
