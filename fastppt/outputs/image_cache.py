"""Pictures that runs keep for one another: each with its hash, whole or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from fastppt.outputs.files import write_file
from fastppt.outputs.samples import png_bytes

FORMAT: Final = 1
"""Version of the manifest, and of what a request says of a picture."""

MANIFEST_FILE = "manifest.json"
# Digits of a request's hash in the name of its folder.
DIGITS = 32


class _Manifest(BaseModel):
    """What a folder of the cache holds.

    Attributes:
        request: What was asked, for those who look.
        images: SHA-256 of each picture's file by its name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = FORMAT
    request: dict[str, Any]
    images: dict[str, str]


class ImageCache:
    """The pictures of one request: PNG files by number, and a manifest with the hash of each.

    A picture counts if the manifest has its hash and its file has that hash: what was half written,
    deleted or damaged is as if it had never been. The picture is written before its hash, and each
    file is renamed when it is whole.

    Args:
        root: Of all requests.
        request: All that a picture depends on beside its number; must fit into JSON.
    """

    def __init__(self, root: Path, request: Mapping[str, Any]) -> None:
        self.request = {"format": FORMAT, **request}
        key = hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()
        self.folder = root / key[:DIGITS]

    def path(self, number: int) -> Path:
        """Return the file of a picture."""
        return self.folder / f"{number:06d}.png"

    def hashes(self, count: int) -> dict[int, str]:
        """Return the SHA-256 of those of the first ``count`` pictures that are whole."""
        noted = self._read().images
        found = {}
        for number in range(count):
            path = self.path(number)
            wanted = noted.get(path.name)
            if wanted is not None and _hash(path) == wanted:
                found[number] = wanted
        return found

    def write(self, pictures: Mapping[int, Image.Image]) -> dict[int, str]:
        """Add pictures, and return the SHA-256 of each. Another process must not do so meanwhile.

        Raises:
            UserError: a file cannot be written.
        """
        written = {}
        for number, picture in pictures.items():
            content = png_bytes(picture)
            write_file(self.path(number), content)
            written[number] = hashlib.sha256(content).hexdigest()
        names = {self.path(number).name: digest for number, digest in written.items()}
        images = dict(sorted({**self._read().images, **names}.items()))
        manifest = _Manifest(request=self.request, images=images)
        write_file(self.folder / MANIFEST_FILE, manifest.model_dump_json(indent=1))
        return written

    def delete_leftovers(self) -> None:
        """Delete what a process that was killed has left half written."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def _read(self) -> _Manifest:
        """Return the manifest; one that cannot be read, like one that is not there, has nothing."""
        try:
            content = (self.folder / MANIFEST_FILE).read_bytes()
            return _Manifest.model_validate_json(content)
        except (OSError, ValidationError):
            return _Manifest(request=self.request, images={})


def _hash(path: Path) -> str | None:
    """Return the SHA-256 of a file; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
