"""Captions of photos: one TOML file, or a .txt file a photo, beside the photos or elsewhere."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fastppt.errors import UserError
from fastppt.text_files import read_text, read_toml

CAPTIONS_FILE = "captions.toml"

# A caption, and the file that holds it.
Caption = tuple[str, Path]


def read_captions(photos: Sequence[Path], place: Path | None = None) -> dict[str, Caption]:
    """Return each caption and its file, by the photo's file name.

    A caption is the entry ``"NAME.jpg" = "..."`` of a TOML file, or the text of ``NAME.txt``.

    Args:
        photos: The photos, of one folder.
        place: A TOML file of any name; or a folder with a file ``captions.toml``, .txt files, or
            both. Whatever the photos' own folder holds is then not read. None is that folder, whose
            .txt files of other names are left alone.

    Raises:
        UserError: a caption that cannot be read, is empty, or is there twice; one that belongs to
            no photo; or a place that holds none.
    """
    folder = place if place is not None else photos[0].parent
    if folder.is_dir():
        captions = _captions_in(folder, photos)
    elif folder.is_file():
        captions = _captions_from_toml(folder, photos)
    else:
        raise UserError(
            f"photos.captions: {folder} is neither a TOML file nor a folder. Is the path right?"
        )
    if place is not None:
        _check_place(place, photos, captions)
    for name, (caption, file) in captions.items():
        if not caption:
            raise UserError(
                f"photos: the caption of {name} is empty in {file}; write it or remove it"
            )
    return captions


def _captions_in(folder: Path, photos: Sequence[Path]) -> dict[str, Caption]:
    table = folder / CAPTIONS_FILE
    captions = _captions_from_toml(table, photos) if table.is_file() else {}
    for photo in photos:
        beside = folder / photo.with_suffix(".txt").name
        if not beside.is_file():
            continue
        if photo.name in captions:
            raise UserError(
                f"photos: {photo.name} has a caption in {beside.name} and one in {CAPTIONS_FILE}; "
                "keep one"
            )
        captions[photo.name] = read_text(beside, "photos: ").strip(), beside
    return captions


def _check_place(place: Path, photos: Sequence[Path], captions: dict[str, Caption]) -> None:
    """Refuse a place that is there for captions alone and holds others, or none."""
    stems = {photo.stem for photo in photos}
    for file in sorted(place.glob("*.txt")) if place.is_dir() else []:
        if file.stem not in stems and not file.name.startswith("."):
            raise UserError(
                f"photos.captions: {file} is not named like a photo in {photos[0].parent}, such as "
                f"{photos[0].stem}.txt for {photos[0].name}; rename or remove it"
            )
    if not captions:
        raise UserError(
            f"photos.captions: {place} holds no caption; write one as "
            f'"{photos[0].name}" = "{{subject}} on a chair", or leave photos.captions out'
        )


def _captions_from_toml(file: Path, photos: Sequence[Path]) -> dict[str, Caption]:
    # Some systems write "é" as two characters in file names, and no keyboard does.
    names = {unicodedata.normalize("NFC", photo.name): photo.name for photo in photos}
    names |= {photo.name: photo.name for photo in photos}
    captions = {}
    for given, caption in read_toml(file, "photos: ").items():
        name = names.get(given) or names.get(unicodedata.normalize("NFC", given), given)
        if isinstance(caption, dict):
            raise UserError(f'photos: {file}: put file names in quotes, such as "{name}.jpg"')
        if name not in names:
            raise UserError(
                f"photos: {file} has a caption for {name!r}, which is not a photo in "
                f"{photos[0].parent}"
            )
        if not isinstance(caption, str):
            raise UserError(f"photos: {file}: the caption of {name!r} must be text in quotes")
        if name in captions:
            raise UserError(f"photos: {file} has two captions for {name!r}; keep one")
        captions[name] = caption.strip(), file
    return captions
