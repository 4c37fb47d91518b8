"""The places of the mini world, painted with numpy and Pillow."""

import math
from collections.abc import Callable

import numpy as np

from fastppt.mini.painter import Generator, Painter, Picture, Point, gradient, noise, ridge, shade


def _snow(rng: Generator, size: int) -> Picture:
    sky = gradient(size, (0, (140, 170, 205)), (0.5, (205, 220, 235)))
    painter = Painter(sky + 0.08 * (noise(rng, size, 6) - 0.5))
    painter.polygon(ridge(rng, 0.42, 0.07, rng.uniform(1, 2)), (176, 192, 214))
    for _ in range(int(rng.integers(5, 9))):
        x, foot, height = rng.uniform(0, 1), rng.uniform(0.44, 0.58), rng.uniform(0.12, 0.3)
        _paint_fir_(painter, rng, x, foot, height)
    painter.polygon(ridge(rng, 0.58, 0.03, rng.uniform(0.6, 1.3)), (232, 238, 247))
    painter.polygon(ridge(rng, 0.76, 0.03, rng.uniform(0.6, 1.3)), (246, 249, 253))
    for x, y in rng.random((34, 2)).tolist():
        painter.disc(x, y, 0.011, 0.011, (255, 255, 255))
    return painter.picture()


def _paint_fir_(painter: Painter, rng: Generator, x: float, foot: float, height: float) -> None:
    """Three tiers of green, snow on each."""
    for level in range(3):
        top = foot - height * (1 - 0.22 * level)
        half = height * (0.16 + 0.09 * level)
        green, bottom = shade(rng, (54, 88, 84), 14), top + 0.45 * height
        painter.polygon([(x, top), (x + half, bottom), (x - half, bottom)], green)
        right = (x + 0.4 * half, top + 0.16 * height)
        left = (x - 0.5 * half, top + 0.2 * height)
        painter.polygon([(x, top), right, left], (236, 242, 250))


def _beach(rng: Generator, size: int) -> Picture:
    sky = ((0, (96, 178, 232)), (0.38, (190, 226, 242)))
    sea = ((0.381, (18, 112, 168)), (0.58, (72, 188, 196)))
    sand = ((0.6, (240, 222, 172)), (1, (222, 192, 128)))
    painter = Painter(gradient(size, *sky, *sea, *sand) + 0.05 * (noise(rng, size, 20) - 0.5))
    painter.disc(rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2), 0.07, 0.07, (255, 240, 170))
    for _ in range(9):
        x, y, half = rng.uniform(0, 1), rng.uniform(0.41, 0.55), rng.uniform(0.04, 0.12)
        painter.line([(x - half, y), (x, y - 0.008), (x + half, y)], 0.012, (168, 222, 230))
    phase = 3 * rng.uniform()
    steps = np.linspace(0, 1, 25).tolist()
    foam = [(x, 0.595 + 0.012 * math.sin(14 * x + phase)) for x in steps]
    painter.line(foam, 0.022, (250, 250, 246))
    _paint_palm_(painter, rng)
    for _ in range(26):
        x, y = rng.uniform((0, 0.64), (1, 1)).tolist()
        painter.disc(x, y, 0.008, 0.006, shade(rng, (202, 168, 110), 20))
    return painter.picture()


def _paint_palm_(painter: Painter, rng: Generator) -> None:
    x, lean, side = rng.uniform(0.05, 0.95), rng.uniform(-0.1, 0.1), rng.uniform(0.34, 0.5)
    crown = (x + lean, side - 0.14)
    painter.line([(x, 0.72), (x + lean / 2, 0.5), crown], 0.03, (134, 96, 58))
    for angle in np.radians(np.linspace(10, 350, 8)).tolist():
        tip = (crown[0] + 0.2 * math.cos(angle), crown[1] - 0.1 * math.sin(angle) + 0.05)
        bend = ((crown[0] + tip[0]) / 2, min(crown[1], tip[1]) - 0.03)
        painter.line([crown, bend, tip], 0.026, shade(rng, (44, 122, 66), 18))


def _jungle(rng: Generator, size: int) -> Picture:
    depths = gradient(size, (0, (30, 74, 42)), (1, (16, 44, 26)))
    painter = Painter(depths + 0.1 * (noise(rng, size, 8) - 0.5))
    for green in ((24, 84, 44), (38, 116, 52), (66, 148, 60)):
        for _ in range(22):
            x, y = rng.uniform(-0.05, 1.05, 2).tolist()
            angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0.12, 0.24)
            along = (math.cos(angle) * length, math.sin(angle) * length)
            painter.polygon(_leaf(x, y, along), shade(rng, green, 20))
            painter.line([(x, y), (x + along[0], y + along[1])], 0.006, (20, 66, 36))
    for _ in range(3):
        x, swing = rng.uniform(0, 1), rng.uniform(-0.1, 0.1)
        painter.line([(x, 0), (x + swing, 0.3), (x, 0.65)], 0.014, (92, 88, 40))
    painter.polygon(ridge(rng, 0.86, 0.02, 1), (52, 60, 30))
    return painter.picture()


def _leaf(x: float, y: float, along: Point) -> list[Point]:
    """A rhombus from (x, y) along a vector, half as broad as it is long."""
    across = (-along[1] * 0.24, along[0] * 0.24)
    return [
        (x, y),
        (x + along[0] / 2 + across[0], y + along[1] / 2 + across[1]),
        (x + along[0], y + along[1]),
        (x + along[0] / 2 - across[0], y + along[1] / 2 - across[1]),
    ]


def _night_sky(rng: Generator, size: int) -> Picture:
    sky = gradient(size, (0, (8, 10, 38)), (0.6, (32, 34, 92)), (0.85, (84, 62, 122)))
    cloud = noise(rng, size, 5) * noise(rng, size, 9)
    painter = Painter(sky + cloud * np.array([0.10, 0.08, 0.22], dtype=np.float32))
    for x, y in rng.uniform((0, 0), (1, 0.75), (46, 2)).tolist():
        radius = rng.uniform(0.004, 0.011)
        painter.disc(x, y, radius, radius, shade(rng, (236, 236, 220), 19))
    x, y = rng.uniform((0.1, 0.08), (0.9, 0.24)).tolist()
    painter.disc(x, y, 0.085, 0.085, (246, 240, 206))
    painter.disc(x + 0.03, y - 0.02, 0.016, 0.016, (222, 214, 178))
    painter.disc(x - 0.025, y + 0.03, 0.02, 0.02, (222, 214, 178))
    painter.polygon(ridge(rng, 0.78, 0.05, rng.uniform(0.8, 1.6)), (22, 22, 48))
    painter.polygon(ridge(rng, 0.88, 0.03, rng.uniform(0.8, 1.6)), (12, 12, 28))
    return painter.picture()


def _brick_wall(rng: Generator, size: int) -> Picture:
    painter = Painter(np.full((size, size, 3), (0.72, 0.68, 0.62), dtype=np.float32))
    rows, columns = 9, 4
    shift = rng.uniform(0, 1)
    for row in range(rows):
        top = row * 0.8 / rows
        for column in range(-1, columns + 2):
            left = (column + (0.5 if row % 2 else 0) - shift) / columns
            right, bottom = left + 0.91 / columns, top + 0.66 / rows
            painter.box(left, top, right, bottom, shade(rng, (158, 72, 56), 22))
    painter.box(0, 0.8, 1, 1, (128, 126, 124))
    for x in np.arange(-rng.uniform(0, 0.3), 1.2, 0.3).tolist():
        painter.line([(x, 0.8), (x - 0.06, 1)], 0.012, (96, 94, 94))
    painter.line([(0, 0.805), (1, 0.805)], 0.016, (84, 82, 82))
    return painter.picture() * (0.94 + 0.12 * noise(rng, size, 14))


def _wooden_table(rng: Generator, size: int) -> Picture:
    painter = Painter(gradient(size, (0, (216, 204, 180)), (0.55, (196, 180, 154))))
    for x in np.arange(rng.uniform(0, 0.12), 1, 0.12).tolist():
        painter.line([(x, 0), (x, 0.55)], 0.03, (206, 190, 162))
    left, width = rng.uniform(0.02, 0.6), rng.uniform(0.24, 0.34)
    _paint_landscape_(painter, left, left + width, left + width / 2)
    for row in range(5):
        top = 0.54 + 0.095 * row
        painter.box(0, top, 1, top + 0.1, shade(rng, (150, 96, 54), 16))
        for _ in range(3):
            y, x = top + rng.uniform(0.02, 0.08), rng.uniform(-0.2, 0.8)
            grain = [(x, y), (x + 0.2, y + 0.008), (x + 0.45, y)]
            painter.line(grain, 0.008, shade(rng, (116, 70, 38), 10))
        painter.line([(0, top), (1, top)], 0.012, (84, 50, 28))
    return painter.picture()


def _paint_landscape_(painter: Painter, left: float, right: float, middle: float) -> None:
    """A framed picture of a hill under the sky, on the wall."""
    painter.box(left, 0.05, right, 0.36, (96, 70, 50))
    inner_left, inner_right = left + 0.03, right - 0.03
    painter.box(inner_left, 0.08, inner_right, 0.33, (150, 186, 200))
    hill = [(inner_left, 0.33), (inner_left, 0.26), (middle, 0.18), (inner_right, 0.33)]
    painter.polygon(hill, (98, 134, 92))


def _grass(rng: Generator, size: int) -> Picture:
    painter = Painter(gradient(size, (0, (104, 172, 236)), (0.45, (196, 224, 244))))
    for _ in range(3):
        x, y = rng.uniform((0, 0.06), (1, 0.26)).tolist()
        for shift in (-0.08, 0, 0.08):
            painter.disc(x + shift, y - 0.02 * (shift == 0), 0.075, 0.04, (248, 250, 252))
    painter.polygon(ridge(rng, 0.45, 0.04, rng.uniform(0.7, 1.5)), (112, 168, 92))
    painter.polygon(ridge(rng, 0.55, 0.03, rng.uniform(0.7, 1.5)), (92, 172, 62))
    blades = rng.uniform((0, 0.55), (1, 1.02), (110, 2)).tolist()
    for x, y in sorted(blades, key=lambda foot: foot[1]):
        tip = (x + rng.uniform(-0.02, 0.02), y - 0.065)
        painter.line([(x, y), tip], 0.012, shade(rng, (70, 148, 50), 30))
    for x, y in rng.uniform((0, 0.62), (1, 1), (9, 2)).tolist():
        petals = ((246, 246, 240), (250, 214, 70), (236, 120, 150))[int(rng.integers(3))]
        painter.disc(x, y, 0.017, 0.017, petals)
        painter.disc(x, y, 0.007, 0.007, (222, 150, 40))
    return painter.picture()


def _desert(rng: Generator, size: int) -> Picture:
    sky = gradient(size, (0, (242, 176, 108)), (0.5, (252, 222, 164)))
    painter = Painter(sky + 0.05 * (noise(rng, size, 5) - 0.5))
    painter.disc(rng.uniform(0.12, 0.88), rng.uniform(0.12, 0.26), 0.085, 0.085, (255, 246, 206))
    for height, sand in ((0.46, (206, 140, 84)), (0.6, (222, 160, 94)), (0.76, (236, 180, 112))):
        dune = ridge(rng, height, 0.05, rng.uniform(0.5, 1.1))
        painter.polygon(dune, sand)
        lee = [(x, y + 0.02) for x, y in dune[:-2]]
        painter.line(lee, 0.022, shade(rng, (176, 112, 62), 8))
    for _ in range(int(rng.integers(1, 4))):
        x, foot, height = rng.uniform(0.04, 0.96), rng.uniform(0.55, 0.72), rng.uniform(0.18, 0.3)
        green = shade(rng, (62, 116, 70), 14)
        painter.line([(x, foot), (x, foot - height)], 0.045, green)
        for side, low, bend, high in ((x + 0.07, 0.4, 0.45, 0.8), (x - 0.065, 0.3, 0.35, 0.65)):
            arm = [
                (x, foot - low * height),
                (side, foot - bend * height),
                (side, foot - high * height),
            ]
            painter.line(arm, 0.03, green)
    return painter.picture() * (0.96 + 0.08 * noise(rng, size, 24))


def _city(rng: Generator, size: int) -> Picture:
    painter = Painter(gradient(size, (0, (150, 162, 182)), (0.7, (222, 208, 196))))
    for row, (foot, gray) in enumerate(((0.7, (112, 120, 140)), (0.74, (74, 78, 96)))):
        left = rng.uniform(-0.1, 0)
        while left < 1:
            width, top = rng.uniform(0.13, 0.24), rng.uniform(0.06, 0.34) + 0.12 * row
            painter.box(left, top, left + width, foot, shade(rng, gray, 18))
            _paint_windows_(painter, rng, left, top, left + width, foot)
            left += width + rng.uniform(0, 0.02)
    painter.box(0, 0.74, 1, 0.8, (166, 162, 158))
    painter.box(0, 0.8, 1, 1, (70, 70, 76))
    for x in np.arange(-rng.uniform(0, 0.24), 1, 0.24).tolist():
        dash = [(x, 0.89), (x + 0.13, 0.89), (x + 0.125, 0.91), (x - 0.005, 0.91)]
        painter.polygon(dash, (232, 226, 200))
    return painter.picture()


def _paint_windows_(
    painter: Painter, rng: Generator, left: float, top: float, right: float, bottom: float
) -> None:
    """Rows of windows over the front of a house, some of them lit."""
    for y in np.arange(top + 0.03, bottom - 0.04, 0.065).tolist():
        for x in np.arange(left + 0.025, right - 0.03, 0.055).tolist():
            color = (252, 224, 130) if rng.random() < 0.45 else shade(rng, (52, 56, 74), 8)
            painter.box(x, y, x + 0.028, y + 0.036, color)


def _water(rng: Generator, size: int) -> Picture:
    deep = gradient(size, (0, (112, 214, 222)), (0.4, (28, 142, 178)), (1, (10, 66, 112)))
    painter = Painter(deep + 0.1 * (noise(rng, size, 7) - 0.5))
    for _ in range(4):
        x, width = rng.uniform(-0.1, 0.9), rng.uniform(0.04, 0.1)
        beam = [(x, 0), (x + width, 0), (x + 2 * width + 0.16, 0.62), (x + 0.16, 0.62)]
        painter.polygon(beam, shade(rng, (66, 178, 202), 8))
    painter.polygon(ridge(rng, 0.85, 0.025, rng.uniform(0.8, 1.5)), (170, 166, 124))
    for _ in range(int(rng.integers(5, 9))):
        x, foot, height = rng.uniform(0, 1), rng.uniform(0.84, 1), rng.uniform(0.2, 0.42)
        phase, steps = rng.uniform(0, 6), np.linspace(0, 1, 9).tolist()
        stem = [(x + 0.025 * math.sin(phase + 9 * step), foot - height * step) for step in steps]
        painter.line(stem, 0.028, shade(rng, (30, 112, 72), 22))
    for _ in range(4):
        x, y = rng.uniform((0, 0.88), (1, 1)).tolist()
        painter.disc(x, y, 0.05, 0.03, shade(rng, (112, 108, 104), 16))
    for x, y in rng.uniform((0, 0), (1, 0.8), (14, 2)).tolist():
        radius = rng.uniform(0.008, 0.022)
        painter.disc(x, y, radius, radius, (196, 238, 242))
        painter.disc(x + 0.004, y + 0.004, 0.6 * radius, 0.6 * radius, (92, 190, 208))
    return painter.picture()


CONTEXTS: dict[str, tuple[str, Callable[[Generator, int], Picture]]] = {
    "snow": ("in the snow", _snow),
    "beach": ("on the beach", _beach),
    "jungle": ("in the jungle", _jungle),
    "night sky": ("under the night sky", _night_sky),
    "brick wall": ("by a brick wall", _brick_wall),
    "wooden table": ("on a wooden table", _wooden_table),
    "grass": ("on the grass", _grass),
    "desert": ("in the desert", _desert),
    "city": ("in the city", _city),
    "water": ("under water", _water),
}
"""The ten places: how a prompt says it, and what paints it."""
