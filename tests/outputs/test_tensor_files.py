"""Weight files written tensor by tensor are those that safetensors reads."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastppt.errors import UserError
from fastppt.outputs.files import write_folder
from fastppt.outputs.tensor_files import write_tensors


def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 5)
    tensors = {
        "b": base.bfloat16(),
        "a": base.T,
        "shared": base[2:4],
        "half": base.half().view(5, 6)[:, ::2],
        "empty": torch.empty(0),
        "one": torch.tensor(3.0, dtype=torch.float64),
    }
    path = tmp_path / "deep" / "a.safetensors"
    write_tensors(path, tensors, {"format": "pt", "z": "é", "a": "b"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "z": "é", "a": "b"}
    again = tmp_path / "b.safetensors"
    write_tensors(again, dict(reversed(tensors.items())), {"a": "b", "z": "é", "format": "pt"})
    assert again.read_bytes() == path.read_bytes()
    assert [each.name for each in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_full_disk_leaves_nothing_and_names_the_file(tmp_path: Path, what: str) -> None:
    path, tensors = tmp_path / "out" / "weights.safetensors", {"a": torch.ones(10_000)}

    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        save_file(tensors, folder / "inner" / "a.safetensors")

    def write() -> None:
        write_tensors(path, tensors, {}) if what == "file" else write_folder(path, fill)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=f"{path}: cannot be written .*too large") as error:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # By this a run knows that it can go on where there is room.
    assert isinstance(error.value.__cause__, OSError)
    assert list(path.parent.iterdir()) == []


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("old", "new"):
        write_folder(path, lambda aside, name=name: (aside / name).write_text("x"))
    assert [each.name for each in path.iterdir()] == ["new"]
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]
