"""The commands write models whole, or say in one line why not."""

from __future__ import annotations

import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import Result
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastppt.families.names import MINI_MODELS as FAMILY_OF_MODEL
from fastppt.mini import MINI_MODELS, build_mini, sdxl
from fastppt.mini.__main__ import app
from fastppt.mini.single_file import original_state


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def networks(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, torch.nn.Module)}


def test_every_embedded_model_has_a_family() -> None:
    assert set(MINI_MODELS) == set(FAMILY_OF_MODEL)


@pytest.mark.parametrize("model", MINI_MODELS)
def test_export_writes_a_folder_that_diffusers_loads(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "some" / "mini"
    result = run("export", folder, "--model", model, "--seed", 2)
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == 1
    assert model in result.output
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".tmp")]
    loaded = networks(DiffusionPipeline.from_pretrained(folder, local_files_only=True))
    for name, network in networks(build_mini(model, 2)).items():
        state = loaded[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_export_without_a_model_or_seed_is_that_of_the_trained_mini_sdxl(tmp_path: Path) -> None:
    output = run("export", tmp_path / "mini").output
    assert output.startswith("export: wrote mini-sdxl of 3.94 M parameters (trained) to ")
    unet = load_file(tmp_path / "mini" / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(unet["conv_in.weight"], build_mini("mini-sdxl").unet.conv_in.weight)


@pytest.mark.parametrize("command", ["export", "checkpoint"])
def test_missing_trained_weights_are_refused_in_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = partial(sdxl.load_mini_sdxl, tmp_path / "nothing")
    monkeypatch.setattr(sdxl, "load_mini_sdxl", missing)
    result = run(command, tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert f"{command}: mini-sdxl: the weights of the package cannot be loaded" in result.output
    assert not list(tmp_path.iterdir())


def test_export_fills_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("export", ".", "--model", "mini-sd").exit_code == 0
    names = {path.name for path in Path().iterdir()}
    assert names == {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}


def test_export_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = run("export", tmp_path)
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "not empty" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("command", ["export", "checkpoint"])
def test_unknown_model_is_refused_with_those_that_there_are(command: str, tmp_path: Path) -> None:
    result = run(command, tmp_path / "x.safetensors", "--model", "mini-flux")
    assert result.exit_code == 2
    assert all(model in result.output for model in MINI_MODELS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", MINI_MODELS)
def test_checkpoint_writes_the_original_layout(model: str, tmp_path: Path) -> None:
    file = tmp_path / "some" / "model.safetensors"
    result = run("checkpoint", file, "--model", model, "--seed", 2)
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == 1
    wanted, found = original_state(build_mini(model, 2)), load_file(file)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert [path.name for path in file.parent.iterdir()] == ["model.safetensors"]


def test_checkpoint_refuses_to_overwrite(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("mine")
    result = run("checkpoint", file, "--model", "mini-sd")
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "exists already" in result.output
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.ckpt", "does not end in .safetensors"), ("mine/x.safetensors", "mine is a file")],
)
def test_checkpoint_refuses_what_cannot_be_such_a_file(
    name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    result = run("checkpoint", tmp_path / name, "--model", "mini-sd")
    assert result.exit_code == 2
    assert message in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("command", ["export", "checkpoint"])
def test_full_disk_leaves_nothing_behind(command: str, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        result = run(command, target, "--model", "mini-sd")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 2
    assert f"{target} cannot be written" in result.output
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
