"""Embedding files: what runs write, stock readers take; what others wrote is read or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.config import ModelConfig, RunConfig
from fastppt.errors import UserError
from fastppt.families.loading import load_family
from fastppt.outputs.embeddings import check_fits, embedding_name, read_embedding, write_embedding
from fastppt.outputs.files import STATE_FILE
from fastppt.outputs.folder import check_output
from fastppt.outputs.generate import install_word
from tests.outputs.lora_cases import FAMILIES
from tests.outputs.text_cases import WORD, text_settings, trained_text

MakeConfig = Callable[..., RunConfig]
STATE_STEM = STATE_FILE.removesuffix(".safetensors")
WIDTHS = {
    "sd": {"text_encoder": 64},
    "sdxl": {"text_encoder": 48, "text_encoder_2": 80},
    "sd3": {"text_encoder": 48, "text_encoder_2": 80},
}


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(**text_settings("sdxl"))


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "cat.safetensors") -> Path:
    path = folder / name
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_file_of_a_run_reads_back_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    family, trainables = trained_text(name)
    assert trainables.tokens is not None
    config = make_config(**text_settings(name))
    path = write_embedding(tmp_path, config, family, trainables.tokens.rows)
    assert path == tmp_path / "v.safetensors"
    keys = {WORD} if name == "sd" else {"clip_l", "clip_g"}
    assert load_file(path).keys() == keys
    embedding = read_embedding(path)
    check_fits(path, embedding, family)
    assert embedding.word == WORD and embedding.num_vectors == 2
    assert embedding.rows.keys() == trainables.tokens.rows.keys()
    for component, rows in trainables.tokens.rows.items():
        assert torch.equal(embedding.rows[component], rows)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["fastppt.word"] == metadata["modelspec.trigger_phrase"] == WORD
    assert metadata["fastppt.class_noun"] == "robot"
    assert metadata["fastppt.base_model"] == f"mini-{name}"
    assert metadata["modelspec.architecture"].endswith("/textual-inversion")


@pytest.mark.parametrize(
    ("word", "file"),
    [
        ("<v>", "v.safetensors"),
        ("<my-dog>", "my-dog.safetensors"),
        ("../../etc/x", "etcx.safetensors"),
        ("<*>", "embedding.safetensors"),
        ("<ünï>", "ünï.safetensors"),
    ],
)
def test_file_is_called_by_the_word(word: str, file: str) -> None:
    assert embedding_name(word) == file


@pytest.mark.parametrize(
    ("tensors", "word", "num_vectors"),
    [
        # diffusers' textual_inversion.py; its first version wrote one vector flat.
        ({"<cat-toy>": torch.ones(3, 64)}, "<cat-toy>", 3),
        ({"<cat-toy>": torch.ones(64)}, "<cat-toy>", 1),
        # sd-scripts.
        ({"emb_params": torch.ones(2, 64)}, "cat", 2),
        ({"clip_l": torch.ones(2, 48), "clip_g": torch.ones(2, 80)}, "cat", 2),
        ({"": torch.ones(2, 64)}, "cat", 2),
    ],
)
def test_files_of_others_are_read(
    tmp_path: Path, tensors: dict[str, Tensor], word: str, num_vectors: int
) -> None:
    embedding = read_embedding(saved(tmp_path, tensors))
    assert (embedding.word, embedding.num_vectors) == (word, num_vectors)
    widths = {name: rows.shape[1] for name, rows in embedding.rows.items()}
    assert widths in (WIDTHS["sd"], WIDTHS["sdxl"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(2, 4), "b": torch.ones(2, 4)}, "holds 2 tensors, the first of them"),
        ({"unet.x.lora_A.weight": torch.ones(2, 4)}, "holds 1 tensor, the first of them unet"),
        ({"a": torch.ones(2, 4, 4)}, r"a must be real numbers .* float32 \[2, 4, 4\]"),
        ({"a": torch.ones(())}, r"a must be real numbers"),
        ({"a": torch.ones(0, 4)}, r"a must be real numbers"),
        ({"a": torch.ones(2, 4, dtype=torch.int64)}, r"is int64 \[2, 4\]"),
        (
            {"clip_l": torch.ones(2, 64), "clip_g": torch.ones(3, 96)},
            "as many vectors for each text encoder",
        ),
        ({"clip_l": torch.ones(64), "clip_g": torch.ones(64)}, "must be real numbers"),
    ],
)
def test_what_is_no_embedding_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_embedding(saved(tmp_path, tensors))


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}"])
def test_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"embedding .*a\.safetensors: "):
        read_embedding(path)
    with pytest.raises(UserError, match=r"b\.safetensors: cannot be read"):
        read_embedding(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="can run code when read"):
        read_embedding(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("sdxl", {"<cat>": torch.ones(1, 48)}),
        ("sd3", {"clip_l": torch.ones(1, 48), "clip_g": torch.ones(1, 96)}),
        ("sd", {"clip_l": torch.ones(1, 64), "clip_g": torch.ones(1, 96)}),
    ],
)
def test_embedding_of_another_model_is_refused(
    tmp_path: Path, name: str, tensors: dict[str, Tensor]
) -> None:
    family = load_family(ModelConfig(path=f"mini-{name}", device="cpu"))
    with pytest.raises(UserError, match=rf"mini-{name} \({name}\) take .* another model"):
        install_word(family, saved(tmp_path, tensors), "a photo of cat")


def test_more_vectors_than_a_prompt_has_places_for_are_refused(tmp_path: Path) -> None:
    family = load_family(ModelConfig(path="mini-sd", device="cpu"))
    places = family.text.num_tokens - 2
    path = saved(tmp_path, {"<cat>": torch.ones(places + 1, 64)})
    with pytest.raises(UserError, match=rf"has {places + 1} vectors, .* places for {places}"):
        install_word(family, path, "a photo of <cat>")
    tokens = install_word(family, saved(tmp_path, {"<cat>": torch.ones(places, 64)}), "<cat>")
    assert len(tokens.words) == places


def test_word_that_the_model_knows_is_refused_with_its_file(tmp_path: Path) -> None:
    family = load_family(ModelConfig(path="mini-sd", device="cpu"))
    path = saved(tmp_path, {"emb_params": torch.ones(1, 64)})
    with pytest.raises(UserError, match=r"cat\.safetensors: its word 'cat' cannot be one"):
        install_word(family, path, "a photo of cat")


@pytest.mark.parametrize(
    ("name", "word"), [("v", WORD), ("w", "<pytorch_lora_weights>"), ("w", f"<{STATE_STEM}>")]
)
def test_word_needs_a_file_of_its_own(make_config: MakeConfig, name: str, word: str) -> None:
    settings = text_settings("sdxl")
    check_output(make_config(**settings), overwrite=False)
    config = make_config(**settings | {"name": name, "prompts.token": word})
    with pytest.raises(UserError, match=r"gives \w+\.safetensors.* pass another --token"):
        check_output(config, overwrite=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_info_says_what_an_embedding_is(make_config: MakeConfig, tmp_path: Path, name: str) -> None:
    family, trainables = trained_text(name)
    assert trainables.tokens is not None
    rows = dict(trainables.tokens.rows)
    rows["text_encoder"] = rows["text_encoder"].clone()
    rows["text_encoder"][0, 0] = torch.nan
    path = write_embedding(tmp_path, make_config(**text_settings(name)), family, rows)
    result = CliRunner().invoke(app, ["info", str(path)])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    texts = ["embedding of a learned word", WORD, "float32", "nan", "fastppt.class_noun", name]
    texts += [f"{width} ({component})" for component, width in WIDTHS[name].items()]
    for text in texts:
        assert text in words
    assert "warning: vectors for text_encoder hold NaN or infinity" in words


def test_info_tells_the_family_of_a_foreign_embedding_by_its_width(tmp_path: Path) -> None:
    for width, family in ((768, "sd (1.x)"), (1024, "sd (2.x)"), (64, "unknown")):
        path = saved(tmp_path, {"<cat>": torch.ones(1, width)})
        assert family in CliRunner().invoke(app, ["info", str(path)]).output
