"""Five demo photos of one subject, a toy robot, drawn with Pillow in five places.

Lengths inside the drawings are fractions of the picture's side, or thousandths of the robot's own
square, so that the size of the photos can change without redrawing anything.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

PHOTO_SIZE = 320
"""Pixels a side: enough to look at, and five times the mini model's 64."""

CANVAS_SIZE = 3 * PHOTO_SIZE
"""Everything is drawn three times as large and scaled down, for smooth edges."""

ROBOT_SIZE = 1000
"""Pixels a side of the square the robot is drawn in."""

FEET_Y = 0.965
"""Where the middle of the feet is in the robot's square, as a fraction from the top."""

TEAL, CREAM, ORANGE, YELLOW = "#2a9d9c", "#f4e8cf", "#ee8434", "#ffd34e"
RED, STEEL, DARK, GLOW = "#d8344a", "#9aa5ad", "#26333f", "#8ff3ff"

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Pose:
    """How the robot stands in one photo.

    Attributes:
        size: Side of the robot's square, as a fraction of the picture's.
        x: Where the middle of the feet is, as a fraction of the width from the left.
        y: The same from the top.
        tilt: Degrees counter-clockwise.
        left_arm: Angle of the arm on the picture's left, in degrees: 0 hangs down, 90 points out,
            180 up.
        right_arm: The same on the right.
        gaze: Where the eyes look: -1 left, 0 ahead, 1 right.
    """

    size: float
    x: float
    y: float
    tilt: float
    left_arm: float
    right_arm: float
    gaze: float


def draw_demo_photos(directory: Path, seed: int = 0) -> list[Path]:
    """Draw the demo photos into a directory as ``robot-1.png`` to ``robot-5.png``.

    Args:
        directory: Made if missing; files of these names in it are overwritten.
        seed: Decides the texture of the places; the robot and its poses stay the same. The same
            seed gives the same pixels.

    Returns:
        The five paths: RGB images of `PHOTO_SIZE` pixels a side.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (draw_place, pose) in enumerate(SCENES, start=1):
        photo = draw_place(np.random.default_rng([seed, number]))
        place_robot_(photo, pose)
        path = directory / f"robot-{number}.png"
        photo.resize((PHOTO_SIZE, PHOTO_SIZE), Image.Resampling.LANCZOS).save(path)
        paths.append(path)
    return paths


# The robot


def place_robot_(photo: Image.Image, pose: Pose) -> None:
    """Paste the robot and its shadow into ``photo`` (in place)."""
    side = round(pose.size * CANVAS_SIZE)
    feet_x, feet_y = pose.x * CANVAS_SIZE, pose.y * CANVAS_SIZE
    shadow = Image.new("L", photo.size)
    left, right = feet_x - 0.30 * side, feet_x + 0.36 * side
    top, bottom = feet_y - 0.06 * side, feet_y + 0.05 * side
    ImageDraw.Draw(shadow).ellipse((left, top, right, bottom), fill=150)
    shadow = shadow.filter(ImageFilter.GaussianBlur(0.03 * side))
    photo.paste((25, 25, 40), mask=shadow)
    # A margin, so that no part is cut off where the tilt takes it out of the robot's square.
    margin = ROBOT_SIZE // 5
    robot = ImageOps.expand(draw_robot(pose), margin)
    center = (margin + 0.5 * ROBOT_SIZE, margin + FEET_Y * ROBOT_SIZE)
    robot = robot.rotate(pose.tilt, Image.Resampling.BICUBIC, center=center)
    scale = side / ROBOT_SIZE
    robot = robot.resize((round(1.4 * side), round(1.4 * side)), Image.Resampling.LANCZOS)
    corner = (round(feet_x - center[0] * scale), round(feet_y - center[1] * scale))
    photo.paste(robot, corner, robot)


def draw_robot(pose: Pose) -> Image.Image:
    """Draw the robot upright, on a transparent square of `ROBOT_SIZE` pixels."""
    robot = Image.new("RGBA", (ROBOT_SIZE, ROBOT_SIZE))
    draw = ImageDraw.Draw(robot)
    for side in (-1, 1):
        _draw_leg(draw, side)
        _draw_arm(draw, side, pose.left_arm if side < 0 else pose.right_arm)
    _draw_body(draw)
    _draw_head(draw, pose.gaze)
    return _shade(robot)


def _draw_leg(draw: ImageDraw.ImageDraw, side: int) -> None:
    x = 500 + 105 * side
    draw.rectangle((x - 38, 780, x + 38, 900), fill=STEEL)
    for y in (835, 865):
        draw.line((x - 38, y, x + 38, y), fill=DARK, width=7)
    draw.rounded_rectangle((x - 85, 888, x + 85, 975), 42, fill=ORANGE)
    draw.rounded_rectangle((x - 88, 950, x + 88, 978), 12, fill=DARK)


def _draw_arm(draw: ImageDraw.ImageDraw, side: int, angle: float) -> None:
    radians = math.radians(angle)
    step_x, step_y = side * math.sin(radians), math.cos(radians)
    shoulder_x, shoulder_y = 500 + 235 * side, 545

    def disc(distance: float, radius: float, color: str) -> None:
        x, y = shoulder_x + distance * step_x, shoulder_y + distance * step_y
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    # A hose of rings, a cuff, and a hand that is a ring with an opening.
    for ring in range(15):
        disc(10 * ring, 30, DARK if ring % 4 == 3 else STEEL)
    disc(163, 46, ORANGE)
    hand_x, hand_y = shoulder_x + 208 * step_x, shoulder_y + 208 * step_y
    outwards = math.degrees(math.atan2(step_y, step_x))
    box = (hand_x - 44, hand_y - 44, hand_x + 44, hand_y + 44)
    draw.arc(box, outwards + 38, outwards + 322, fill=TEAL, width=24)
    disc(0, 52, ORANGE)


def _draw_body(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((450, 420, 550, 480), fill=STEEL)
    draw.line((450, 448, 550, 448), fill=DARK, width=8)
    draw.rounded_rectangle((275, 462, 725, 810), 85, fill=TEAL)
    draw.rounded_rectangle((275, 690, 725, 810), 85, fill=CREAM, corners=(False, False, True, True))
    draw.rectangle((275, 678, 725, 696), fill=DARK)
    for index, color in enumerate((RED, YELLOW, TEAL)):
        draw.ellipse((392 + 80 * index, 728, 448 + 80 * index, 784), fill=DARK)
        draw.ellipse((398 + 80 * index, 732, 442 + 80 * index, 776), fill=color)
    # The badge: a red star on a yellow disc.
    draw.ellipse((412, 486, 588, 662), fill=CREAM)
    draw.ellipse((422, 496, 578, 652), fill=YELLOW)
    star = []
    for corner in range(10):
        radius, turn = (68, 29)[corner % 2], math.pi * corner / 5
        star.append((500 + radius * math.sin(turn), 576 - radius * math.cos(turn)))
    draw.polygon(star, fill=RED)


def _draw_head(draw: ImageDraw.ImageDraw, gaze: float) -> None:
    draw.line((500, 165, 500, 80), fill=STEEL, width=16)
    for y in (115, 138):
        draw.line((482, y, 518, y), fill=DARK, width=8)
    draw.ellipse((462, 22, 538, 98), fill=RED)
    draw.ellipse((476, 32, 502, 58), fill="#ff9aa6")
    for side in (-1, 1):
        ear = 500 + 222 * side
        draw.rounded_rectangle((ear - 34, 235, ear + 34, 355), 26, fill=ORANGE)
    draw.rounded_rectangle((290, 150, 710, 435), 115, fill=CREAM)
    draw.rounded_rectangle((335, 200, 665, 395), 85, fill=DARK)
    shift = 16 * gaze
    for side in (-1, 1):
        x = 500 + 78 * side + shift
        draw.ellipse((x - 46, 226, x + 46, 330), fill=GLOW)
        draw.ellipse((x - 26 + shift, 250, x + 26 + shift, 310), fill=DARK)
        draw.ellipse((x - 20 + shift, 252, x + 2 + shift, 274), fill="white")
        cheek = 500 + 128 * side + shift / 2
        draw.ellipse((cheek - 22, 338, cheek + 22, 366), fill="#e86a7c")
    draw.arc((448 + shift, 296, 552 + shift, 376), 25, 155, fill=GLOW, width=13)


def _shade(robot: Image.Image) -> Image.Image:
    """Light the robot from the upper left, by the slope of a blurred copy of its outline."""
    alpha = robot.getchannel("A")
    soft = np.asarray(alpha.filter(ImageFilter.GaussianBlur(28)), dtype=np.float32) / 255
    fine = np.asarray(robot.convert("L").filter(ImageFilter.GaussianBlur(4)), dtype=np.float32)
    slope = 60 * (np.gradient(soft, axis=0) + np.gradient(soft, axis=1))
    relief = 0.012 * (np.gradient(fine, axis=0) + np.gradient(fine, axis=1))
    light = np.clip(1 + 0.45 * np.clip(slope, -1, 1) + np.clip(relief, -0.1, 0.1), 0.5, 1.35)
    pixels = np.asarray(robot.convert("RGB"), dtype=np.float32) * light[..., None]
    lit = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    lit.putalpha(alpha)
    return lit


# The places


def _noise(rng: np.random.Generator, columns: int, rows: int) -> np.ndarray:
    """Return smooth noise of a canvas, [height, width], about -1 to 1, from a small random grid."""
    grid = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    size = (CANVAS_SIZE, CANVAS_SIZE)
    return np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC))


def _gradient(top: Color, bottom: Color) -> Image.Image:
    """Return a canvas that goes from one colour at the top to another at the bottom."""
    return Image.composite(
        Image.new("RGB", (CANVAS_SIZE, CANVAS_SIZE), bottom),
        Image.new("RGB", (CANVAS_SIZE, CANVAS_SIZE), top),
        Image.linear_gradient("L").resize((CANVAS_SIZE, CANVAS_SIZE)),
    )


def _texture_(photo: Image.Image, noise: np.ndarray, from_y: float, to_y: float = 1.0) -> None:
    """Add ``noise`` (in grey levels) to the rows from ``from_y`` to ``to_y`` of ``photo``."""
    first, last = round(from_y * CANVAS_SIZE), round(to_y * CANVAS_SIZE)
    pixels = np.asarray(photo, dtype=np.float32).copy()
    pixels[first:last] += noise[first:last, :, None]
    photo.paste(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))


def _below(photo: Image.Image, y: float, top: Color, bottom: Color) -> None:
    """Cover ``photo`` below ``y`` with a gradient."""
    first = round(y * CANVAS_SIZE)
    ground = _gradient(top, bottom).resize((CANVAS_SIZE, CANVAS_SIZE - first))
    photo.paste(ground, (0, first))


def _ellipse(draw: ImageDraw.ImageDraw, x: float, y: float, w: float, h: float, c: Color) -> None:
    """Draw a filled ellipse about (x, y) with half axes w and h, in fractions of the canvas."""
    box = ((x - w), (y - h), (x + w), (y + h))
    draw.ellipse([CANVAS_SIZE * edge for edge in box], fill=c)


def _draw_beach(rng: np.random.Generator) -> Image.Image:
    photo = _gradient((88, 170, 232), (226, 242, 250))
    draw = ImageDraw.Draw(photo)
    for _ in range(26):
        x, y = rng.choice([0.22, 0.8]) + rng.normal(0, 0.08), rng.normal(0.14, 0.02)
        width, height = rng.uniform((0.03, 0.02), (0.07, 0.035))
        _ellipse(draw, x, y, width, height, (250, 252, 255))
    photo = photo.filter(ImageFilter.GaussianBlur(7))
    _below(photo, 0.42, (28, 122, 168), (40, 190, 190))
    _texture_(photo, 16 * _noise(rng, 12, 110), 0.42, 0.64)
    _below(photo, 0.64, (236, 210, 158), (214, 178, 118))
    draw = ImageDraw.Draw(photo)
    for column in range(48):
        x = column / 47
        _ellipse(draw, x, 0.64 + 0.012 * math.sin(9 * x), 0.03, 0.012, (246, 250, 248))
    _texture_(photo, 9 * _noise(rng, 14, 22) + 13 * _noise(rng, 320, 320), 0.67)
    return photo


def _draw_snow(rng: np.random.Generator) -> Image.Image:
    photo = _gradient((140, 172, 208), (222, 232, 242))
    draw = ImageDraw.Draw(photo)
    for x in np.linspace(-0.02, 1.02, 13) + rng.uniform(-0.03, 0.03, 13):
        height, shade = rng.uniform(0.22, 0.42), int(rng.uniform(0, 30))
        for layer in range(4):
            top = 0.62 - height * (1 - 0.2 * layer)
            width, bottom = 0.025 + 0.014 * layer, top + 0.4 * height
            corners = [(x, top), (x - width, bottom), (x + width, bottom)]
            color = (44 + shade, 84 + shade, 86 + shade)
            draw.polygon([(CANVAS_SIZE * a, CANVAS_SIZE * b) for a, b in corners], fill=color)
    photo = photo.filter(ImageFilter.GaussianBlur(6))
    draw = ImageDraw.Draw(photo)
    _ellipse(draw, 0.15, 1.1, 0.7, 0.52, (226, 235, 246))
    _ellipse(draw, 0.85, 1.25, 0.9, 0.62, (244, 248, 253))
    _texture_(photo, 5 * _noise(rng, 8, 16) + 4 * _noise(rng, 300, 300), 0.6)
    draw = ImageDraw.Draw(photo)
    for x, y, radius in rng.uniform((0, 0, 0.002), (1, 1, 0.008), (130, 3)):
        _ellipse(draw, x, y, radius, radius, (255, 255, 255))
    return photo


def _draw_table(rng: np.random.Generator) -> Image.Image:
    photo = _gradient((120, 84, 70), (196, 148, 112))
    draw = ImageDraw.Draw(photo)
    for x, y, radius in rng.uniform((0, 0, 0.03), (1, 0.4, 0.08), (16, 3)):
        _ellipse(draw, x, y, radius, radius, (236, 188, 128))
    photo = photo.filter(ImageFilter.GaussianBlur(22))
    _below(photo, 0.5, (150, 92, 50), (186, 120, 68))
    # Grain: noise that is long in x; each board has its own.
    for board, y in enumerate((0.5, 0.57, 0.67, 0.81)):
        bottom = (0.57, 0.67, 0.81, 1.0)[board]
        grain = 15 * _noise(rng, 3, 150) + 9 * _noise(rng, 10, 300) + rng.uniform(-14, 14)
        _texture_(photo, grain, y, bottom)
        line = CANVAS_SIZE * bottom
        ImageDraw.Draw(photo).line((0, line, CANVAS_SIZE, line), fill=(84, 48, 26), width=6)
    return photo


def _draw_brick_wall(rng: np.random.Generator) -> Image.Image:
    photo = Image.new("RGB", (CANVAS_SIZE, CANVAS_SIZE), (188, 176, 164))
    draw = ImageDraw.Draw(photo)
    height, width, gap = 64, 152, 10
    for row in range(12):
        for column in range(8):
            x, y = column * width - (row % 2) * width // 2, row * height
            shade = rng.normal(0, 13)
            color = (int(164 + shade), int(80 + 0.7 * shade), int(62 + 0.6 * shade))
            draw.rounded_rectangle((x, y, x + width - gap, y + height - gap), 7, fill=color)
    _texture_(photo, 10 * _noise(rng, 60, 60) + 12 * _noise(rng, 320, 320), 0.0)
    _below(photo, 0.78, (112, 114, 120), (150, 150, 152))
    _texture_(photo, 6 * _noise(rng, 30, 30) + 12 * _noise(rng, 320, 320), 0.78)
    ImageDraw.Draw(photo).rectangle(
        (0, 0.77 * CANVAS_SIZE, CANVAS_SIZE, 0.79 * CANVAS_SIZE), fill=(84, 84, 90)
    )
    return photo


def _draw_grass(rng: np.random.Generator) -> Image.Image:
    photo = _gradient((150, 205, 240), (214, 236, 210))
    draw = ImageDraw.Draw(photo)
    for x, y, radius in rng.uniform((0, 0.22, 0.06), (1, 0.42, 0.12), (40, 3)):
        green = int(rng.uniform(105, 150))
        _ellipse(draw, x, y, radius, radius, (green - 50, green, 70))
    photo = photo.filter(ImageFilter.GaussianBlur(18))
    _below(photo, 0.46, (98, 160, 62), (52, 112, 38))
    draw = ImageDraw.Draw(photo)
    for y in np.sort(rng.uniform(0.46, 1.05, 2600)):
        x, lean, length = rng.uniform((0, -0.02, 0.5), (1, 0.02, 1.0))
        length *= 0.02 + 0.10 * (y - 0.46)
        shade = rng.normal(0, 24) - 30 * (y - 0.46)
        color = (int(92 + shade), int(162 + shade), int(58 + shade / 2))
        line = [CANVAS_SIZE * v for v in (x, y, x + lean, y - length)]
        draw.line(line, fill=color, width=round(2 + 6 * (y - 0.46)))
    for x, y in rng.uniform((0, 0.55), (1, 0.98), (26, 2)):
        size = 0.006 + 0.012 * (y - 0.5)
        petal: Color = (255, 250, 240) if rng.random() < 0.6 else (250, 170, 200)
        for turn in np.arange(5) * 0.4 * math.pi:
            dx, dy = 1.3 * size * math.cos(turn), 1.0 * size * math.sin(turn)
            _ellipse(draw, x + dx, y + dy, size, 0.8 * size, petal)
        _ellipse(draw, x, y, 0.8 * size, 0.7 * size, (250, 200, 60))
    return photo


SCENES: tuple[tuple[Callable[[np.random.Generator], Image.Image], Pose], ...] = (
    (_draw_beach, Pose(0.78, 0.47, 0.90, 5, 35, 150, 0.0)),
    (_draw_snow, Pose(0.62, 0.63, 0.86, -9, 120, 60, -1.0)),
    (_draw_table, Pose(0.70, 0.38, 0.84, 0, 20, 75, 1.0)),
    (_draw_brick_wall, Pose(0.84, 0.54, 0.95, -4, 145, 145, 0.3)),
    (_draw_grass, Pose(0.66, 0.42, 0.88, 14, 90, 30, 0.8)),
)
"""The five photos: a place, and how the robot stands in it."""
