"""The rules that keep the house in order: who may import whom, and the name `kernels`."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CONFIG = {"config", "config_types", "stage_config", "trainables_config"}
# For each part of fastppt, the parts that it may import. Imports point down only.
MAY_IMPORT = {
    "errors": set(),
    "config_types": set(),
    "trainables_config": {"config_types"},
    "stage_config": {"config_types", "trainables_config"},
    "config": CONFIG - {"config"},
    "text_files": {"errors"},
    "config_errors": CONFIG,
    "config_io": {*CONFIG, "config_errors", "errors", "families", "text_files"},
    # Both know how published models are laid out and read; the mini models' parts import nothing.
    "mini": {"errors", "families"},
    # How they were trained: above what it trains with, and nothing needs it.
    "mini.pretrain": {"errors", "families", "mini", "objectives", "outputs"},
    "families": {*CONFIG, "errors", "mini"},
    "trainables": {*CONFIG, "errors", "families"},
    "data": {*CONFIG, "errors", "families", "text_files"},
    "objectives": {*CONFIG, "errors", "families", "trainables"},
    "outputs": {*CONFIG, "config_io", "data", "errors", "families", "machine", "trainables"},
    "training": {
        *CONFIG,
        *("config_io", "data", "errors", "families", "objectives", "outputs"),
        *("trainables", ""),
    },
    "foreign": {*CONFIG, "errors", "families", "objectives", "trainables", "training"},
    "backend": {"foreign"},
    "evaluation": {*CONFIG, "data", "errors", "families", "mini", "outputs", ""},
    "machine": set(),
    "forecast": {*CONFIG, "errors", "families", "machine", "outputs", "training"},
    "doctor": {
        *CONFIG,
        *("config_io", "errors", "families", "forecast", "machine", "outputs", "training", ""),
    },
    "console": set(),
    "faults": {"console", "errors", "outputs", ""},
    "recipe_list": {"config_io", "console", "errors"},
    "endings": {"console", "machine", "training"},
    "flags": {*CONFIG, "config_io", "errors"},
    "sweep": {
        *CONFIG,
        *("config_io", "console", "data", "endings", "errors", "evaluation", "families", "faults"),
        *("flags", "mini", "outputs", "training", ""),
    },
    "cli": {
        *CONFIG,
        *("config_io", "console", "doctor", "endings", "errors", "evaluation", "faults", "flags"),
        *("outputs", "recipe_list", "sweep", "training", ""),
    },
    "__main__": {"cli"},
    # `fastppt.load` when it is called, and what other trainers' loops use when it is asked for.
    "": {"backend", "outputs"},
}
# Where the libraries of models and formats may be used.
MODEL_LIBRARIES = {"diffusers", "transformers", "peft"}
MODEL_PARTS = {"families", "foreign", "trainables", "outputs", "data", "mini", "mini.pretrain"}
KERNEL_LIBRARIES = {"torch", "triton", "fastppt_kernels"}
# Where model families may be named, and how one looks; sd-scripts is another trainer, and ss_sd_
# begins keys of its metadata.
FAMILY_PARTS = {"families", "mini", "mini.pretrain"}
FAMILY = re.compile(
    r"(?<![a-z0-9])(?<!ss_)(?:mini-)?sd(?:xl|\d+)?(?![a-z0-9])(?!-scripts)", flags=re.IGNORECASE
)


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def imported(path: Path) -> list[tuple[str, ...]]:
    """Every module that a file imports, wherever in the file, as its parts."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.append(node.module or "")
            if node.module == "fastppt":
                modules += [f"fastppt.{alias.name}" for alias in node.names]
    return [tuple(module.split(".")) for module in modules]


def part_of(path: Path) -> str:
    return part(path.relative_to(ROOT / "fastppt").with_suffix("").parts)


def part(names: tuple[str, ...]) -> str:
    """The part of fastppt that a module is of, given by its names below fastppt."""
    if names[:2] == ("mini", "pretrain"):
        return "mini.pretrain"
    return "" if names[:1] in ((), ("__init__",)) else names[0]


def violations(importer: str, modules: list[tuple[str, ...]]) -> list[str]:
    """What a file of a part imports against the rules."""
    wrong = []
    for module in modules:
        if module[0] == "fastppt":
            target = part(module[1:])
            if target in MAY_IMPORT and target not in MAY_IMPORT[importer] | {importer}:
                wrong.append(".".join(module))
        elif module[0] in MODEL_LIBRARIES and importer not in MODEL_PARTS:
            wrong.append(module[0])
    return wrong


@pytest.mark.parametrize("path", sources("fastppt"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert violations(part_of(path), imported(path)) == []


@pytest.mark.parametrize(
    ("importer", "module"),
    [
        *(("config", "fastppt.errors"), ("data", "fastppt.training.loop")),
        *(("training", "diffusers"), ("mini", "fastppt.mini.pretrain.training")),
    ],
)
def test_the_rule_sees_an_import_that_points_up(importer: str, module: str) -> None:
    assert violations(importer, [tuple(module.split("."))])


def test_kernels_import_torch_and_triton_alone() -> None:
    for path in sources("kernels/fastppt_kernels"):
        foreign = {module[0] for module in imported(path)} - KERNEL_LIBRARIES
        assert foreign <= sys.stdlib_module_names, path


def test_fastppt_holds_no_triton_kernel() -> None:
    for path in sources("fastppt"):
        assert "triton" not in {module[0] for module in imported(path)}, path


def test_families_are_named_in_families_alone() -> None:
    named = {
        str(path.relative_to(ROOT)): FAMILY.findall(path.read_text())
        for path in sources("fastppt")
        if part_of(path) not in FAMILY_PARTS
    }
    assert {path: names for path, names in named.items() if names} == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('if name == "sdxl":', ["sdxl"]),
        ("for mini-sd and sd3.", ["mini-sd", "sd3"]),
        ("SD 2.1, SDXL's blocks, sd15_keys, is_sd3", ["SD", "SDXL", "sd15", "sd3"]),
        ("sd-scripts and kohya-ss/sd-scripts read it, and ss_sd_model_name", []),
        ("the std of sdpa, --sd-x", ["sd"]),
    ],
)
def test_the_rule_sees_a_family(text: str, named: list[str]) -> None:
    assert FAMILY.findall(text) == named


@pytest.mark.parametrize("folder", ["kernels", "tests/kernels", "bench/kernels"])
def test_no_folder_shadows_the_kernels_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.slow
def test_an_installed_fastppt_brings_no_package_named_kernels() -> None:
    code = "import importlib.util as util, fastppt_kernels; print(util.find_spec('kernels'))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in run.stdout


@pytest.mark.slow
def test_clip_loads_with_the_checkout_on_the_path() -> None:
    code = "import transformers; transformers.CLIPTextModel; import diffusers.pipelines"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_both_packages_are_typed_and_installed() -> None:
    for package in ("fastppt", "fastppt_kernels"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        assert (Path(spec.origin).parent / "py.typed").is_file()
