"""`fastppt doctor` says whose fastppt_kernels is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fastppt_kernels
from fastppt import __version__, doctor


def test_the_kernels_of_the_checkout_are_fastppt_s_own() -> None:
    finding = doctor.kernels_package()
    assert finding.level == "ok"
    assert finding.text == f"fastppt's own, in {Path(fastppt_kernels.__file__).parent}"


def install_kernels(
    monkeypatch: pytest.MonkeyPatch, site: Path, version: str | None, beside: Path | None = None
) -> None:
    """Make as if fastppt_kernels lay in a folder, and its own distribution were of a version.

    Args:
        beside: The folder in which fastppt lies; None: the checkout.
    """
    package = site / "fastppt_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    if version is not None:
        (site / "fastppt_kernels-0.dist-info").mkdir()
        text = f"Metadata-Version: 2.4\nName: fastppt-kernels\nVersion: {version}\n"
        (site / "fastppt_kernels-0.dist-info" / "METADATA").write_text(text)
    if beside is not None:
        monkeypatch.setattr(doctor, "__file__", str(beside / "fastppt" / "doctor.py"))
    monkeypatch.delitem(sys.modules, "fastppt_kernels")
    monkeypatch.syspath_prepend(site)


@pytest.mark.parametrize(("version", "level"), [(__version__, "note"), ("0.0.9", "problem")])
def test_kernels_installed_twice_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, level: str
) -> None:
    install_kernels(monkeypatch, tmp_path, version, beside=tmp_path)
    finding = doctor.kernels_package()
    assert finding.level == level
    assert f"fastppt-kernels {version} is installed beside fastppt {__version__}, " in finding.text
    assert finding.text.endswith(
        f"imported is {tmp_path / 'fastppt_kernels'}. pip uninstall fastppt-kernels, then "
        f"pip install --force-reinstall --no-deps fastppt=={__version__}"
    )
    assert finding in doctor.packages()


def test_kernels_installed_beside_a_checkout_are_only_to_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_kernels(monkeypatch, tmp_path, "0.0.9")
    finding = doctor.kernels_package()
    assert finding.level == "problem"
    assert finding.text.endswith("pip uninstall fastppt-kernels")


def test_kernels_from_another_folder_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_kernels(monkeypatch, tmp_path, None)
    finding = doctor.kernels_package()
    assert finding.level == "problem" and str(tmp_path / "fastppt_kernels") in finding.text


def test_kernels_that_went_with_the_other_distribution_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_kernels(monkeypatch, tmp_path, None, beside=tmp_path)
    assert doctor.kernels_package().level == "ok"
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    finding = doctor.kernels_package()
    assert finding.level == "problem" and "pip install --force-reinstall" in finding.text


def test_what_a_build_left_in_the_checkout_is_no_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_kernels(monkeypatch, tmp_path / "kernels", "0.0.9", beside=tmp_path)
    assert doctor.kernels_package().level == "ok"
