"""Photos of every kind become upright RGB squares; broken ones are named."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from fastppt.data.photos import crop_photo, find_photos, outline_crop
from fastppt.errors import UserError


def striped(width: int, height: int) -> Image.Image:
    """Left third red, middle green, right third blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for channel, part in enumerate(np.array_split(np.arange(width), 3)):
        pixels[:, part, channel] = 255
    return Image.fromarray(pixels)


def colour(pixels: torch.Tensor, y: int, x: int) -> list[int]:
    return ((pixels[:, y, x] + 1) * 127.5).round().int().tolist()


def only_photo(folder: Path, resolution: int = 32) -> torch.Tensor:
    (photo,) = find_photos(folder)
    return crop_photo(photo, (resolution, resolution)).pixels


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.webp"])
def test_every_format_is_read(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (40, 40), (200, 30, 90)).save(tmp_path / name)
    pixels = only_photo(tmp_path)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert np.abs(np.array(colour(pixels, 16, 16)) - [200, 30, 90]).max() <= 3


@pytest.mark.parametrize(
    ("size", "crop"), [((96, 32), (0, 32)), ((32, 96), (32, 0)), ((32, 32), (0, 0))]
)
def test_short_side_is_scaled_and_the_middle_cut_out(
    tmp_path: Path, size: tuple[int, int], crop: tuple[int, int]
) -> None:
    striped(*size).save(tmp_path / "a.png")
    (photo,) = find_photos(tmp_path)
    square = crop_photo(photo, (32, 32))
    assert square.crop == crop
    assert photo.size == (size[1], size[0])
    assert square.pixels.shape == (3, 32, 32)
    if size[0] > size[1]:
        assert colour(square.pixels, 16, 16) == [0, 255, 0]


@pytest.mark.parametrize(
    ("size", "target", "scaled"),
    # (width, height) of the photo; (height, width) of what is cut out and of the scaled photo.
    [
        ((90, 30), (32, 48), (32, 96)),
        ((60, 30), (48, 32), (48, 96)),
        ((30, 60), (32, 48), (96, 48)),
        ((96, 64), (32, 48), (32, 48)),
    ],
)
def test_the_middle_of_any_shape_is_cut_out_of_the_covering_photo(
    tmp_path: Path, size: tuple[int, int], target: tuple[int, int], scaled: tuple[int, int]
) -> None:
    striped(*size).save(tmp_path / "a.png")
    (photo,) = find_photos(tmp_path)
    cropped = crop_photo(photo, target)
    assert cropped.pixels.shape == (3, *target) and cropped.size == target
    assert cropped.crop == ((scaled[0] - target[0]) // 2, (scaled[1] - target[1]) // 2)
    whole = Image.open(photo.path).resize(scaled[::-1], Image.Resampling.LANCZOS)
    top, left = cropped.crop
    cut = np.asarray(whole)[top : top + target[0], left : left + target[1]]
    wanted = torch.from_numpy(cut.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    assert torch.equal(cropped.pixels, wanted)


@pytest.mark.parametrize("size", [(33, 50), (100, 67), (31, 31), (2000, 3)])
def test_odd_sizes_give_the_whole_square(tmp_path: Path, size: tuple[int, int]) -> None:
    striped(*size).save(tmp_path / "a.png")
    assert only_photo(tmp_path).shape == (3, 32, 32)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees clockwise to view
    striped(64, 32).save(tmp_path / "a.jpg", exif=exif, quality=95)
    (photo,) = find_photos(tmp_path)
    assert photo.size == (64, 32)
    pixels = crop_photo(photo, (32, 32)).pixels
    # The left red stripe is at the top now; the crop keeps the middle, green.
    assert colour(pixels, 16, 1)[1] > 200 and colour(pixels, 16, 30)[1] > 200


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 16, 32))
    picture.save(tmp_path / "a.png")
    pixels = only_photo(tmp_path)
    assert colour(pixels, 16, 4) == [0, 0, 255]
    assert colour(pixels, 16, 28) == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    suffix = ".jpg" if mode == "CMYK" else ".png"
    Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode).save(tmp_path / f"a{suffix}")
    assert min(colour(only_photo(tmp_path), 16, 16)) >= 250


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 0x4000, np.uint16)).save(tmp_path / "a.png")
    assert colour(only_photo(tmp_path), 16, 16) == [64, 64, 64]


def test_captions_come_from_text_beside_or_from_one_file(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "c.webp"):
        striped(32, 32).save(tmp_path / name)
    (tmp_path / "a.txt").write_text(" a photo of {subject} outside \n")
    (tmp_path / "captions.toml").write_text('"c.webp" = "seen from above"')
    (tmp_path / "notes.md").write_text("left alone")
    (tmp_path / "._a.jpg").write_bytes(b"left alone by its name")
    photos = find_photos(tmp_path)
    assert [photo.path.name for photo in photos] == ["a.jpg", "b.png", "c.webp"]
    captions = [photo.caption for photo in photos]
    assert captions == ["a photo of {subject} outside", None, "seen from above"]
    files = [photo.caption_file for photo in photos]
    assert files == [tmp_path / "a.txt", None, tmp_path / "captions.toml"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.toml", b'"x.png" = "a"', "'x.png', which is not a photo"),
        ("captions.toml", b"= 1", "is not a TOML file"),
        ("captions.toml", b"a.png = 'x'", 'put file names in quotes, such as "a.jpg"'),
        ("captions.toml", b'"a.png" = 3', "must be text in quotes"),
        ("captions.toml", b'"a.png" = " "', r"caption of a\.png is empty"),
        ("a.txt", b"", r"caption of a\.png is empty"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read as text"),
    ],
)
def test_wrong_captions_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    striped(32, 32).save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_photos(tmp_path)


def test_two_captions_for_one_photo_are_refused(tmp_path: Path) -> None:
    striped(32, 32).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "captions.toml").write_text('"a.png" = "two"')
    with pytest.raises(UserError, match="keep one"):
        find_photos(tmp_path)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        find_photos(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"found 0 images in .*looked for \.jpg"):
        find_photos(tmp_path)


def broken_images() -> dict[str, bytes]:
    import io

    whole = {}
    for kind in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        striped(64, 64).save(buffer, format=kind)
        whole[kind] = buffer.getvalue()
    return {
        "empty.png": b"",
        "text.jpg": b"not an image",
        "cut.png": whole["PNG"][:60],
        "cut.jpg": whole["JPEG"][:200],
        "cut.webp": whole["WEBP"][:40],
        "header.png": whole["PNG"][:8] + b"\x00" * 50,
    }


@pytest.mark.parametrize("name", broken_images())
def test_corrupt_images_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(broken_images()[name])
    with pytest.raises(UserError, match="cannot be read as an image") as error:
        only_photo(tmp_path)
    assert name in str(error.value)


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends behind its header."""
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + fields
    return start + struct.pack(">I", zlib.crc32(fields)) + struct.pack(">I", 10) + b"IDAT"


def test_image_of_too_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(60_000, 60_000))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.png has 60000x60000 pixels.* too many pixels"):
        find_photos(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    (tmp_path / "a.png").write_bytes(png_header(16_320, 12_240))
    (photo,) = find_photos(tmp_path)
    assert photo.size == (12_240, 16_320)


def test_limits_of_the_library_for_others_stay_as_they_are(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    striped(32, 32).save(tmp_path / "a.png")
    only_photo(tmp_path)
    assert before == Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize(("kind", "suffix"), [("GIF", "png"), ("TIFF", "jpg"), ("BMP", "webp")])
def test_other_formats_are_refused_whatever_they_are_called(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    striped(32, 32).save(tmp_path / f"a.{suffix}", format=kind)
    with pytest.raises(UserError, match="cannot be read as an image"):
        find_photos(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_animations_are_refused(tmp_path: Path, suffix: str) -> None:
    frames = [striped(32, 32), striped(32, 32).rotate(90)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="is an animation"):
        find_photos(tmp_path)


def test_of_a_photo_with_more_pictures_the_first_is_taken(tmp_path: Path) -> None:
    """Phones add a depth map, or a preview."""
    more = [Image.new("RGB", (16, 16))]
    striped(64, 32).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=more)
    (photo,) = find_photos(tmp_path)
    assert photo.size == (32, 64)
    assert colour(crop_photo(photo, (32, 32)).pixels, 16, 16)[1] > 200


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_the_size_that_the_header_tells_is_that_of_the_decoded_photo(
    tmp_path: Path, suffix: str, turn: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    striped(64, 32).save(tmp_path / f"a.{suffix}", exif=exif)
    (photo,) = find_photos(tmp_path)
    assert photo.size == ((64, 32) if turn in (6, 8) else (32, 64))
    crop, outline = crop_photo(photo, (16, 24)), outline_crop(photo, (16, 24))
    assert crop.crop == outline.crop and crop.pixels.shape == outline.pixels.shape


def test_a_photo_that_changes_in_between_is_named(tmp_path: Path) -> None:
    striped(64, 32).save(tmp_path / "a.png")
    (photo,) = find_photos(tmp_path)
    striped(32, 64).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png has changed"):
        crop_photo(photo, (32, 32))


def test_a_photo_that_is_a_line_is_refused(tmp_path: Path) -> None:
    striped(1, 30_000).save(tmp_path / "a.png")
    (photo,) = find_photos(tmp_path)
    with pytest.raises(UserError, match="too long and thin"):
        crop_photo(photo, (1024, 1024))


ODD_NAMES = [
    "my dog (1).png",
    "-rf.png",
    "gr\u00fcn.png",
    "gru\u0308n.png",
    "line\nbreak.png",
    "\x1b[31mred.png",
    "x" * 251 + ".png",
    os.fsdecode(b"latin-\xe9.png"),
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_photos_of_any_name_are_read_and_named(tmp_path: Path, name: str) -> None:
    striped(32, 32).save(tmp_path / name)
    (photo,) = find_photos(tmp_path)
    assert photo.path.name == name
    (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(UserError) as error:
        find_photos(tmp_path)
    assert name in str(error.value)


def test_ten_thousand_photos_are_found_without_decoding_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    striped(32, 24).save(tmp_path / "0.png")
    for number in range(1, 10_000):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")

    def decoded(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImageFile, "load", decoded)
    photos = find_photos(tmp_path)
    assert len(photos) == 10_000 and {photo.size for photo in photos} == {(24, 32)}
