"""The wheel has the weights, and stock diffusers loads them from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import fastppt
from fastppt.mini import build_mini
from fastppt.mini.judge import WEIGHTS as JUDGE

ROOT = Path(fastppt.__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all that a wheel is built of."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastppt", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, unzipped from their wheel."""
    target = tmp_path_factory.mktemp("installed")
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_the_wheel_has_every_file_of_the_source(source: Path, installed: Path) -> None:
    files = [path for path in (source / "fastppt").rglob("*") if path.is_file()]
    assert source / "fastppt" / "mini" / "weights" / "mini-sdxl" / "model_index.json" in files
    for file in files:
        found = installed / file.relative_to(source)
        assert found.read_bytes() == file.read_bytes(), found


def test_the_weights_are_small(installed: Path) -> None:
    weights = installed / "fastppt" / "mini" / "weights"
    model = (weights / "mini-sdxl").rglob("*.safetensors")
    assert sum(path.stat().st_size for path in model) <= 8_000_000
    assert (weights / JUDGE.name).stat().st_size <= 1_000_000


def test_stock_diffusers_draws_from_the_folder_in_the_wheel_what_the_embedded_model_draws(
    installed: Path,
) -> None:
    folder = installed / "fastppt" / "mini" / "weights" / "mini-sdxl"
    stock = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    pictures = [
        pipeline(
            "a photo of a red boat on the beach",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for pipeline in (stock, build_mini("mini-sdxl"))
    ]
    assert torch.isfinite(pictures[0]).all()
    assert torch.equal(pictures[0], pictures[1])


@pytest.mark.slow
def test_the_installed_package_builds_its_own_weights(installed: Path) -> None:
    code = (
        "import fastppt, fastppt.mini.sdxl as sdxl; print(fastppt.__file__); print(sdxl.WEIGHTS);"
        "print(sdxl.load_mini_sdxl().unet.dtype)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(installed)!r}); {code}"],
        cwd=installed,
        check=True,
        capture_output=True,
        text=True,
    )
    package = installed / "fastppt"
    wanted = [package / "__init__.py", package / "mini" / "weights" / "mini-sdxl", torch.float32]
    assert done.stdout.split() == [str(each) for each in wanted]
