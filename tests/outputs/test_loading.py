"""`fastppt.load`: a stock pipeline draws what the run's own network draws, whatever was trained."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

import fastppt
from fastppt.config import RunConfig
from fastppt.config_io import render_toml
from fastppt.doctor import run_settings
from fastppt.errors import UserError
from fastppt.mini import build_mini
from fastppt.mini.sd import build_mini_sd
from fastppt.outputs import results
from fastppt.outputs.card_code import card_code
from fastppt.outputs.embeddings import embedding_name
from fastppt.outputs.files import STATE_FILE
from fastppt.outputs.generate import generate
from fastppt.outputs.model_card import model_card
from fastppt.outputs.results import check_libraries, files_of_run, write_checkpoint_files
from fastppt.training import loop
from tests.outputs.network_cases import KINDS, WORD, Trained, draw_stock, share_that_differs

FAMILIES = ("sd", "sdxl", "sd3")
slow = pytest.mark.slow
# One fast test for each way in which files are made and read.
FAST = {"load": [("sd", "full")], "card": [("sd", "custom_diffusion")]}


def every(what: str) -> list[Any]:
    return [
        pytest.param(name, kind, marks=[] if (name, kind) in FAST[what] else slow)
        for name in FAMILIES
        for kind in (*KINDS, "lora", "tokens", "text_encoder_lora")
    ]


@pytest.mark.parametrize(("name", "kind"), every("load"))
def test_pipeline_draws_what_was_trained(
    tmp_path: Path, photos: Path, name: str, kind: str
) -> None:
    run = Trained(tmp_path / "out", photos, name, kind).write()
    stock = build_mini(f"mini-{name}")
    plain = draw_stock(build_mini(f"mini-{name}"), run) if kind != "tokens" else None
    assert fastppt.load(stock, tmp_path / "out") is stock
    ours = run.draw()
    assert share_that_differs(draw_stock(stock, run), ours) <= 0.001
    assert plain is None or share_that_differs(plain, ours) > 0.05


ALL_PARTS = [("text_encoder_lora", "tokens", "oft"), ("text_encoder_lora", "tokens", "full")]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kinds", [*ALL_PARTS, ("lora", "text_encoder_lora", "tokens")])
def test_every_part_of_a_run_is_loaded(
    tmp_path: Path, photos: Path, name: str, kinds: tuple[str, ...]
) -> None:
    vectors = {"stage.0.trainables.tokens.vectors": 2}
    run = Trained(tmp_path / "out", photos, name, *kinds, **vectors).write()
    stock = fastppt.load(build_mini(f"mini-{name}"), str(tmp_path / "out"))
    assert share_that_differs(draw_stock(stock, run), run.draw()) <= 0.001
    assert drawn_by_generate(run, tmp_path / "out") <= 0.001


def drawn_by_generate(run: Trained, folder: Path) -> float:
    (path,) = generate(
        None,
        run.prompt,
        run=folder,
        count=1,
        seed=3,
        steps=3,
        guidance_scale=4.0,
        resolution=64,
        output=None,
        model={"device": "cpu"},
    )
    # Not in a checkpoint: that is deleted when its time comes.
    in_checkpoint = folder.parent.name == "checkpoints"
    place = folder.parents[1] / "generated" / folder.name if in_checkpoint else folder / "generated"
    assert path.parent == place
    return share_that_differs(np.asarray(Image.open(path), dtype=np.int16), run.draw())


@pytest.mark.parametrize(("name", "kind"), every("card"))
def test_card_code_and_generate_draw_what_was_trained(
    tmp_path: Path, photos: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trained(tmp_path / "out", photos, name, kind).write()
    assert [file.name for file in run.files] == files_of_run(run.config)
    assert drawn_by_generate(run, run.folder) <= 0.001
    card = model_card(run.config, run.family, run.trainables, 5, 1.0)
    setup, line = card.split("```python\n")[1].split("```")[0].rsplit("image = ", 1)
    if kind == "boft":
        # Its loader is ours.
        assert "import fastppt\n" in setup
    monkeypatch.chdir(run.folder)
    names: dict[str, object] = {}
    exec(setup, names)
    assert share_that_differs(draw_stock(names["pipe"], run), run.draw()) <= 0.001
    assert line.startswith("pipe(")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd", "full"),
        *(pytest.param("sdxl", kind, marks=slow) for kind in (*KINDS, "lora")),
    ],
)
def test_checkpoint_is_loaded_like_a_finished_run(
    tmp_path: Path, photos: Path, name: str, kind: str
) -> None:
    run = Trained(tmp_path / "out", photos, name, kind, "tokens").write()
    step = run.folder / "checkpoints" / "step-000004"
    step.mkdir(parents=True)
    files = write_checkpoint_files(step, run.config, run.family, run.trainables)
    assert (step / embedding_name(WORD)) in files
    arena = run.trainables.parts[kind].arenas[""]
    # A run that keeps a moving average shows that.
    values = {f"{kind}/values": arena.flat.detach() * 0, f"{kind}/average": arena.flat.detach()}
    save_file(values, step / STATE_FILE)
    for file in run.files:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    stock = fastppt.load(build_mini(f"mini-{name}"), step)
    assert share_that_differs(draw_stock(stock, run), run.draw()) <= 0.001
    assert drawn_by_generate(run, step) <= 0.001
    if kind == "full":
        del values["full/average"]
        save_file(values, step / STATE_FILE)
        pipe = fastppt.load(build_mini(f"mini-{name}"), (tmp_path / "out/checkpoints/step-000004"))
        assert not any(parameter.any() for parameter in pipe.unet.parameters())


@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(each, marks=slow) for each in (*KINDS, "lora", "text_encoder_lora")), "tokens"],
)
def test_run_of_another_model_is_refused_and_both_are_named(
    tmp_path: Path, photos: Path, kind: str
) -> None:
    run = Trained(tmp_path / "out", photos, "sd", kind).write()
    other = build_mini("mini-sdxl")
    before = {key: tensor.clone() for key, tensor in other.unet.state_dict().items()}
    wanted = r"is of the family sd, and the pipeline, .*XLPipeline, of the family sdxl; .*mini-sd"
    with pytest.raises(UserError, match=wanted):
        fastppt.load(other, run.folder)
    assert all(torch.equal(other.unet.state_dict()[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param("full", r"\[.*\], and in this network", marks=slow),
        ("custom_diffusion", "is it the run's model"),
        pytest.param("svdiff", "other singular values than the weight", marks=slow),
        pytest.param("oft", "made for another", marks=slow),
        ("lora", r"of 64 to 32 values, .* of 99 to 32; is it the run's model"),
    ],
)
def test_network_of_another_shape_is_refused(
    tmp_path: Path, photos: Path, kind: str, said: str
) -> None:
    run = Trained(tmp_path / "out", photos, "sd", kind).write()
    other = build_mini("mini-sd")
    wide = torch.nn.Linear(99, 32, bias=False)
    other.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k = wide
    with pytest.raises(UserError, match=said) as error:
        fastppt.load(other, run.folder)
    assert str(run.folder) in str(error.value)


def test_word_of_another_width_and_a_second_load_are_refused(tmp_path: Path, photos: Path) -> None:
    run = Trained(tmp_path / "out", photos, "sd", "tokens").write()
    pipe = fastppt.load(build_mini_sd(version="2.1"), run.folder)
    with pytest.raises(UserError, match="word <v>: is in the text_encoder's tokenizer already"):
        fastppt.load(pipe, run.folder)
    file = run.folder / embedding_name(WORD)
    save_file({WORD: torch.ones(1, 7)}, file)
    with pytest.raises(UserError, match="has vectors of width 7, and the text_encoder takes 64"):
        fastppt.load(build_mini("mini-sd"), run.folder)


def test_what_is_no_finished_run_is_refused(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(UserError, match="is no folder of a run"):
        fastppt.load(build_mini("mini-sd"), tmp_path)
    run = Trained(tmp_path / "out", photos, "sd", "custom_diffusion").write()
    with pytest.raises(UserError, match=r"cannot be put into a object; fastppt knows Stable"):
        fastppt.load(object(), run.folder)
    run.files[0].unlink()
    with pytest.raises(UserError, match="is the run finished"):
        fastppt.load(build_mini("mini-sd"), run.folder)


def test_weights_that_are_kept_elsewhere_are_refused(tmp_path: Path, photos: Path) -> None:
    run = Trained(tmp_path / "out", photos, "sd", "custom_diffusion").write()
    pipe = build_mini("mini-sd")
    # As enable_sequential_cpu_offload leaves them: what is copied there is gone.
    pipe.unet.to("meta")
    with pytest.raises(UserError, match="before enable_sequential_cpu_offload"):
        fastppt.load(pipe, run.folder)


def test_without_peft_adapters_of_its_kind_are_refused_before_anything_is_loaded(
    make_config: Callable[..., RunConfig], photos: Path, tmp_path: Path
) -> None:
    run = Trained(tmp_path / "out", photos, "sd", "oft")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.toml").write_text(render_toml(run.config))
    pipe = build_mini("mini-sd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "find_spec", lambda name: None)
        check_libraries(make_config())
        new = run.config.model_copy(update={"output": tmp_path / "new"})
        for ask in (
            lambda: loop.train(new, Console(quiet=True)),
            lambda: fastppt.load(pipe, tmp_path / "out"),
        ):
            with pytest.raises(UserError, match=r"trainables.oft: .* by the library peft"):
                ask()
        (finding,) = [each for each in run_settings(new) if each.what == "results"]
        assert finding.level == "problem" and "pip install peft" in finding.text
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["svdiff", pytest.param("oft", marks=slow)])
def test_card_of_a_model_on_disk_rounds_weights_after_shifts_are_in_them(
    tmp_path: Path, photos: Path, kind: str
) -> None:
    run = Trained(tmp_path / "out", photos, "sd", kind)
    model = run.config.model.model_copy(update={"path": "/models/sd"})
    config = run.config.model_copy(update={"model": model})
    code = card_code(config, run.family, None, "a photo of a \U0001f916")
    lines = code.splitlines()
    if kind == "svdiff":
        start = lines.index('pipe.to("cuda")')
        assert lines[start + 1 : start + 3] == [
            'fastppt.load(pipe, ".")',
            "pipe.to(torch.bfloat16)",
        ]
    else:
        assert 'pipe.to("cuda", torch.bfloat16)' in lines
    # What Python reads in it is the prompt again.
    said = [each.value for each in ast.walk(ast.parse(code)) if isinstance(each, ast.Constant)]
    assert "a photo of a \U0001f916" in said


def test_pipeline_in_16_bits_keeps_its_type(tmp_path: Path, photos: Path) -> None:
    run = Trained(tmp_path / "out", photos, "sd", "custom_diffusion", "tokens").write()
    pipe = fastppt.load(build_mini("mini-sd").to(torch.bfloat16), run.folder)
    parts = (pipe.unet, pipe.text_encoder)
    assert {each.dtype for part in parts for each in part.parameters()} == {torch.bfloat16}
    name, value = next(iter(run.trainables.network.tensors.items()))
    assert torch.equal(pipe.unet.get_parameter(name), value.bfloat16())
