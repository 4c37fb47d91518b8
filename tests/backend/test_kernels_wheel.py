"""fastppt_kernels has a wheel of its own, which works beside torch and triton alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable
from email import message_from_string
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastppt
import fastppt_kernels
from tests.backend import every_operation

ROOT = Path(fastppt.__file__).parents[1]
# Installed where the tests run, and none of them in the environment of the kernels' own wheel.
ABSENT = ["diffusers", "transformers", "peft", "accelerate", "numpy", "safetensors", "fastppt"]

MakeEnvironment = Callable[..., Path]


def project(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text())["project"]


def copy_source(target: Path, *names: str) -> Path:
    """Copy what a wheel is built of: building in the checkout would leave folders there."""
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    target.mkdir(exist_ok=True)
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target)
    return target


def build_wheel(source: Path) -> Path:
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of fastppt_kernels alone."""
    return build_wheel(copy_source(tmp_path_factory.mktemp("source"), "kernels") / "kernels")


def distributions_for(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """Return the installed distributions that meet requirements, and all that those require."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(each) for each in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and name not in found:
            found[name] = metadata.distribution(name)
            waiting += map(Requirement, found[name].requires or [])
    return found


@pytest.fixture
def make_environment(tmp_path: Path) -> MakeEnvironment:
    """Return a maker of a virtual environment that holds what the kernels require alone.

    The packages are links to the installed ones. Returns the environment's site-packages.
    """

    def make(leave_out: tuple[str, ...] = ()) -> Path:
        venv.create(tmp_path / "venv", symlinks=True)
        (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
        for name, found in distributions_for(
            project("kernels/pyproject.toml")["dependencies"]
        ).items():
            if name not in leave_out:
                tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
                for top in tops:
                    # Several distributions may share a folder, such as nvidia.
                    if not (packages / top).exists():
                        (packages / top).symlink_to(Path(str(found.locate_file(top))))
        return packages

    return make


def python_of(packages: Path) -> Path:
    return packages.parents[2] / "bin" / "python"


def run_every_operation(packages: Path, *absent: str) -> dict[str, list[torch.Tensor]]:
    """Run each operation in an environment; what is absent must not be importable there."""
    file = packages / "results.pt"
    program = [str(python_of(packages)), "-I", every_operation.__file__, str(file)]
    done = subprocess.run(
        [*program, *absent, "kernels"], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file)


def assert_same_as_here(results: dict[str, list[torch.Tensor]]) -> None:
    here = every_operation.run_all()
    assert results.keys() == here.keys() == set(fastppt_kernels.__all__)
    for name, wanted in here.items():
        for got, want in zip(results[name], wanted, strict=True):
            # NaN marks bins that no sample was in.
            torch.testing.assert_close(got, want.detach(), rtol=0, atol=0, equal_nan=True)


def test_the_wheel_is_the_package_with_its_licence_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    package = ROOT / "kernels" / "fastppt_kernels"
    source = {
        str(path.relative_to(ROOT / "kernels")): path.read_bytes()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert "fastppt_kernels/py.typed" in source
    (info,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
    assert {name: files[name] for name in files if not name.startswith(info)} == source
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    said = message_from_string(files[f"{info}/METADATA"].decode())
    assert (said["Name"], said["Version"]) == ("fastppt-kernels", fastppt.__version__)
    required = {Requirement(each).name for each in said.get_all("Requires-Dist")}
    assert required == {"torch", "triton"}


def test_fastppt_and_its_kernels_agree_on_version_and_demands() -> None:
    whole, kernels = project("pyproject.toml"), project("kernels/pyproject.toml")
    assert whole["version"] == kernels["version"] == fastppt.__version__
    assert set(kernels["dependencies"]) <= set(whole["dependencies"])
    assert kernels["requires-python"] == whole["requires-python"]


@pytest.mark.slow
def test_every_operation_runs_with_torch_and_triton_alone(
    wheel: Path, make_environment: MakeEnvironment
) -> None:
    packages = make_environment()
    zipfile.ZipFile(wheel).extractall(packages)
    assert_same_as_here(run_every_operation(packages, *ABSENT))


@pytest.mark.slow
def test_every_operation_runs_on_the_cpu_without_triton(
    wheel: Path, make_environment: MakeEnvironment
) -> None:
    packages = make_environment(leave_out=("triton",))
    zipfile.ZipFile(wheel).extractall(packages)
    assert_same_as_here(run_every_operation(packages, *ABSENT, "triton"))


def pip(packages: Path, *arguments: object) -> None:
    """Run the tests' pip on an environment, without an index."""
    command = [sys.executable, "-m", "pip", "--python", python_of(packages), *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_pip_installs_the_folder_and_finds_all_that_it_demands(
    tmp_path: Path, make_environment: MakeEnvironment
) -> None:
    source = copy_source(tmp_path / "source", "kernels") / "kernels"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, source], check=True, capture_output=True)
    packages = make_environment()
    pip(packages, "install", "--no-index", *tmp_path.glob("fastppt_kernels-*.whl"))
    pip(packages, "check")
    assert_same_as_here(run_every_operation(packages, *ABSENT))


@pytest.mark.slow
def test_one_of_two_distributions_takes_the_other_s_files_and_the_mend_brings_them_back(
    wheel: Path, tmp_path: Path, make_environment: MakeEnvironment
) -> None:
    source = copy_source(
        tmp_path / "source", *("fastppt", "kernels", "pyproject.toml", "README.md", "LICENSE")
    )
    whole, packages = build_wheel(source), make_environment()
    for each in (whole, wheel):
        pip(packages, "install", "--no-index", "--no-deps", each)
    pip(packages, "uninstall", "--yes", "fastppt-kernels")
    assert not (packages / "fastppt_kernels" / "__init__.py").exists()
    pip(packages, "install", "--no-index", "--force-reinstall", "--no-deps", whole)
    for path in (source / "kernels" / "fastppt_kernels").rglob("*.py"):
        assert (packages / path.relative_to(source / "kernels")).exists()


def test_the_readme_s_blocks_run() -> None:
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    smallest, alignment = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(smallest, names)
    assert isinstance(names["optimizer"], fastppt_kernels.AnchoredAdamW)
    assert all(each.grad.any() for each in names["network"].parameters())
    names = vars(fastppt_kernels) | {
        name: torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate(("query", "key", "base_query", "base_key"))
    }
    exec(alignment, names)
    assert names["base"].shape == (1, 3, 3) and names["loss"] > 0
