"""The styles of the mini world: what is done to a drawn scene to make it look photographed,
painted or sketched.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fastppt.mini.painter import Generator, Picture, noise

NUM_STROKES = 420
"""Brush strokes of a painting, less those that would fall on the object."""


def photograph(picture: Picture, rng: Generator) -> Picture:
    """Light a picture unevenly, its corners a little darker."""
    size = picture.shape[0]
    rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    vignette = 1.04 - 0.1 * (rows**2 + columns**2)
    sun = 1 + 0.08 * (rng.uniform(-1, 1) * columns + rng.uniform(-1, 0) * rows)
    photo: Picture = picture * (vignette * sun)[..., None]
    return photo


def paint(picture: Picture, roles: NDArray[np.uint8], rng: Generator) -> Picture:
    """Paint a picture with strokes: long and broad in the place, fine streaks on the object.

    Args:
        picture: [S, S, 3].
        roles: Of its pixels, [S, S]; what is not 0 is the object.
        rng: Decides the strokes.
    """
    gray = picture.mean(axis=-1, keepdims=True)
    vivid: Picture = np.clip(gray + 1.25 * (picture - gray), 0, 1)
    strokes = _brush(vivid, roles, rng)
    streaks = 1 + 0.16 * (noise(rng, picture.shape[0], 40) - 0.5)
    return np.where((roles > 0)[..., None], np.clip(vivid * streaks, 0, 1), strokes)


def sketch(picture: Picture, roles: NDArray[np.uint8], rng: Generator) -> Picture:
    """Draw pencil lines where the light changes, faint crayon between, hatching where it is dark.

    Args:
        picture: [S, S, 3].
        roles: Of its pixels, [S, S]; what is not 0 is the object.
        rng: Decides the paper.
    """
    size = picture.shape[0]
    gray = picture @ np.array([0.3, 0.59, 0.11], dtype=np.float32)
    steps = np.abs(gray - np.roll(gray, 2, axis=1)) + np.abs(gray - np.roll(gray, 2, axis=0))
    lines = np.clip(3.0 * steps - 0.12, 0, 0.85)[..., None]
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    hatch = (np.sin(2 * math.pi * 26 * (rows + columns)) > 0.3) & (gray < 0.5)
    paper = np.array([0.95, 0.94, 0.9], dtype=np.float32) * (0.97 + 0.06 * noise(rng, size, 32))
    crayon = np.where((roles > 0)[..., None], 0.68, 0.42)
    colored = paper * (1 - crayon) + picture * crayon
    drawn: Picture = colored * (1 - 0.14 * hatch[..., None]) * (1 - lines) + 0.2 * lines
    return drawn


def _brush(picture: Picture, roles: NDArray[np.uint8], rng: Generator) -> Picture:
    """A blurred picture under strokes of its own colours; none starts on the object."""
    size = picture.shape[0]
    image = Image.fromarray((picture * 255).astype(np.uint8))
    ground = image.filter(ImageFilter.GaussianBlur(size / 64))
    draw, pixels = ImageDraw.Draw(ground), np.asarray(image).astype(int)
    starts = (rng.random((NUM_STROKES, 2)) * size).astype(int).tolist()
    angles = rng.normal(0.6, 0.35, NUM_STROKES).tolist()
    shades = rng.integers(-24, 25, NUM_STROKES).tolist()
    reach, width = 0.035 * size, max(1, round(0.022 * size))
    for (column, row), angle, shade in zip(starts, angles, shades, strict=True):
        if roles[row, column]:
            continue
        red, green, blue = np.clip(pixels[row, column] + shade, 0, 255).tolist()
        across, down = reach * math.cos(angle), reach * math.sin(angle)
        stroke = (column - across, row - down, column + across, row + down)
        draw.line(stroke, fill=(red, green, blue), width=width)
    return np.asarray(ground, dtype=np.float32) / np.float32(255)
