"""Checkpoints: folders that hold all that a run goes on from, and usable adapters.

A checkpoint's folder is written aside, synced and renamed, so that one with its own name is whole
as far as the disk keeps its word; the manifest's hashes say whether it did.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from fastppt.errors import UserError
from fastppt.outputs.files import STATE_FILE, rename, write_file
from fastppt.outputs.folder import RunFolder
from fastppt.outputs.tensor_files import write_tensors

FORMAT: Final = 1
"""Version of the manifest and of the names in the state."""

MANIFEST_FILE = "manifest.json"


class Entry(BaseModel):
    """A table of the manifest. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(Entry):
    """A file of the checkpoint: its size in bytes, and its SHA-256 in hexadecimal digits."""

    bytes: int
    sha256: str


class Identity(Entry):
    """What a run was trained on, in hashes.

    Attributes:
        photos: SHA-256 of each photo's file, by its name.
        captions: Each photo's own caption, by its name; null where it has none.
        weights: Of the base network's weights.
        encodings: Of what photos, class images and prompts were encoded to before the first step.
        class_images: SHA-256 of each class image's file by its name, by stage; none without prior
            preservation.
    """

    photos: dict[str, str]
    captions: dict[str, str | None]
    weights: str
    encodings: str
    class_images: dict[str, dict[str, str]] = {}


class Manifest(Entry):
    """What a checkpoint is.

    Attributes:
        format: `FORMAT` of the fastppt that wrote it.
        step: Optimizer steps taken in the whole run.
        stage: The stage that they end in.
        number: Steps taken in that stage.
        seconds: Wall-clock time that training took so far.
        config: The resolved configuration, as JSON has it.
        identity: What was trained on.
        machine: Versions and device, for those who compare.
        files: The other files by name.
    """

    format: Literal[1] = FORMAT
    step: int
    stage: int
    number: int
    seconds: float
    config: dict[str, Any]
    identity: Identity
    machine: dict[str, str]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    manifest: Manifest

    def tensors(self) -> dict[str, Tensor]:
        """Read the state, on the host."""
        tensors: dict[str, Tensor] = load_file(self.folder / STATE_FILE)
        return tensors


def write_checkpoint(
    folder: Path,
    state: Mapping[str, Tensor],
    write_adapters: Callable[[Path], object],
    make_manifest: Callable[[dict[str, FileEntry]], Manifest],
) -> None:
    """Write a checkpoint, which is whole or not there.

    Args:
        folder: The checkpoint's; it must not be there yet.
        state: Every tensor that the run goes on from.
        write_adapters: Writes the files that other programs use into a folder.
        make_manifest: Returns the manifest of these files.

    Raises:
        UserError: it cannot be written; what was written of it is deleted.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        try:
            write_adapters(aside)
            write_tensors(aside / STATE_FILE, state, {})
            files = {path.name: _describe(path) for path in sorted(aside.iterdir())}
            manifest = make_manifest(files).model_dump_json(indent=2)
            write_file(aside / MANIFEST_FILE, manifest)
            rename(aside, folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint, every file of it compared with its manifest.

    Raises:
        UserError: something of it is missing or not what was written; it is named.
    """
    manifest = _read_manifest(folder / MANIFEST_FILE)
    named = RunFolder(folder.parent.parent).checkpoint(manifest.step).name
    if folder.name != named:
        raise UserError(f"{folder / MANIFEST_FILE}: is that of {named}")
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name:
            raise UserError(f"{folder / MANIFEST_FILE}: names the file {name!r} of another folder")
        if not path.is_file():
            raise UserError(f"{path}: is missing")
        if path.stat().st_size != entry.bytes:
            raise UserError(
                f"{path}: has {path.stat().st_size} bytes, and {entry.bytes} were written"
            )
        if _describe(path) != entry:
            raise UserError(f"{path}: is not what was written (its SHA-256 differs)")
    if STATE_FILE not in manifest.files:
        raise UserError(f"{folder / MANIFEST_FILE}: names no {STATE_FILE}")
    return Checkpoint(folder, manifest)


def find_checkpoints(folder: RunFolder) -> dict[int, Path]:
    """Return the folders of a run's checkpoints by their step, the newest first. Reads none."""
    found = {
        int(path.name.removeprefix("step-")): path
        for path in folder.checkpoints.glob("step-[0-9]*")
        if path.name.removeprefix("step-").isdecimal()
    }
    return dict(sorted(found.items(), reverse=True))


def prune_checkpoints(folder: RunFolder, keep: int) -> None:
    """Delete all but the newest few checkpoints, the oldest first.

    Args:
        folder: The run's.
        keep: Checkpoints to keep; 0 keeps all.
    """
    if keep:
        for path in reversed(list(find_checkpoints(folder).values())[keep:]):
            delete_checkpoint(path)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; cut short, that leaves none that looks whole.

    Raises:
        UserError: it cannot be deleted.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        rename(folder, aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise UserError(f"{folder}: cannot be deleted ({error.strerror or error})") from None


def _describe(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())


def _read_manifest(path: Path) -> Manifest:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    version = table.get("format") if isinstance(table, dict) else None
    if version != FORMAT:
        raise UserError(
            f"{path}: has format {version!r}, and this fastppt reads {FORMAT}; "
            "resume with the version that wrote it"
        )
    try:
        return Manifest.model_validate(table)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: is not a manifest ({place})") from None
