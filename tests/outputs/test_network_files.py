"""The files of a network that was trained otherwise than by LoRA: what is in them, who reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.checkpoints import VELOCITY_MARK
from fastppt.families.loading import load_family
from fastppt.mini import build_mini
from fastppt.outputs.folder import check_output, open_folder
from fastppt.outputs.model_card import model_card
from fastppt.outputs.network_files import write_small_network
from fastppt.outputs.results import files_of_run
from tests.outputs.network_cases import KINDS, Trained

FAMILIES = ("sd", "sdxl", "sd3")
slow = pytest.mark.slow
ONE_FAST = ["sd", pytest.param("sdxl", marks=slow), pytest.param("sd3", marks=slow)]


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def dtypes_of_values(tensors: dict[str, torch.Tensor]) -> set[torch.dtype]:
    """Of all but the VAE, which stays as it is, and the mark of a model that predicts velocity."""
    return {
        tensor.dtype
        for key, tensor in tensors.items()
        if not key.startswith("first_stage") and key != VELOCITY_MARK
    }


@pytest.mark.parametrize("name", ONE_FAST)
@pytest.mark.parametrize("save_dtype", ["fp32", pytest.param("bf16", marks=slow)])
def test_whole_network_is_in_the_folder_and_in_the_one_file(
    tmp_path: Path, photos: Path, name: str, save_dtype: str
) -> None:
    run = Trained(tmp_path / "out", photos, name, "full", save_dtype=save_dtype).write()
    folder, file = run.files
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[save_dtype]
    base = build_mini(f"mini-{name}")
    by_folder = DiffusionPipeline.from_pretrained(folder)
    by_file = type(base).from_single_file(str(file), config=str(folder), local_files_only=True)
    values = run.trainables.network.tensors
    for pipe in (by_folder, by_file):
        network = pipe.components[run.family.lora_component]
        for key, value in values.items():
            assert torch.equal(network.get_parameter(key), value.to(dtype).float()), key
        for part, wanted in base.components.items():
            if isinstance(wanted, nn.Module) and part != run.family.lora_component:
                # A VAE in fewer bits draws coarser pictures.
                kept = torch.float32 if part == "vae" else dtype
                state = pipe.components[part].state_dict()
                for key, value in wanted.state_dict().items():
                    assert torch.equal(state[key], value.to(kept).float()), key
    stored = load_file(next((folder / run.family.lora_component).glob("*.safetensors")))
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert dtypes_of_values(load_file(file)) == {dtype}
    metadata = metadata_of(file)
    assert metadata["modelspec.architecture"] == run.family.modelspec_architecture
    assert metadata["fastppt.trainable"] == "full" and metadata["fastppt.family"] == name
    # Both are models to go on from.
    for model in (
        ModelConfig(path=str(folder), device="cpu"),
        ModelConfig(path=str(file), config_folder=folder, device="cpu"),
    ):
        assert load_family(model).name == name


@slow
def test_master_weights_are_saved_not_what_they_are_rounded_to(
    tmp_path: Path, photos: Path
) -> None:
    run = Trained(tmp_path / "out", photos, "sd", "full", model__precision="bf16").write()
    unet = DiffusionPipeline.from_pretrained(run.files[0]).unet
    assert run.family.dtype == torch.bfloat16
    for key, value in run.trainables.network.tensors.items():
        assert value.dtype == torch.float32 and torch.equal(unet.get_parameter(key), value), key


@slow
def test_frozen_weights_of_a_network_trained_in_part_are_the_base_s(
    tmp_path: Path, photos: Path
) -> None:
    targets = {"stage.0.trainables.full.targets": ["up_blocks.*"]}
    run = Trained(tmp_path / "out", photos, "sd", "full", **targets).write()
    unet = DiffusionPipeline.from_pretrained(run.files[0]).unet.state_dict()
    base = build_mini("mini-sd").unet.state_dict()
    moved = {key for key in base if not torch.equal(unet[key], base[key])}
    assert moved == {key for key in base if key.startswith("up_blocks.")}


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=slow)])
def test_diffusers_loads_custom_diffusion_by_its_own_loader(
    tmp_path: Path, photos: Path, name: str
) -> None:
    run = Trained(tmp_path / "out", photos, name, "custom_diffusion").write()
    pipe = build_mini(f"mini-{name}")
    pipe.unet.load_attn_procs(run.folder, weight_name=run.files[0].name, _pipeline=pipe)
    values = run.trainables.network.tensors
    found = {}
    for path, processor in pipe.unet.attn_processors.items():
        for key, value in getattr(processor, "state_dict", dict)().items():
            place = f"{path.removesuffix('.processor')}.{key}"
            found[place.replace("_custom_diffusion", "")] = value
    assert found.keys() == values.keys()
    assert all(torch.equal(found[key], value) for key, value in values.items())


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=slow) for each in ("oft", "loha", "lokr")]
)
def test_peft_loads_the_run_s_folder(tmp_path: Path, photos: Path, kind: str) -> None:
    run = Trained(tmp_path / "out", photos, "sd", kind).write()
    wrapped = PeftModel.from_pretrained(build_mini("mini-sd").unet, run.folder)
    noisy, text = torch.randn(1, 4, 16, 16), torch.randn(1, 24, 64)
    with torch.no_grad():
        theirs = wrapped(noisy, 5, text).sample
        ours = run.family.network(noisy, 5, text).sample
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=slow) for k in KINDS if k != "svdiff"])
@pytest.mark.parametrize("name", FAMILIES)
def test_save_dtype_is_that_of_the_values(
    tmp_path: Path, photos: Path, name: str, kind: str
) -> None:
    run = Trained(tmp_path / "out", photos, name, kind, save_dtype="fp16").write()
    for file in run.files:
        if file.suffix == ".safetensors":
            assert dtypes_of_values(load_file(file)) == {torch.float16}
            assert metadata_of(file)["fastppt.base_model"] == f"mini-{name}"


@slow
def test_checkpoint_holds_no_second_copy_of_a_whole_network(tmp_path: Path, photos: Path) -> None:
    run = Trained(tmp_path / "out", photos, "sd", "full")
    assert write_small_network(tmp_path, run.config, run.family, run.trainables) == []


@pytest.mark.parametrize(
    "kind", ["full", *(pytest.param(each, marks=slow) for each in ("custom_diffusion", "dora"))]
)
def test_overwrite_deletes_the_run_s_files_and_folders_and_nothing_else(
    tmp_path: Path, photos: Path, kind: str
) -> None:
    run = Trained(tmp_path / "out", photos, "sd", kind)
    config, names = run.config, files_of_run(run.config)
    folder = check_output(config, overwrite=False)
    open_folder(folder, config)
    (folder.root / "mine.txt").write_text("x")
    # One that a kill has left half-written among them.
    for name in (*names, *(f".{name}.77.tmp" for name in names)):
        (folder.root / name).mkdir() if "." not in name[1:] else (folder.root / name).touch()
    open_folder(check_output(config, overwrite=True), config)
    assert sorted(path.name for path in folder.root.iterdir()) == ["config.toml", "mine.txt"]
    (folder.root / "config.toml").unlink()
    (folder.root / names[0]).touch()
    with pytest.raises(UserError, match="which is of no run and would be replaced"):
        check_output(config, overwrite=False)


def test_commands_for_lora_say_what_a_run_of_another_kind_wants(
    tmp_path: Path, photos: Path
) -> None:
    run = Trained(tmp_path / "out", photos, "sd", "custom_diffusion", "tokens").write()
    told = "that run trained custom_diffusion and tokens, which gives no LoRA; `fastppt generate"
    draw = ["generate", "--prompt", "a toy"]
    for command in (
        ["convert", str(run.folder), "--to", "peft"],
        [*draw, "--lora", str(run.folder)],
        ["info", str(run.folder)],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2 and told in result.stderr, result.stderr
    for command in (["convert", str(run.files[0]), "--to", "peft"], ["info", str(run.files[0])]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert "holds custom_diffusion of a fastppt run, no LoRA" in result.stderr
    assert CliRunner().invoke(app, ["info", str(run.files[1])]).exit_code == 0
    both = CliRunner().invoke(app, [*draw, "--lora", str(run.folder), "--run", str(run.folder)])
    neither = CliRunner().invoke(app, draw)
    for result in (both, neither):
        assert result.exit_code == 2 and "one of them, and not both" in result.stderr
    nothing = CliRunner().invoke(app, [*draw, "--run", str(tmp_path)])
    assert nothing.exit_code == 2 and "is no folder of a run" in nothing.stderr


@slow
def test_text_adapters_alone_are_not_drawn_for_a_network_that_moved_too(
    tmp_path: Path, photos: Path
) -> None:
    run = Trained(tmp_path / "out", photos, "sd", "custom_diffusion", "text_encoder_lora").write()
    assert (run.folder / "my robot-text.safetensors") in run.files
    command = ["generate", "--prompt", "a toy", "--lora", str(run.folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert f"adapters of text encoders alone; pass --run {run.folder}" in result.stderr


@pytest.mark.parametrize(
    ("kinds", "first", "row"),
    [
        pytest.param(
            ("full",),
            "A fine-tune of `mini-sd` that knows",
            "| `models/checkpoints/` |",
            marks=slow,
        ),
        (("tokens",), "A word for `mini-sd` that knows", "| `models/embeddings/` |"),
        pytest.param(
            *(("text_encoder_lora",), "A LoRA for the text encoders of `mini-sd`"),
            "`models/Lora/`",
            marks=slow,
        ),
        (("oft", "tokens"), "An OFT adapter for `mini-sd`", "Other programs are not known"),
    ],
)
def test_card_says_what_was_made_and_where_it_goes(
    tmp_path: Path, photos: Path, kinds: tuple[str, ...], first: str, row: str
) -> None:
    run = Trained(tmp_path / "out", photos, "sd", *kinds, stage__0__ema_decay=0.9)
    card = model_card(run.config, run.family, run.trainables, 5, 1.0)
    assert first in card and row in card
    assert ("pip install peft" in card) == (kinds[0] in ("text_encoder_lora", "oft"))
    assert f"| trained, at which learning rate | {kinds[0]} " in card
    assert "moving average of decay 0.9" in card and "fastppt generate --run . " in card
