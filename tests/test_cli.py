"""The commands as a user types them, and what they leave on disk."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from fastppt import endings
from fastppt.cli import app
from fastppt.config_io import RECIPES, build_config
from fastppt.mini import build_mini
from fastppt.outputs.folder import RunFolder
from fastppt.training.result import RunResult


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train_arguments(photos: Path, output: Path, *more: object) -> list[object]:
    return [
        *("train", "--recipe", "ppt-lora", "--model", "mini-sdxl", "--photos", photos),
        *("--class-noun", "toy", "--output", output, "--steps", 3, "--seed", 0, "--rank", 2),
        *("--device", "cpu", "--no-samples", *more),
    ]


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("run") / "toy"
    result = run(*train_arguments(photos, output, "--checkpoint-every", 2))
    assert result.exit_code == 0, result.output
    return output


def test_train_shows_progress_and_names_its_files_and_the_next_command(
    photos: Path, tmp_path: Path
) -> None:
    """In a process of its own, as typed."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "fastppt", *map(str, train_arguments(photos, output))]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    said = finished.stdout
    assert "step 3/3  loss" in said
    assert re.search(
        r"^peak memory: host \d+\.\d [MG]iB \(the whole process\)$", said, re.MULTILINE
    )
    for name in ("pytorch_lora_weights.safetensors", "out.safetensors", "README.md"):
        assert str(output / name) in said
        assert (output / name).is_file()
    # The tests' environment need not be on the PATH: then the command names the program as called.
    program = "fastppt" if shutil.which("fastppt") else "python -m fastppt"
    assert f"{program} generate --run {output} --prompt 'a photo of sks toy' --count 4" in said
    assert "Traceback" not in finished.stderr and "Warning" not in finished.stderr


def test_the_peak_of_a_gpu_is_said_by_phase(tmp_path: Path) -> None:
    result = RunResult(RunFolder(tmp_path), build_config())
    result.peak_memory = {"encode": 3 * 2**30, "train": 5 * 2**30, "samples": 2**20}
    said = endings.peaks_in_words(result)
    assert said.startswith("GPU 5.0 GiB (encode 3.0 GiB, train 5.0 GiB, samples 1.0 MiB), host ")


def test_generate_draws_what_stock_diffusers_draws(trained: Path, tmp_path: Path) -> None:
    result = run(
        *("generate", "--lora", trained, "--prompt", "a photo of sks toy", "--count", 2),
        *("--seed", 5, "--steps", 3, "--output", tmp_path / "pictures", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    paths = [Path(line) for line in result.stdout.splitlines()]
    assert [path.name for path in paths] == ["a-photo-of-sks-toy-5.png", "a-photo-of-sks-toy-6.png"]
    import torch

    stock = build_mini("mini-sdxl")
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(trained))
    for seed, path in zip((5, 6), paths, strict=True):
        generator = torch.Generator().manual_seed(seed)
        theirs = stock("a photo of sks toy", num_inference_steps=3, generator=generator).images[0]
        difference = np.abs(
            np.asarray(Image.open(path), dtype=np.int16) - np.asarray(theirs, dtype=np.int16)
        )
        assert (difference <= 2).mean() >= 0.999


def test_generate_without_a_run_asks_for_the_model(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((trained / "pytorch_lora_weights.safetensors").read_bytes())
    arguments = ("generate", "--lora", file, "--prompt", "a toy", "--steps", 1)
    result = run(*arguments)
    assert result.exit_code == 2 and "pass --model" in result.stderr
    result = run(*arguments, "--model", "mini-sdxl", "--device", "cpu")
    assert result.exit_code == 0
    assert (tmp_path / "generated" / "a-toy-0.png").is_file()


def test_generate_draws_from_a_checkpoint_of_a_run(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "step-000003"
    result = run(
        *("generate", "--lora", checkpoint, "--prompt", "a toy", "--steps", 1),
        *("--output", tmp_path, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a-toy-0.png").is_file()


def test_generate_draws_from_a_folder_for_peft_beside_the_run(
    trained: Path, tmp_path: Path
) -> None:
    folder = trained / "for-peft"
    assert run("convert", trained, "--to", "peft", "--output", folder).exit_code == 0
    result = run(
        *("generate", "--lora", folder, "--prompt", "a toy", "--steps", 1),
        *("--output", tmp_path, "--device", "cpu"),
    )
    shutil.rmtree(folder)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a-toy-0.png").is_file()


def test_generate_names_a_configuration_of_something_else(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((trained / "pytorch_lora_weights.safetensors").read_bytes())
    (tmp_path / "config.toml").write_text('pretrained_model = "x"\n')
    result = run("generate", "--lora", file, "--prompt", "a toy", "--model", "mini-sdxl")
    assert result.exit_code == 2
    assert f"{tmp_path / 'config.toml'}: unknown key pretrained_model" in result.stderr
    assert "move the LoRA to another folder" in result.stderr


def test_generate_says_what_of_a_prompt_is_not_read(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.enable_propagation()
    try:
        result = run(
            *("generate", "--lora", trained, "--prompt", "red " * 200 + "sea", "--steps", 1),
            *("--output", tmp_path, "--device", "cpu"),
        )
    finally:
        diffusers_logging.disable_propagation()
    assert result.exit_code == 0, result.output
    assert list(tmp_path.glob("*.png")) == [tmp_path / f"{'red-' * 15}0.png"]
    (said,) = (record for record in caplog.records if "longer" in record.getMessage())
    assert said.name.startswith("fastppt") and said.getMessage().endswith("red sea")
    assert not any("truncated" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--revision", "v2"), "model.revision: goes with a hub id"),
        (("--variant", "fp16"), "model.variant: goes with a hub id"),
        (("--model-config", "."), "model.config_folder: goes with a single file"),
        (("--vae", "no.safetensors"), "model.vae no.safetensors: there is no such file"),
        (("--attention", "flash"), "flash"),
        (("--set", "model.large_text_encoder=false"), "model.large_text_encoder: is for"),
        (("--set", "stage.0.steps=1"), "--set stage.0.steps: of all keys `generate` takes"),
        (("--set", "model.pth=1"), "model.pth: not a value that fastppt knows"),
    ],
)
def test_generate_takes_what_train_takes_of_the_model(
    trained: Path, more: tuple[str, str], message: str
) -> None:
    result = run("generate", "--lora", trained, "--prompt", "a toy", "--device", "cpu", *more)
    assert result.exit_code == 2 and message in result.stderr


def test_generate_refuses_what_it_cannot_draw_or_write(trained: Path, tmp_path: Path) -> None:
    arguments = ["generate", "--lora", trained, "--prompt", "a toy", "--steps", 1]
    result = run(*arguments, "--resolution", 50, "--device", "cpu")
    assert result.exit_code == 2 and "must be a multiple of 16" in result.stderr
    result = run(*arguments, "--guidance-scale", "inf")
    assert result.exit_code == 2 and "must be a finite number, got inf" in result.stderr
    (tmp_path / "file").write_text("mine")
    result = run(*arguments, "--output", tmp_path / "file", "--device", "cpu")
    assert result.exit_code == 2 and "cannot be written" in result.stderr


def test_flags_win_over_the_file_and_set_over_flags(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('recipe = "ppt-lora"\nseed = 1\n[prompts]\ntoken = "xyz"\n')
    settings = ("--set", "stage.0.objectives.anchor.weight=0.1", "--set", "stage.0.steps=2")
    arguments = train_arguments(photos, tmp_path / "out", *settings)
    result = run("train", file, *arguments[1:])
    assert result.exit_code == 0, result.output
    config = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert config["seed"] == 0 and config["prompts"]["token"] == "xyz"
    assert config["stage"][0]["objectives"]["anchor"]["weight"] == 0.1
    assert config["stage"][0]["steps"] == 2


def test_printed_config_is_taken_back_by_train(photos: Path, tmp_path: Path) -> None:
    printed = run("config", "--recipe", "ppt-lora", "--set", "stage.0.trainables.lora.rank=2")
    assert printed.exit_code == 0
    file = tmp_path / "run.toml"
    file.write_text(printed.stdout)
    result = run("train", file, *train_arguments(photos, tmp_path / "out")[3:])
    assert result.exit_code == 0, result.output


def test_recipes_are_listed_by_family_a_line_each() -> None:
    lines = [line.strip().split(maxsplit=4) for line in run("recipes").stdout.splitlines()]
    assert lines[0] == ["recipe", "sd", "sdxl", "sd3", "what it is"]
    found = {name: marks for name, *marks, _ in lines[1:]}
    assert tuple(found) == RECIPES
    assert found["lora"] == ["yes", "yes", "yes"]
    assert found["dreambooth"] == ["yes", "-", "yes"]
    assert found["dco"] == ["-", "yes", "-"]


def test_a_recipe_is_shown_with_its_source_and_its_settings() -> None:
    said = run("recipes", "dco").stdout
    assert said.startswith("dco (for sdxl): Direct Consistency Optimization: LoRA and a new word")
    assert "arXiv 2402.12004" in said and "customize.py" in said
    settings = tomllib.loads(said[said.index("[prompts]") :])
    assert settings["stage"][0]["objectives"]["direct_consistency"]["beta"] == 1000.0
    result = run("recipes", "dcp")
    assert result.exit_code == 2 and "did you mean 'dco'?" in result.stderr


def test_help_and_version_work_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from fastppt.cli import app\n"
        "try: app(['recipes'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert run("--version").stdout.startswith("fastppt ")


def empty_folder(tmp_path: Path, photos: Path) -> dict[str, object]:
    (tmp_path / "empty").mkdir()
    return {"--photos": tmp_path / "empty"}


def corrupt_image(tmp_path: Path, photos: Path) -> dict[str, object]:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"no image")
    return {"--photos": tmp_path / "photos"}


def pickle_checkpoint(tmp_path: Path, photos: Path) -> dict[str, object]:
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    return {"--model": tmp_path / "model.ckpt"}


def unknown_recipe(tmp_path: Path, photos: Path) -> dict[str, object]:
    return {"--recipe": "ppt-loro"}


def no_steps(tmp_path: Path, photos: Path) -> dict[str, object]:
    return {"--steps": 0}


def misspelt_key(tmp_path: Path, photos: Path) -> dict[str, object]:
    return {"--set": "stage.0.objectives.ancor.weight=1"}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (empty_folder, "found 0 images in"),
        (corrupt_image, "cat.jpg cannot be read as an image"),
        (unknown_recipe, "did you mean 'ppt-lora'?"),
        (misspelt_key, "unknown key stage.0.objectives.ancor; did you mean 'anchor'?"),
        (no_steps, "stage.0.steps must be >= 1, got 0"),
        (pickle_checkpoint, "is a pickle"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    photos: Path, tmp_path: Path, mistake, message: str
) -> None:
    arguments = train_arguments(photos, tmp_path / "out")
    for flag, value in mistake(tmp_path, photos).items():
        arguments += [flag, value]
    before = sorted(tmp_path.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_output_that_holds_another_run_is_left_as_it_is(trained: Path, photos: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    result = run(*train_arguments(photos, trained))
    assert result.exit_code == 2
    assert f"holds another run; go on with that run with --resume {trained}" in result.stderr
    assert "pass --overwrite to delete it, or choose another folder" in result.stderr
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_resume_of_a_finished_run_says_so_and_ends_well(trained: Path) -> None:
    result = run("train", "--resume", trained)
    assert result.exit_code == 0
    assert f"{trained}: the run is finished; there is nothing to go on with" in result.output


def test_resume_goes_on_with_what_the_flags_change(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    command = ["train", "--resume", copy / "checkpoints" / "step-000002", "--keep-checkpoints", 1]
    result = run(*command, "--steps", 5, "--set", "save_dtype=bf16")
    assert result.exit_code == 0, result.output
    for line in (
        f"resume: going on after step 2 ({copy}/checkpoints/step-000002)",
        "changed: save_dtype was fp32 and is bf16",
        "changed: keep_checkpoints was 0 and is 1",
        "changed: stage.0.steps was 3 and is 5",
    ):
        assert line in result.output
    assert "generate --run" in result.output
    written = load_file(copy / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == 5
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step-000005"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--overwrite"], "--resume goes on with a run and --overwrite deletes it"),
        (["--recipe", "lora"], "--recipe: a resumed run has its own configuration"),
        (["run.toml"], "run.toml: a resumed run has its own configuration"),
        (["--output", "elsewhere"], "--output: a resumed run goes on in its own folder"),
        (
            ["--seed", 1, "--log-every", 7],
            "these keys cannot change in a run that has begun: seed was 0 and is 1 (these can: "
            "log_every was 10 and is 7)",
        ),
    ],
)
def test_resume_with_what_does_not_go_with_it_is_refused(
    trained: Path, tmp_path: Path, more: list[object], message: str
) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "README.md").unlink()
    result = run("train", "--resume", copy, *more)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_flag_of_one_stage_is_refused_for_many(photos: Path, tmp_path: Path) -> None:
    stage = "[[stage]]\n[stage.trainables.lora]\n[stage.objectives.denoising]\n"
    file = tmp_path / "run.toml"
    file.write_text(2 * stage)
    result = run("train", file, "--steps", 3)
    assert result.exit_code == 2
    assert "--steps: this run has 2 stages; say which one with --set stage.N.steps" in result.stderr
