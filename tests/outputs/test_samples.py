"""A grid shows its pictures, in order, with room for their prompts."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fastppt.outputs.samples import MARGIN, MIN_CELL, write_grid


def test_grid_holds_every_picture_and_caption(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new("RGB", (64, 64), colour) for colour in colours]
    path = tmp_path / "samples" / "step-000000.png"
    write_grid(path, images, ["one", "two", "a long prompt " * 20])
    grid = Image.open(path)
    cell = MIN_CELL + MARGIN
    for column, colour in enumerate(colours):
        assert grid.getpixel((MARGIN + column * cell + 5, MARGIN + 5)) == colour
        below = grid.crop((column * cell, MARGIN + MIN_CELL + 1, (column + 1) * cell, grid.height))
        assert min(below.convert("L").get_flattened_data()) < 128, "no text"


def test_large_pictures_keep_their_pixels(tmp_path: Path) -> None:
    write_grid(tmp_path / "a.png", [Image.new("RGB", (300, 300), "red")] * 2, ["a", "b"])
    assert Image.open(tmp_path / "a.png").width == 2 * 300 + 3 * MARGIN
