"""What is not trusted stays where it belongs; SECURITY.md says what that is."""

from __future__ import annotations

import ast
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastppt.config import ModelConfig, PromptsConfig
from fastppt.config_io import build_config
from fastppt.data.prompts import class_prompt, subject_prompt
from fastppt.errors import UserError
from fastppt.families.checkpoints import MOST_TENSORS
from fastppt.families.loading import load_family
from fastppt.mini import build_mini
from fastppt.outputs.convert import convert
from fastppt.outputs.embeddings import embedding_name
from fastppt.outputs.files import write_file
from fastppt.outputs.generate import _stem as picture_stem
from fastppt.outputs.info import read_info
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.outputs.lora_forms import read_lora
from tests.child import in_child

ROOT = Path(__file__).parents[1]
LAYER = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
# Modules that read pickles or run what they are given, and calls that do.
MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "zipfile", "tarfile"}
CALLS = {"eval", "exec", "compile", "system", "popen", "unpack_archive"}
KEYWORDS = {"shell", "trust_remote_code", "allow_pickle", "weights_only"}


def wrongs(source: str) -> list[str]:
    """What a source does that can run what is in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [each.name for each in names if each.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                found.append(module)
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                found.append(name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)) if (
                name in CALLS - {"compile", "eval"}
                or (owner, name) in {("torch", "load"), ("np", "load")}
            ):
                found.append(f"{owner}.{name}")
            case ast.keyword(arg=str(name)) if name in KEYWORDS:
                found.append(name)
    return found


def test_nothing_reads_pickles_unpacks_archives_or_runs_text() -> None:
    for folder in ("fastppt", "kernels/fastppt_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            assert wrongs(path.read_text()) == [], path
    assert wrongs("import pickle\nx = torch.load(f)\nrun(a, shell=True)") == [
        *("pickle", "torch.load", "shell"),
    ]


@pytest.mark.parametrize(
    "word",
    ["../../x", "/etc/passwd", "..", "", "\0", "<v>\n", "a" * 400, "\U00020000" * 60],
    ids=ascii,
)
def test_prompts_and_words_stay_in_the_folder_as_names_of_files(word: str, tmp_path: Path) -> None:
    for name in (f"{picture_stem(word)}-0.png", embedding_name(word[:50])):
        path = tmp_path / name
        assert path.parent == tmp_path and name not in {".", ".."}
        write_file(path, "x")
        assert path in list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x", "/x", "..", "a/b", ".hidden", "a\0b", "a\nb"])
def test_names_of_lora_files_are_no_paths(name: str) -> None:
    with pytest.raises(UserError, match="name"):
        build_config(settings=[("name", name)])


def test_keys_and_metadata_of_a_lora_do_not_say_where_it_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    for layer in (LAYER, "unet.../../../up_blocks.0./etc/x"):
        metadata = {"ss_output_name": "../../x", "modelspec.title": "/tmp/x", "format": "../x"}
        tensors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        save_file(tensors, folder / "a.safetensors", metadata=metadata)
        convert(folder / "a.safetensors", "peft", None, None)
        written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
        assert written == {
            *("in", "in/a.safetensors", "in/a-peft", "in/a-peft/unet"),
            *("in/a-peft/unet/adapter_config.json", "in/a-peft/unet/adapter_model.safetensors"),
        }
        shutil.rmtree(folder / "a-peft")
    # A folder of peft's for a part of no model.
    other = folder / "../.." / folder.name
    with pytest.raises(UserError):
        read_lora(other)


def test_patterns_that_would_take_for_ever_are_refused(tmp_path: Path) -> None:
    tensors = {
        f"{LAYER}.lora_A.weight": torch.ones(2, 4),
        f"{LAYER}.lora_B.weight": torch.ones(4, 2),
    }
    for pattern in ("(.*)*x", "(a|a)*b", ".*.*.*.*.*.*x"):
        entry = {"unet.lora_alpha": 4, "unet.alpha_pattern": {pattern: 1}}
        metadata = {"lora_adapter_metadata": json.dumps(entry)}
        save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
        with pytest.raises(UserError, match="is a regular expression"):
            read_info(tmp_path / "a.safetensors")


@pytest.mark.parametrize("pattern", ["to_q", "^" + LAYER[5:], LAYER[5:].replace(".", "\\."), "q"])
def test_patterns_that_are_names_mean_what_they_mean_to_peft(pattern: str, tmp_path: Path) -> None:
    from peft.utils.other import get_pattern_key

    tensors = {
        f"{LAYER}.lora_A.weight": torch.ones(2, 4),
        f"{LAYER}.lora_B.weight": torch.ones(4, 2),
    }
    patterns = {"other": 9.0, pattern: 1.5, "attn1.to_q": 2.5}
    entry = {"unet.lora_alpha": 4, "unet.alpha_pattern": patterns}
    save_file(
        tensors,
        tmp_path / "a.safetensors",
        metadata={"lora_adapter_metadata": json.dumps(entry)},
    )
    (adapter,) = read_lora(tmp_path / "a.safetensors").adapters.values()
    path = LAYER.removeprefix("unet.")
    assert adapter.alpha == patterns[get_pattern_key(patterns, path)]


def test_files_of_too_many_tensors_are_refused(tmp_path: Path) -> None:
    nothing = torch.empty(0)
    save_file({str(n): nothing for n in range(MOST_TENSORS + 1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"holds {MOST_TENSORS + 1} tensors"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("shapes", "kind", "alpha", "message"),
    [
        (((0, 4), (4, 0)), torch.float32, None, "hold nothing"),
        (((2, 4), (4, 2)), torch.complex64, None, "no real numbers"),
        (((2, 4), (4, 2)), torch.float8_e8m0fnu, None, "no real numbers"),
        (((2, 4), (4, 2)), torch.float32, float("nan"), "no real number"),
        (((2, 4), (4, 2)), torch.float32, 1j, "no real number"),
    ],
)
def test_adapters_of_no_numbers_are_refused(
    tmp_path: Path,
    shapes: tuple[tuple[int, int], tuple[int, int]],
    kind: torch.dtype,
    alpha: complex | None,
    message: str,
) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.lora_down.weight": torch.zeros(shapes[0]).to(kind),
        f"{name}.lora_up.weight": torch.zeros(shapes[1]).to(kind),
    }
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        read_info(tmp_path / "a.safetensors")


def test_parts_of_other_libraries_are_refused_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_mini("mini-sd").save_pretrained(tmp_path / "model")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "model" / "unet" / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    for entry in (["evil", "Evil"], ["os", "system"], "unet", [1, 2], {}):
        index["unet"] = entry
        (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="says of unet"):
            load_family(ModelConfig(path=str(tmp_path / "model"), device="cpu"))


def test_the_text_of_a_prompt_is_not_a_format() -> None:
    prompts = PromptsConfig(class_noun="{0.__class__}", token="{token}", subject="{token} x")
    assert subject_prompt(prompts, "{subject} of {seed}") == "{token} x of {seed}"
    assert class_prompt(prompts, "{subject.text} {0}") == "{subject.text} {0}"
    assert class_prompt(prompts) == "a photo of a {0.__class__}"


ODD = "-my dog\nü'\"[red]"


def test_a_run_with_odd_names_everywhere_is_whole(photos: Path, tmp_path: Path) -> None:
    """Spaces, quotes, a line break, a dash at the front, letters beyond ASCII and beyond UTF-8."""
    folder, output = tmp_path / f"{ODD} photos", tmp_path / ODD
    folder.mkdir()
    names = [f"{ODD}.png", "u\u0308.png", "x" * 251 + ".png", os.fsdecode(b"\xe9.png")]
    for name, photo in zip(names, sorted(photos.iterdir())[: len(names)], strict=True):
        Image.open(photo).save(folder / name)
    (folder / "captions.toml").write_text('"ü.png" = "{subject} \\u001b[31m\\n"\n')
    config = tmp_path / f"{ODD}.toml"
    config.write_text('recipe = "lora"\n[samples]\nenabled = false\n')
    options = ["--model", "mini-sdxl", "--class-noun", "dog", "--device", "cpu", "--rank", "2"]
    places = [f"{config}", "--photos", f"{folder}", f"--output={output}"]
    code, said = in_child(["train", *places, *options, "--steps=2", "--checkpoint-every=1"])
    assert code == 0, said
    assert "\x1b" not in said
    run = build_config(file=output / "config.toml")
    assert run.output == output and run.photos.folder == folder
    tensors = load_file(output / DIFFUSERS_FILE)
    assert (output / f"{ODD}.safetensors").is_file()
    assert all(np.isfinite(tensor.numpy()).all() for tensor in tensors.values())
    code, said = in_child(["info", f"{output}"])
    assert code == 0 and "dog" in said, said


@pytest.mark.parametrize("place", ["file/out", "/proc/fastppt/out", "/sys/out", "x" * 300])
def test_outputs_that_cannot_be_are_refused(photos: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = ["train", "--model", "mini-sdxl", "--photos", f"{photos}", "--class-noun", "dog"]
    code, said = in_child([*arguments, "--device", "cpu", "--output", f"{tmp_path / place}"])
    assert code == 2 and "Traceback" not in said and said.startswith("error: "), said
    assert (tmp_path / "file").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
