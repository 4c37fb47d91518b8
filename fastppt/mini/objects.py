"""The objects of the mini world: where one stands, what it looks like, and how it is drawn."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fastppt.mini.painter import Generator, Picture, noise
from fastppt.mini.shapes import SHAPES, Role, accessory_parts

PATTERNS: tuple[str, ...] = ("stripes", "bands", "dots", "checks", "zigzag", "rings", "halves")
"""What covers a subject; objects of the world are plain."""

Shade = tuple[float, float, float]
"""RGB in 0 to 1."""


@dataclass(frozen=True)
class Pose:
    """Where and how an object stands.

    Attributes:
        size: Half the side of its square, as a fraction of the picture's side.
        x: Of the square's middle, as a fraction of the side from the left.
        y: The same from the top.
        tilt: Degrees counter-clockwise.
        mirrored: Left and right exchanged.
        stretch: The square is so many times as wide, and its height divided by as much.
    """

    size: float
    x: float
    y: float
    tilt: float
    mirrored: bool
    stretch: float


@dataclass(frozen=True)
class Look:
    """What an object looks like, apart from its shape.

    Attributes:
        body: Colour of the body.
        trim: Of its secondary parts.
        pattern: One of `PATTERNS` over the body, or None.
        pattern_color: Colour of the pattern.
        pattern_scale: How fine the pattern is: its repeats, or half of them, over half the object.
        pattern_angle: Degrees.
        accessory: One of `ACCESSORIES`, or None.
        accessory_color: Its colour.
    """

    body: Shade
    trim: Shade
    pattern: str | None = None
    pattern_color: Shade = (0, 0, 0)
    pattern_scale: float = 3.0
    pattern_angle: float = 0.0
    accessory: str | None = None
    accessory_color: Shade = (0, 0, 0)


@dataclass(frozen=True)
class Placed:
    """An object's parts where its pose puts them.

    Attributes:
        roles: The `Role` of each pixel, [S, S].
        own_x: Each pixel's x in the object's own square, -1 to 1 inside it, [S, S].
        own_y: The same for y.
    """

    roles: NDArray[np.uint8]
    own_x: Picture
    own_y: Picture


def place_object(noun: str, look: Look, pose: Pose, size: int) -> Placed:
    """Draw the parts of one of the `SHAPES` on ``size`` x ``size`` pixels."""
    shape = SHAPES[noun]
    parts = shape.parts
    if look.accessory is not None:
        parts += accessory_parts(look.accessory, shape)
    cosine, sine = math.cos(math.radians(pose.tilt)), math.sin(math.radians(pose.tilt))
    width = pose.size * pose.stretch * (-1 if pose.mirrored else 1) * size
    height = pose.size / pose.stretch * size
    center_x, center_y = pose.x * size, pose.y * size

    image = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(image)
    edge = max(1, round(size / 110))
    for part in parts:
        points = [
            (
                center_x + cosine * x * width + sine * y * height,
                center_y - sine * x * width + cosine * y * height,
            )
            for x, y in part.points
        ]
        draw.polygon(points, fill=int(part.role))
        draw.line([*points, points[0]], fill=int(Role.OUTLINE), width=edge, joint="curve")
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    away_x, away_y = columns - center_x, rows - center_y
    own_x = (cosine * away_x - sine * away_y) / width
    own_y = (sine * away_x + cosine * away_y) / height
    return Placed(np.asarray(image), own_x, own_y)


def paint_object(picture: Picture, placed: Placed, look: Look, rng: Generator) -> Picture:
    """Colour an object's parts, light them from above, and lay them over the picture."""
    red, green, blue = look.body
    table = np.zeros((len(Role), 3), dtype=np.float32)
    for role, color in (
        (Role.BODY, look.body),
        (Role.TRIM, look.trim),
        (Role.DARK, (0.19, 0.17, 0.18)),
        (Role.LIGHT, (0.93, 0.92, 0.84)),
        (Role.ACCESSORY, look.accessory_color),
        (Role.OUTLINE, (0.22 * red, 0.22 * green, 0.22 * blue)),
    ):
        table[role] = color
    roles = placed.roles
    colors = table[roles]
    if look.pattern is not None:
        covered = _pattern(look.pattern, look, placed.own_x, placed.own_y)
        colors[covered & (roles == Role.BODY)] = look.pattern_color
    # Light from above, whichever way the object is mirrored, and a little texture.
    texture = noise(rng, roles.shape[0], 16) - 0.5
    light = 1.06 - 0.16 * placed.own_y[..., None] + 0.16 * texture
    return np.where((roles == Role.NOTHING)[..., None], picture, np.clip(colors * light, 0, 1))


def cast_shadow(picture: Picture, pose: Pose) -> Picture:
    """Darken an ellipse where an object touches what it stands on."""
    size = picture.shape[0]
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    across = (columns - pose.x) / (0.9 * pose.size)
    down = (rows - pose.y - 0.96 * pose.size) / (0.2 * pose.size)
    shadow = np.clip(1.3 - across**2 - down**2, 0, 1)[..., None]
    shaded: Picture = picture * (1 - 0.4 * shadow)
    return shaded


def _pattern(pattern: str, look: Look, x: Picture, y: Picture) -> NDArray[np.bool_]:
    """Where a pattern covers, in the object's own square."""
    angle, scale = math.radians(look.pattern_angle), look.pattern_scale
    along = math.cos(angle) * x + math.sin(angle) * y
    across = -math.sin(angle) * x + math.cos(angle) * y
    covered: NDArray[np.bool_]
    match pattern:
        case "stripes":
            covered = np.sin(math.pi * scale * along) > 0
        case "bands":
            covered = np.sin(math.pi * scale * along) > 0.6
        case "dots":
            in_x, in_y = (along * scale) % 1 - 0.5, (across * scale) % 1 - 0.5
            covered = in_x**2 + in_y**2 < 0.1
        case "checks":
            covered = (np.floor(along * scale) + np.floor(across * scale)) % 2 == 0
        case "zigzag":
            wave = np.abs((across * scale) % 1 - 0.5)
            covered = (along * scale + 1.2 * wave) % 1 < 0.45
        case "rings":
            covered = np.sin(1.3 * math.pi * scale * np.sqrt(x**2 + y**2)) > 0
        case "halves":
            covered = along > 0
        case _:
            raise ValueError(f"no pattern {pattern!r}: there are {', '.join(PATTERNS)}")
    return covered
