"""`fastppt doctor` says what is here, and whether a training could start."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fastppt import config_io, doctor, forecast
from fastppt.cli import app
from fastppt.config import ModelConfig
from fastppt.config_io import build_config
from fastppt.doctor import Report, can_train, examine
from fastppt.families.names import MINI_MODELS
from fastppt.machine import Finding
from fastppt.mini import build_mini

CPU = torch.device("cpu")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def find(report: Report, what: str) -> Finding:
    (finding,) = [f for findings in report.values() for f in findings if f.what == what]
    return finding


@pytest.fixture
def _nothing_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has no part about the memory of the run, which takes seconds to predict."""
    monkeypatch.setattr(doctor, "memory", lambda *_: [])


@pytest.fixture(scope="module")
def here() -> Report:
    """The report of this machine, without a model."""
    return examine(build_config(settings=[("model.device", "cpu")]))


def test_every_library_is_there_with_its_version(here: Report) -> None:
    required = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "matplotlib")
    for name in required:
        finding = find(here, name)
        assert finding.level == "ok" and metadata.version(name) in finding.text
    for name in ("triton", "peft", "tensorboard", "xformers", "flash-attn"):
        finding = find(here, name)
        assert finding.level in ("ok", "note")
        assert finding.level == "ok" or finding.text.startswith("not installed: ")
    assert find(here, "python").text.startswith(".".join(map(str, sys.version_info[:3])))


def test_the_way_a_run_would_take_is_said_and_why_not_the_others(here: Report) -> None:
    assert "auto takes it: graph captures CUDA graphs, which" in find(here, "engine eager").text
    graph = find(here, "engine graph")
    assert graph.level == "note" and graph.text.endswith("captures CUDA graphs, which need a GPU")
    assert find(here, "engine compile").text.startswith(("usable", "not usable: needs"))
    assert find(here, "fp32").text == "usable; auto takes it"
    assert find(here, "bf16").text == "usable"
    assert find(here, "attention sdpa").text == "usable; chosen"
    flash = find(here, "attention flash")
    assert flash.level == "note" and "needs a GPU, and the device is cpu" in flash.text


def test_embedded_models_are_named(here: Report) -> None:
    text = find(here, "embedded").text
    assert text == "mini-sdxl (trained), mini-sd and mini-sd3 (of random weights)"
    assert all(name in text for name in MINI_MODELS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "mini-sdxl" else pytest.mark.slow)
        for name in MINI_MODELS
    ],
)
def test_mini_model_is_found_and_fits(name: str) -> None:
    result = run("--model", name, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "Training can start."
    lines = [line.split() for line in result.output.splitlines()]
    assert ["ok", "family", MINI_MODELS[name]] in lines
    assert "the model fits: " in result.output
    assert "Memory and disk of the run, predicted" in result.output
    assert re.search(r"ok +disk +the run writes up to .* MiB \(LoRA files", result.output)
    assert ["note", "photos", "not", "given:", "5", "are", "assumed"] in lines


def test_memory_of_the_run_is_predicted_part_by_part() -> None:
    said = {}
    for weighting in ("uniform", "adaptive"):
        key = "stage.0.objectives.denoising.weighting"
        config = build_config(settings=[("model.path", "mini-sdxl"), (key, weighting)])
        report = {"Memory": forecast.memory(config, CPU, torch.bfloat16)}
        said[weighting] = {finding.what: finding.text for finding in report["Memory"]}
        assert all(finding.level in ("ok", "note") for finding in report["Memory"])
    assert said["uniform"].keys() == said["adaptive"].keys() > {"always there", "run", "photos"}
    lasting = said["uniform"]["always there"]
    for part in (
        "network 5.6 MiB",
        "trained values ",
        "gradients ",
        "moments ",
        "latents ",
        "prompts ",
    ):
        assert part in lasting
    assert "anchors" not in lasting
    assert "to its backward pass" in said["uniform"]["in a step"]
    assert "from the base pass to the tuned pass" not in said["uniform"]["in a step"]
    assert "from the base pass to the tuned pass" in said["adaptive"]["in a step"]
    assert {"at most, encode", "at most, train", "at most, samples"} < said["uniform"].keys()
    assert said["uniform"]["run"].startswith("it fits: ")


def test_a_run_that_does_not_fit_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "free_host_memory", lambda: 2**20)
    config = build_config(settings=[("model.path", "mini-sd")])
    finding = find({"Memory": forecast.memory(config, CPU, torch.float32)}, "run")
    assert finding.level == "problem"
    assert finding.text.startswith("it does not fit: ")
    assert finding.text.endswith("1.0 MiB free on this machine")


def test_a_run_that_would_be_refused_is_a_problem() -> None:
    settings = [("model.path", "mini-sd"), ("stage.0.trainables.lora.targets", ["*.to_z"])]
    (finding,) = forecast.memory(build_config(settings=settings), CPU, torch.float32)
    assert finding.level == "problem" and "'*.to_z' matches no attention" in finding.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts.token": "sks"}, "'sks' is a word that the model knows already"),
        ({"prompts.class_prompt": "one {class_noun}, seen"}, "cannot be lined up token by token"),
        ({"prompts.template": "red " * 30 + "{subject}"}, "lies past that; write {subject} nearer"),
    ],
)
def test_prompts_that_would_be_refused_are_a_problem(
    settings: dict[str, object], message: str
) -> None:
    keys = {"model.path": "mini-sd", "prompts.class_noun": "dog"} | settings
    config = build_config("apt", settings=list(keys.items()))
    (finding,) = forecast.memory(config, CPU, torch.float32)
    assert finding.level == "problem" and message in finding.text


def test_memory_is_not_predicted_without_the_model_s_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastppt.families import loading

    monkeypatch.setattr(loading, "outline_family", lambda model, dtype: None)
    config = build_config(settings=[("model.path", "a/b")])
    (finding,) = forecast.memory(config, CPU, torch.float32)
    assert finding.level == "note" and finding.what == "not predicted"


@pytest.mark.slow
def test_command_as_typed_says_the_same() -> None:
    command = [sys.executable, "-m", "fastppt", "doctor", "--model", "nowhere/at/all"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stderr
    assert "problem model" in finished.stdout and "model nowhere/at/all: " in finished.stdout
    assert finished.stdout.splitlines()[-1] == "Training could not start."
    assert finished.stderr == ""


def test_folder_without_a_component_is_a_problem(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_mini("mini-sdxl").save_pretrained(folder)
    whole = {"Model": doctor.model(ModelConfig(path=str(folder)), CPU, torch.float32)}
    assert can_train(whole)
    (folder / "unet").rename(tmp_path / "elsewhere")
    result = run("--model", folder, "--device", "cpu")
    assert result.exit_code == 1
    assert f"model {folder}: has no unet/config.json" in result.output


def test_weights_are_counted_in_the_precision_of_the_run() -> None:
    def weights(precision: torch.dtype) -> str:
        found = doctor.model(ModelConfig(path="mini-sdxl"), CPU, precision)
        return find({"Model": found}, "weights").text

    wide, narrow = weights(torch.float32), weights(torch.bfloat16)
    num_values = sum(p.numel() for p in build_mini("mini-sdxl").unet.parameters())
    assert f"network {4 * num_values / 2**20:.1f} MiB" in wide
    assert f"network {2 * num_values / 2**20:.1f} MiB" in narrow
    assert narrow.partition("VAE")[2] == wide.partition("VAE")[2]


def test_model_that_does_not_fit_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_host_memory", lambda: 2**20)
    found = doctor.model(ModelConfig(path="mini-sdxl"), CPU, torch.float32)
    finding = find({"Model": found}, "memory")
    assert finding.level == "problem"
    assert finding.text.startswith("the model does not fit: ")
    assert finding.text.endswith(", 1.0 MiB free")


def test_model_on_the_hub_alone_is_to_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastppt.families import loading, weights

    monkeypatch.setattr(loading, "detect_family", lambda config: "sdxl")
    monkeypatch.setattr(weights, "count_weights", lambda config, family: None)
    found = doctor.model(ModelConfig(path="a/b"), CPU, torch.float32)
    assert [finding.level for finding in found] == ["ok", "note"]
    assert "downloads it" in found[1].text


@pytest.mark.usefixtures("_nothing_predicted")
def test_gpu_that_is_not_there_is_a_problem_and_the_rest_is_still_said() -> None:
    result = run("--device", "cuda:99", "--model", "mini-sdxl")
    assert result.exit_code == 1
    assert "problem device" in result.output and "model.device cuda:99: torch sees" in result.output
    assert "the model fits" in result.output


def test_chosen_backend_that_is_missing_says_what_to_install() -> None:
    result = run("--device", "cpu", "--attention", "xformers")
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "problem attention xformers not usable: not installed" in said
    assert 'pip install "fastppt[xformers]"' in result.output


def test_chosen_engine_that_cannot_run_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastppt.training import engine

    monkeypatch.setattr(engine, "why_not_compile", lambda device: "needs a C++ compiler")
    assert doctor.engines("auto", CPU)[1].level == "note"
    finding = doctor.engines("compile", CPU)[1]
    assert finding == Finding("problem", "engine compile", "not usable: needs a C++ compiler")


def test_missing_library_is_a_problem_with_the_command_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    result = run("--model", "mini-sdxl")
    assert result.exit_code == 1
    assert "problem accelerate" in result.output
    assert "not installed: pip install 'accelerate>=" in result.output


def test_old_library_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.9.1+cpu" if name == "diffusers" else real(name)
    )
    finding = find({"Packages": doctor.packages()}, "diffusers")
    assert finding.level == "problem"
    assert finding.text.startswith("0.9.1+cpu is too old: pip install 'diffusers>=")


def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Put a package before the real one that cannot be imported."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise OSError('libmissing.so:\\n not found')")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)


def test_broken_library_is_a_problem_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(tmp_path, monkeypatch, "accelerate")
    result = run()
    assert result.exit_code == 1
    assert "problem accelerate" in result.output
    assert "cannot be imported: OSError: libmissing.so: not found" in result.output


def test_broken_optional_library_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(tmp_path, monkeypatch, "tensorboard")
    finding = find({"Packages": doctor.packages()}, "tensorboard")
    assert finding.level == "note"
    assert finding.text == (
        "cannot be imported: OSError: libmissing.so: not found; no --tensorboard"
    )


def test_broken_trainer_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastppt.training.loop", None)
    finding = find({"Packages": doctor.packages()}, "fastppt")
    assert finding.level == "problem" and "cannot be imported" in finding.text


def test_triton_matters_on_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.kernels(CPU).level == "ok"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert doctor.kernels(torch.device("cuda")).level == "note"
    monkeypatch.delitem(sys.modules, "triton")
    broken(tmp_path, monkeypatch, "triton")
    finding = doctor.kernels(torch.device("cuda"))
    assert finding.level == "problem" and "libmissing.so" in finding.text


@pytest.mark.usefixtures("_nothing_predicted")
def test_what_would_stop_the_run_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    result = run("--model", "mini-sd", "--output", file / "out")
    assert result.exit_code == 1 and f"{file} is a file" in result.output
    result = run("--model", "mini-sd", "--output", tmp_path / "out")
    assert result.exit_code == 0 and "can be written" in result.output


@pytest.mark.usefixtures("_nothing_predicted")
def test_missing_tensorboard_is_a_problem_where_curves_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run("--model", "mini-sd").exit_code == 0
    result = run("--model", "mini-sd", "--set", "tensorboard=true")
    assert result.exit_code == 1 and "pip install 'fastppt[tensorboard]'" in result.output


@pytest.mark.usefixtures("_nothing_predicted")
def test_recipe_of_another_family_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('recipe = "ppt-lora"\n[model]\npath = "mini-sd"\n')
    assert run(path).exit_code == 0
    recipe, settings = config_io.load_recipe("ppt-lora")
    only = recipe.model_copy(update={"families": ["sd3"]})
    monkeypatch.setattr(config_io, "load_recipe", lambda *_: (only, settings))
    result = run(path)
    assert result.exit_code == 1 and "recipe ppt-lora: is for sd3" in result.output


def test_bad_setting_is_a_mistake_of_the_command() -> None:
    result = run("--precision", "bf17")
    assert result.exit_code == 2 and "model.precision must be" in result.stderr


@pytest.mark.usefixtures("_nothing_predicted")
def test_run_file_is_looked_at_as_train_would(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\npath = "mini-sdxl"\ndevice = "cpu"\nprecision = "bf16"\n')
    result = run(file)
    assert result.exit_code == 0, result.output
    assert "Model mini-sdxl" in result.output and "in bfloat16" in result.output
