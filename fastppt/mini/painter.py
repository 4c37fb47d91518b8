"""What the places of the mini world are painted with.

Lengths are fractions of the picture's side, and random textures are drawn on grids of fixed size,
so what one seed paints looks the same at every size.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Picture = NDArray[np.float32]
"""Colours [H, W, 3] in 0 to 1."""

Color = tuple[int, int, int]
"""RGB, 8 bits."""

Point = tuple[float, float]
"""x from the left and y from the top, as fractions of the picture's side."""

Generator = np.random.Generator


def noise(rng: Generator, size: int, cells: int) -> Picture:
    """Smooth noise [size, size, 1] in 0 to 1: a grid of ``cells`` a side, interpolated."""
    grid = rng.random((cells, cells), dtype=np.float32)
    image = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(image, dtype=np.float32), 0, 1)[..., None]


def gradient(size: int, *stops: tuple[float, Color]) -> Picture:
    """A picture that changes from top to bottom through (height 0 to 1, colour) stops."""
    heights = np.linspace(0, 1, size)
    channels = [
        np.interp(heights, [at for at, _ in stops], [color[channel] / 255 for _, color in stops])
        for channel in range(3)
    ]
    column = np.stack(channels, axis=-1).astype(np.float32)
    return np.repeat(column[:, None, :], size, axis=1)


def shade(rng: Generator, color: Color, spread: int) -> Color:
    """The colour, lighter or darker by up to ``spread`` of 255."""
    change = int(rng.integers(-spread, spread + 1))
    red, green, blue = (min(255, max(0, channel + change)) for channel in color)
    return red, green, blue


def ridge(rng: Generator, height: float, swing: float, waves: float) -> list[Point]:
    """The outline of hills from the left edge to the right one, closed along the bottom."""
    phase, phase_2 = rng.uniform(0, 2 * math.pi, 2)
    points = [
        (
            x,
            height
            + swing * math.sin(2 * math.pi * waves * x + phase)
            + 0.4 * swing * math.sin(4.7 * math.pi * waves * x + phase_2),
        )
        for x in np.linspace(0, 1, 41).tolist()
    ]
    return [*points, (1, 1), (0, 1)]


class Painter:
    """Draws over a picture; all lengths are fractions of its side."""

    def __init__(self, picture: Picture) -> None:
        self._size = picture.shape[0]
        self._image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
        self._draw = ImageDraw.Draw(self._image)

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        """Fill a polygon."""
        self._draw.polygon(self._scaled(points), fill=color)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        """Fill a rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)

    def disc(self, x: float, y: float, width: float, height: float, color: Color) -> None:
        """Fill an ellipse about (x, y) of the half axes ``width`` and ``height``."""
        corners = self._scaled([(x - width, y - height), (x + width, y + height)])
        self._draw.ellipse(corners, fill=color)

    def line(self, points: Sequence[Point], width: float, color: Color) -> None:
        """Draw a line through points."""
        pixels = max(1, round(width * self._size))
        self._draw.line(self._scaled(points), fill=color, width=pixels, joint="curve")

    def picture(self) -> Picture:
        """Return what has been painted."""
        return np.asarray(self._image, dtype=np.float32) / np.float32(255)

    def _scaled(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self._size, y * self._size) for x, y in points]
