"""From a folder of photos, with or without captions, to square pixels."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastppt.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS_FILE = "captions.toml"


@dataclass(frozen=True)
class Photo:
    """One reference photo.

    Attributes:
        path: The image file.
        caption: Its own prompt, or None for the run's template.
        size: (height, width) in pixels, after its EXIF orientation is applied.
    """

    path: Path
    caption: str | None
    size: tuple[int, int]


@dataclass(frozen=True)
class SquarePhoto:
    """A photo scaled and cropped to a square.

    Attributes:
        pixels: [3, R, R] float32 in [-1, 1].
        crop: (top, left) of the square in the scaled photo, in pixels.
    """

    pixels: Tensor
    crop: tuple[int, int]


def find_photos(folder: Path) -> list[Photo]:
    """Return the folder's photos in the order of their names, each one decoded once to be sure.

    A caption is the text of ``NAME.txt`` beside ``NAME.jpg``, or the entry ``"NAME.jpg" = "..."``
    of ``captions.toml``. Hidden files and other kinds of file are left alone.

    Raises:
        UserError: no such folder, no photos in it, a photo that cannot be decoded, a caption that
            cannot be read or is empty, or an entry of captions.toml that belongs to no photo.
    """
    if not folder.is_dir():
        raise UserError(f"photos: {folder} is not a folder. Is the path right?")
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        raise UserError(
            f"photos: found 0 images in {folder} (looked for {' '.join(SUFFIXES)}). "
            "Is the path right?"
        )
    captions = _captions(folder, paths)
    photos = []
    for path in paths:
        width, height = _decode(path).size
        photos.append(Photo(path, captions.get(path.name), (height, width)))
    return photos


def square_photo(photo: Photo, resolution: int) -> SquarePhoto:
    """Scale the short side to the resolution (Lanczos) and cut the middle square out."""
    image = _decode(photo.path)
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - resolution) // 2, (width - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels_hwc = torch.from_numpy(np.array(image, dtype=np.float32) / 127.5 - 1.0)
    return SquarePhoto(pixels_hwc.permute(2, 0, 1).contiguous(), (top, left))


def _decode(path: Path) -> Image.Image:
    """Return the photo upright, in RGB, transparency laid on white."""
    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            elif image.mode.startswith("I;16"):
                # Pillow clips 16-bit grey to 8 bits instead of scaling it.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Image.DecompressionBombError:
        raise UserError(f"photos: {path} has too many pixels; scale it down first") from None
    # Pillow's decoders raise these, by format, on broken data.
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(
            f"photos: {path} cannot be read as an image ({error}). Remove or replace it"
        ) from None


def _captions(folder: Path, paths: list[Path]) -> dict[str, str]:
    names = {path.name for path in paths}
    captions = _captions_from_toml(folder / CAPTIONS_FILE, names)
    for path in paths:
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            continue
        if path.name in captions:
            raise UserError(
                f"photos: {path.name} has a caption in {beside.name} and one in {CAPTIONS_FILE}; "
                "keep one"
            )
        captions[path.name] = _read_text(beside).strip()
    for name, caption in captions.items():
        if not caption:
            raise UserError(f"photos: the caption of {name} is empty; write it or remove it")
    return captions


def _captions_from_toml(file: Path, names: set[str]) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        table = tomllib.loads(_read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"photos: {file} is not a TOML file ({error})") from None
    captions = {}
    for name, caption in table.items():
        if isinstance(caption, dict):
            raise UserError(f'photos: {file}: put file names in quotes, such as "{name}.jpg"')
        if name not in names:
            raise UserError(f"photos: {file} has a caption for {name!r}, which is not a photo here")
        if not isinstance(caption, str):
            raise UserError(f"photos: {file}: the caption of {name!r} must be text in quotes")
        captions[name] = caption.strip()
    return captions


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"photos: {file} cannot be read as text ({error})") from None
