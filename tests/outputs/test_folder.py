"""Nobody's files are lost: what an output folder may hold, and what --overwrite deletes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.outputs.files import ERROR_LOG
from fastppt.outputs.folder import check_output, open_folder

MakeConfig = Callable[..., RunConfig]


def test_new_and_empty_folders_are_fine(make_config: MakeConfig, tmp_path: Path) -> None:
    check_output(make_config(output=str(tmp_path / "deep" / "new")), overwrite=False)
    assert not (tmp_path / "deep").exists()
    check_output(make_config(output=str(tmp_path)), overwrite=False)


def test_other_files_in_the_folder_are_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    config = make_config(output=str(tmp_path))
    open_folder(check_output(config, overwrite=False), config)
    open_folder(check_output(config, overwrite=True), config)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "samples", "metrics.jsonl"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_of_no_run_is_never_replaced(
    make_config: MakeConfig, tmp_path: Path, name: str, overwrite: bool
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, which is of no run"):
        check_output(make_config(output=str(tmp_path)), overwrite)
    assert (tmp_path / name).read_text() == "mine"


def test_overwrite_deletes_the_old_run_and_nothing_else(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    old = make_config(output=str(tmp_path), name="old name")
    open_folder(check_output(old, overwrite=False), old)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "old name.safetensors").write_text("x")
    (tmp_path / "other.safetensors").write_text("mine")
    new = make_config(output=str(tmp_path), name="new")
    with pytest.raises(UserError, match="holds another run"):
        check_output(new, overwrite=False)
    others = make_config(output=str(tmp_path), name="other")
    with pytest.raises(UserError, match=r"holds other\.safetensors, which is of no run"):
        check_output(others, overwrite=True)
    open_folder(check_output(new, overwrite=True), new)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["config.toml", "other.safetensors"]


@pytest.mark.parametrize("content", ["", "seed = 1", "not toml ="])
def test_config_of_something_else_is_never_overwritten(
    make_config: MakeConfig, tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.toml").write_text(content)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"config\.toml|holds another run"):
            check_output(make_config(output=str(tmp_path)), overwrite)
    assert (tmp_path / "config.toml").read_text() == content


def test_too_long_a_name_is_refused_at_the_door(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too long"):
        check_output(make_config(name="n" * 240), overwrite=False)


def test_name_of_the_other_lora_file_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass another --name"):
        check_output(make_config(name="pytorch_lora_weights"), overwrite=False)
    with pytest.raises(UserError, match="pass another --name"):
        check_output(make_config(output=str(tmp_path / "pytorch_lora_weights")), overwrite=False)


@pytest.mark.parametrize("inside", ["", "a/b"])
def test_output_at_or_under_a_file_is_refused(
    make_config: MakeConfig, tmp_path: Path, inside: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; choose another folder"):
        check_output(make_config(output=str(tmp_path / "file" / inside)), overwrite=True)


def test_what_a_run_left_that_was_killed_at_its_start_goes_with_the_next(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """It had not written its configuration, so nothing else is overwritten."""
    config = make_config()
    left = [tmp_path / "out" / name for name in (".config.toml.7.tmp", ERROR_LOG)]
    left[0].parent.mkdir()
    for path in left:
        path.write_text("half")
    open_folder(check_output(config, overwrite=False), config)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.toml"]
