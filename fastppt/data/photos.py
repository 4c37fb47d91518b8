"""From a folder of photos, with or without captions, to pixels of the sizes that are trained."""

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
        caption_file: The file that holds the caption, or None.
        size: (height, width) in pixels, after its EXIF orientation is applied.
    """

    path: Path
    caption: str | None
    caption_file: Path | None
    size: tuple[int, int]


@dataclass(frozen=True)
class CroppedPhoto:
    """A photo scaled and cropped to what is trained.

    Attributes:
        pixels: [3, H, W] float32 in [-1, 1].
        crop: (top, left) of what was cut out, in the scaled photo, in pixels.
    """

    pixels: Tensor
    crop: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]


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
        caption, file = captions.get(path.name, (None, None))
        photos.append(Photo(path, caption, file, (height, width)))
    return photos


def cover_scale(photo: Photo, size: tuple[int, int]) -> float:
    """Return the factor by which a photo just covers (height, width) pixels."""
    return max(wanted / given for wanted, given in zip(size, photo.size, strict=True))


def crop_photo(photo: Photo, size: tuple[int, int]) -> CroppedPhoto:
    """Scale a photo until it just covers (height, width) pixels (Lanczos) and cut the middle out.

    The corner of the cut is counted in the scaled photo, as diffusers'
    training scripts count it.
    """
    image = _decode(photo.path)
    scale = cover_scale(photo, size)
    height, width = (
        max(wanted, round(given * scale)) for wanted, given in zip(size, photo.size, strict=True)
    )
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    image = image.crop((left, top, left + size[1], top + size[0]))
    pixels_hwc = torch.from_numpy(np.array(image, dtype=np.float32) / 127.5 - 1.0)
    return CroppedPhoto(pixels_hwc.permute(2, 0, 1).contiguous(), (top, left))


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


def _captions(folder: Path, paths: list[Path]) -> dict[str, tuple[str, Path]]:
    """Return each caption and its file, by the photo's file name."""
    names = {path.name for path in paths}
    table = folder / CAPTIONS_FILE
    captions = {name: (text, table) for name, text in _captions_from_toml(table, names).items()}
    for path in paths:
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            continue
        if path.name in captions:
            raise UserError(
                f"photos: {path.name} has a caption in {beside.name} and one in {CAPTIONS_FILE}; "
                "keep one"
            )
        captions[path.name] = _read_text(beside).strip(), beside
    for name, (caption, _) in captions.items():
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
