"""From a folder of photos, with or without captions, to pixels of the sizes that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastppt.data.captions import read_captions
from fastppt.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# What the files may be, whatever their names: no other decoder is let near them. Pillow opens as an
# MPO a JPEG with more pictures in it, such as the depth map of a phone; its first is the photo.
FORMATS = ("JPEG", "PNG", "WEBP")

MAX_PIXELS = 200_000_000
"""The largest photos that cameras make (16320x12240); 600 MB in memory as RGB."""

# Chunks of a PNG that can hold an orientation. Where none is, the file need not be decoded for it.
PNG_ORIENTATIONS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
ORIENTATION = 0x0112
# The orientations in which height and width change places.
LYING = (5, 6, 7, 8)


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


def find_photos(folder: Path, captions: Path | None = None) -> list[Photo]:
    """Return the folder's photos in the order of their names; of each, its header is read.

    Hidden files and other kinds of file are left alone. A photo that is broken behind its header is
    found out by `crop_photo`.

    Args:
        folder: Of the photos.
        captions: Where their captions are, as `read_captions` takes it; None is the same folder.

    Raises:
        UserError: no such folder, no photos in it, a file that is no photo or has too many pixels,
            or captions that `read_captions` refuses.
    """
    paths = list_pictures(folder, "photos")
    captioned = read_captions(paths, captions)
    photos = []
    for path in paths:
        caption, file = captioned.get(path.name, (None, None))
        photos.append(Photo(path, caption, file, upright_size(path)))
    return photos


def list_pictures(folder: Path, key: str) -> list[Path]:
    """Return the image files of a folder in the order of their names; none is opened.

    Args:
        folder: Where they are.
        key: What a message calls it.

    Raises:
        UserError: no such folder, or no image files in it.
    """
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is not a folder. Is the path right?")
    try:
        files = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be read ({error.strerror})") from None
    paths = sorted(
        path
        for path in files
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        raise UserError(
            f"{key}: found 0 images in {folder} (looked for {' '.join(SUFFIXES)}). "
            "Is the path right?"
        )
    return paths


def cover_scale(photo: Photo, size: tuple[int, int]) -> float:
    """Return the factor by which a photo just covers (height, width) pixels."""
    return max(wanted / given for wanted, given in zip(size, photo.size, strict=True))


def crop_photo(photo: Photo, size: tuple[int, int]) -> CroppedPhoto:
    """Scale a photo until it just covers (height, width) pixels (Lanczos) and cut the middle out.

    The corner of the cut is counted in the scaled photo, as diffusers'
    training scripts count it.

    Raises:
        UserError: the photo cannot be decoded, is too long and thin, or has changed since it was
            found.
    """
    image = _decode(photo.path)
    if (image.height, image.width) != photo.size:
        raise UserError(f"photos: {photo.path} has changed since the run began; start it again")
    height, width, top, left = _placement(photo, size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + size[1], top + size[0]))
    pixels_hwc = torch.from_numpy(np.array(image, dtype=np.float32) / 127.5 - 1.0)
    return CroppedPhoto(pixels_hwc.permute(2, 0, 1).contiguous(), (top, left))


def outline_crop(photo: Photo, size: tuple[int, int]) -> CroppedPhoto:
    """Return what `crop_photo` does without decoding the photo: its pixels are on the meta device.

    Raises:
        UserError: as `crop_photo`, but for what only decoding finds.
    """
    *_, top, left = _placement(photo, size)
    return CroppedPhoto(torch.empty(3, *size, device="meta"), (top, left))


def _placement(photo: Photo, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return height and width of the scaled photo, and top and left of the cut in it."""
    scale = cover_scale(photo, size)
    height, width = (
        max(wanted, round(given * scale)) for wanted, given in zip(size, photo.size, strict=True)
    )
    if height * width > MAX_PIXELS:
        raise UserError(
            f"photos: {photo.path} is {photo.size[1]}x{photo.size[0]} pixels, too long and thin to "
            f"cover {size[1]}x{size[0]}; crop it first"
        )
    return height, width, (height - size[0]) // 2, (width - size[1]) // 2


def upright_size(path: Path) -> tuple[int, int]:
    """Return (height, width) in pixels of a photo as it is looked at, without decoding it.

    Raises:
        UserError: it is no photo, or has too many pixels.
    """
    with _opened(path) as image:
        width, height = image.size
        content = path.read_bytes() if image.format == "PNG" else b""
        is_told = image.format != "PNG" or any(mark in content for mark in PNG_ORIENTATIONS)
        lies = is_told and image.getexif().get(ORIENTATION) in LYING
    return (width, height) if lies else (height, width)


def _decode(path: Path) -> Image.Image:
    """Return the photo upright, in RGB, transparency laid on white."""
    with _opened(path) as opened:
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


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a photo of one of `FORMATS` and of at most `MAX_PIXELS`; its header is read.

    Raises:
        UserError: it is none, or what is done with it inside fails.
    """
    try:
        with _without_pixel_limit():
            image = Image.open(path, formats=FORMATS)
        with image:
            _check_header(path, image)
            yield image
    except (UserError, MemoryError):
        raise
    # Of broken bytes Pillow's decoders raise anything: struct.error, TypeError, KeyError, ...
    except Exception as error:
        raise UserError(
            f"photos: {path} cannot be read as an image ({error}). Remove or replace it"
        ) from None


def _check_header(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"photos: {path} has {width}x{height} pixels, which are too many pixels "
            f"(at most {MAX_PIXELS:,}); scale it down first"
        )
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise UserError(f"photos: {path} is an animation; save one picture of it as a photo")


@contextmanager
def _without_pixel_limit() -> Iterator[None]:
    """Leave the limit of pixels to us: Pillow's own is a warning below, and lower than, ours."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
