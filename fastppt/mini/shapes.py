"""The nouns of the mini world as polygons, with the places where an accessory sits.

A shape lives in its own square: x from -1 (left) to 1 (right), y from -1 (top) to 1 (bottom, where
it stands). Later polygons lie over earlier ones. A polygon has a role, not a colour: what a role
looks like is decided by who draws it.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

Points = tuple[tuple[float, float], ...]


class Role(IntEnum):
    """What part of an object a pixel belongs to. `NOTHING` is what lies behind the object."""

    NOTHING = 0
    BODY = 1
    TRIM = 2
    DARK = 3
    LIGHT = 4
    ACCESSORY = 5
    OUTLINE = 6


@dataclass(frozen=True)
class Part:
    """One polygon of an object."""

    role: Role
    points: Points


@dataclass(frozen=True)
class Shape:
    """How a noun is drawn.

    Attributes:
        parts: From back to front.
        top: Where an accessory worn on top sits (its foot).
        side: Where an accessory held at the side starts.
        middle: The middle of the largest plain area, for one that is pinned on.
    """

    parts: tuple[Part, ...]
    top: tuple[float, float]
    side: tuple[float, float]
    middle: tuple[float, float]


def _polygon(role: Role, *points: tuple[float, float]) -> Part:
    return Part(role, points)


def _box(role: Role, left: float, top: float, right: float, bottom: float) -> Part:
    return Part(role, ((left, top), (right, top), (right, bottom), (left, bottom)))


def _arc(
    x: float, y: float, width: float, height: float, start: float = 0, end: float = 360
) -> list[tuple[float, float]]:
    """Points of an ellipse's edge between two angles, in degrees clockwise from the right."""
    count = max(6, round(abs(end - start) / 12))
    angles = [math.radians(start + (end - start) * step / count) for step in range(count + 1)]
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


def _disc(role: Role, x: float, y: float, width: float, height: float | None = None) -> Part:
    """An ellipse of the half axes ``width`` and ``height`` (a circle without the latter)."""
    return Part(role, tuple(_arc(x, y, width, width if height is None else height)))


def _bar(role: Role, start: tuple[float, float], end: tuple[float, float], width: float) -> Part:
    """A line of a width."""
    length = math.dist(start, end)
    across = ((start[1] - end[1]) / length * width / 2, (end[0] - start[0]) / length * width / 2)
    return _polygon(
        role,
        (start[0] + across[0], start[1] + across[1]),
        (end[0] + across[0], end[1] + across[1]),
        (end[0] - across[0], end[1] - across[1]),
        (start[0] - across[0], start[1] - across[1]),
    )


def _star(role: Role, x: float, y: float, radius: float, inner: float = 0.45) -> Part:
    """A star of five points."""
    points = []
    for corner in range(10):
        angle = math.radians(-90 + 36 * corner)
        reach = radius if corner % 2 == 0 else radius * inner
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return Part(role, tuple(points))


BODY, TRIM, DARK, LIGHT, ACCESSORY = (
    Role.BODY,
    Role.TRIM,
    Role.DARK,
    Role.LIGHT,
    Role.ACCESSORY,
)

SHAPES: dict[str, Shape] = {
    "robot": Shape(
        (
            _box(TRIM, -0.42, 0.55, -0.12, 1.0),
            _box(TRIM, 0.12, 0.55, 0.42, 1.0),
            _bar(TRIM, (-0.5, -0.1), (-0.85, 0.4), 0.22),
            _bar(TRIM, (0.5, -0.1), (0.85, 0.4), 0.22),
            _box(BODY, -0.56, -0.22, 0.56, 0.62),
            _box(BODY, -0.44, -0.88, 0.44, -0.26),
            _disc(LIGHT, -0.2, -0.6, 0.14),
            _disc(LIGHT, 0.2, -0.6, 0.14),
            _disc(DARK, -0.2, -0.6, 0.06),
            _disc(DARK, 0.2, -0.6, 0.06),
            _box(DARK, -0.22, -0.4, 0.22, -0.33),
        ),
        top=(0, -0.88),
        side=(0.85, 0.35),
        middle=(0, 0.2),
    ),
    "boat": Shape(
        (
            _bar(DARK, (0, 0.4), (0, -0.95), 0.09),
            _polygon(TRIM, (0.08, -0.9), (0.75, 0.24), (0.08, 0.24)),
            _polygon(LIGHT, (-0.08, -0.65), (-0.55, 0.24), (-0.08, 0.24)),
            _polygon(BODY, (-1.0, 0.36), (1.0, 0.36), (0.68, 0.95), (-0.66, 0.95)),
        ),
        top=(0, -0.9),
        side=(0.85, 0.4),
        middle=(0, 0.64),
    ),
    "car": Shape(
        (
            _polygon(BODY, (-0.55, 0.1), (-0.36, -0.42), (0.34, -0.42), (0.62, 0.1)),
            _polygon(LIGHT, (-0.4, 0.06), (-0.27, -0.3), (-0.04, -0.3), (-0.04, 0.06)),
            _polygon(LIGHT, (0.06, 0.06), (0.06, -0.3), (0.26, -0.3), (0.44, 0.06)),
            _polygon(BODY, (-1, 0.62), (-0.97, 0.12), (0.86, 0.06), (1, 0.3), (1, 0.62)),
            _box(TRIM, -1.0, 0.46, 1.0, 0.64),
            _disc(DARK, -0.52, 0.62, 0.27),
            _disc(DARK, 0.52, 0.62, 0.27),
            _disc(LIGHT, -0.52, 0.62, 0.11),
            _disc(LIGHT, 0.52, 0.62, 0.11),
        ),
        top=(0, -0.42),
        side=(-0.9, 0.15),
        middle=(-0.1, 0.28),
    ),
    "house": Shape(
        (
            _box(DARK, 0.34, -0.85, 0.54, -0.3),
            _box(BODY, -0.72, -0.12, 0.72, 1.0),
            _polygon(TRIM, (-0.95, -0.1), (0, -0.95), (0.95, -0.1)),
            _box(DARK, -0.18, 0.42, 0.18, 1.0),
            _box(LIGHT, -0.58, 0.1, -0.28, 0.4),
            _box(LIGHT, 0.28, 0.1, 0.58, 0.4),
        ),
        top=(0, -0.92),
        side=(0.8, -0.05),
        middle=(0, 0.16),
    ),
    "tree": Shape(
        (
            _box(DARK, -0.14, 0.2, 0.14, 1.0),
            _disc(TRIM, -0.45, 0.05, 0.42),
            _disc(TRIM, 0.45, 0.05, 0.42),
            _disc(BODY, 0, -0.1, 0.5),
            _disc(BODY, -0.26, -0.42, 0.42),
            _disc(BODY, 0.26, -0.42, 0.42),
            _disc(BODY, 0, -0.62, 0.36),
        ),
        top=(0, -0.96),
        side=(0.75, 0.0),
        middle=(0, -0.3),
    ),
    "fish": Shape(
        (
            _polygon(TRIM, (0.5, 0.15), (1.0, -0.35), (0.88, 0.15), (1.0, 0.65)),
            _polygon(TRIM, (-0.2, -0.25), (0.1, -0.7), (0.4, -0.15)),
            _disc(BODY, -0.15, 0.15, 0.82, 0.48),
            _polygon(TRIM, (-0.1, 0.2), (0.28, 0.05), (0.28, 0.42)),
            _disc(LIGHT, -0.6, 0.02, 0.14),
            _disc(DARK, -0.62, 0.02, 0.07),
        ),
        top=(-0.3, -0.3),
        side=(-0.9, 0.2),
        middle=(-0.2, 0.25),
    ),
    "bird": Shape(
        (
            _bar(DARK, (-0.1, 0.6), (-0.1, 1.0), 0.07),
            _bar(DARK, (0.15, 0.6), (0.15, 1.0), 0.07),
            _polygon(TRIM, (0.4, 0.25), (1.0, 0.05), (0.95, 0.42), (0.5, 0.5)),
            _disc(BODY, 0.05, 0.25, 0.58, 0.44),
            _polygon(DARK, (-0.72, -0.42), (-1.0, -0.25), (-0.68, -0.22)),
            _disc(BODY, -0.45, -0.32, 0.34),
            _disc(LIGHT, -0.54, -0.4, 0.1),
            _disc(DARK, -0.55, -0.4, 0.05),
            _polygon(TRIM, (-0.15, 0.02), (0.55, 0.05), (0.62, 0.5), (0.1, 0.42)),
        ),
        top=(-0.42, -0.64),
        side=(-0.7, 0.1),
        middle=(-0.05, 0.3),
    ),
    "cat": Shape(
        (
            Part(TRIM, (*_arc(0.62, 0.45, 0.36, 0.5, 100, -110), (0.62, 0.2), (0.6, 0.75))),
            _disc(BODY, 0.05, 0.55, 0.52, 0.46),
            _polygon(BODY, (-0.52, -0.4), (-0.5, -0.98), (-0.1, -0.66)),
            _polygon(BODY, (0.52, -0.4), (0.5, -0.98), (0.1, -0.66)),
            _disc(BODY, 0, -0.32, 0.54, 0.44),
            _disc(LIGHT, -0.22, -0.4, 0.13, 0.1),
            _disc(LIGHT, 0.22, -0.4, 0.13, 0.1),
            _disc(DARK, -0.22, -0.4, 0.05, 0.09),
            _disc(DARK, 0.22, -0.4, 0.05, 0.09),
            _polygon(DARK, (-0.09, -0.22), (0.09, -0.22), (0, -0.12)),
            _disc(LIGHT, -0.25, 0.95, 0.2, 0.1),
            _disc(LIGHT, 0.3, 0.95, 0.2, 0.1),
        ),
        top=(0, -0.7),
        side=(-0.45, 0.4),
        middle=(0.05, 0.5),
    ),
    "mushroom": Shape(
        (
            _polygon(LIGHT, (-0.26, 0.0), (0.26, 0.0), (0.36, 1.0), (-0.36, 1.0)),
            Part(BODY, (*_arc(0, 0.12, 0.92, 1.0, 180, 360), (0.92, 0.2), (-0.92, 0.2))),
            _disc(TRIM, -0.45, -0.22, 0.17),
            _disc(TRIM, 0.1, -0.52, 0.19),
            _disc(TRIM, 0.5, -0.12, 0.15),
        ),
        top=(0, -0.86),
        side=(0.85, 0.15),
        middle=(-0.02, -0.1),
    ),
    "rocket": Shape(
        (
            _polygon(LIGHT, (-0.2, 0.62), (0.2, 0.62), (0, 1.0)),
            _polygon(TRIM, (-0.34, 0.1), (-0.72, 0.75), (-0.3, 0.62)),
            _polygon(TRIM, (0.34, 0.1), (0.72, 0.75), (0.3, 0.62)),
            _polygon(
                BODY, (-0.34, 0.66), (-0.4, -0.2), (-0.24, -0.62), (0, -0.98), (0.24, -0.62),
                (0.4, -0.2), (0.34, 0.66),
            ),
            _polygon(TRIM, (-0.24, -0.62), (0, -0.98), (0.24, -0.62)),
            _disc(DARK, 0, -0.24, 0.21),
            _disc(LIGHT, 0, -0.24, 0.14),
        ),
        top=(0, -0.9),
        side=(0.62, 0.6),
        middle=(0, 0.28),
    ),
    "mug": Shape(
        (
            _disc(TRIM, 0.55, 0.2, 0.42, 0.46),
            _disc(Role.NOTHING, 0.55, 0.2, 0.22, 0.25),
            _polygon(BODY, (-0.72, -0.6), (0.52, -0.6), (0.44, 0.95), (-0.64, 0.95)),
            _disc(TRIM, -0.1, -0.6, 0.62, 0.2),
            _disc(DARK, -0.1, -0.58, 0.5, 0.13),
        ),
        top=(-0.1, -0.66),
        side=(0.9, 0.2),
        middle=(-0.1, 0.25),
    ),
    "umbrella": Shape(
        (
            _bar(DARK, (0, -0.9), (0, 0.9), 0.08),
            _bar(DARK, (0, 0.9), (-0.26, 0.84), 0.1),
            Part(BODY, (*_arc(0, 0.12, 0.98, 0.98, 180, 360), (0.64, -0.06), (0.32, 0.12),
                        (0, -0.06), (-0.32, 0.12), (-0.64, -0.06))),
            Part(TRIM, (*_arc(0, 0.12, 0.34, 0.97, 180, 360), (0, -0.06))),
        ),
        top=(0, -0.86),
        side=(0.9, 0.1),
        middle=(0, -0.35),
    ),
    "star": Shape(
        (_star(BODY, 0, 0.08, 1.02), _star(TRIM, 0, 0.08, 0.5)),
        top=(0, -0.85),
        side=(0.9, -0.2),
        middle=(0, 0.1),
    ),
    "chair": Shape(
        (
            _box(TRIM, -0.62, 0.3, -0.44, 1.0),
            _box(TRIM, 0.5, 0.3, 0.68, 1.0),
            _polygon(TRIM, (-0.3, 0.3), (-0.14, 0.3), (-0.16, 0.8), (-0.3, 0.8)),
            _box(BODY, -0.68, -0.98, -0.34, 0.4),
            _polygon(BODY, (-0.66, 0.06), (0.6, 0.06), (0.8, 0.42), (-0.66, 0.42)),
            _box(DARK, -0.57, -0.84, -0.46, -0.1),
        ),
        top=(-0.5, -0.98),
        side=(0.75, 0.2),
        middle=(0.05, 0.24),
    ),
    "lamp": Shape(
        (
            _bar(DARK, (0, 0.0), (0, 0.85), 0.1),
            _polygon(TRIM, (-0.42, 1.0), (0.42, 1.0), (0.28, 0.8), (-0.28, 0.8)),
            _disc(LIGHT, 0, 0.02, 0.22),
            _polygon(BODY, (-0.36, -0.95), (0.36, -0.95), (0.8, 0.0), (-0.8, 0.0)),
            _polygon(TRIM, (-0.74, -0.14), (0.74, -0.14), (0.8, 0.0), (-0.8, 0.0)),
        ),
        top=(0, -0.95),
        side=(0.75, -0.05),
        middle=(0, -0.5),
    ),
    "hat": Shape(
        (
            _disc(TRIM, 0, 0.62, 1.0, 0.28),
            _polygon(BODY, (-0.56, 0.6), (-0.62, -0.75), (0.62, -0.75), (0.56, 0.6)),
            _disc(BODY, 0, 0.6, 0.56, 0.14),
            _disc(BODY, 0, -0.75, 0.62, 0.16),
            _polygon(DARK, (-0.57, 0.5), (-0.58, 0.22), (0.58, 0.22), (0.57, 0.5)),
        ),
        top=(0, -0.88),
        side=(0.85, 0.6),
        middle=(0, -0.25),
    ),
}  # fmt: skip
"""The sixteen nouns of the world."""


ACCESSORIES: dict[str, tuple[str, tuple[Part, ...]]] = {
    "party hat": (
        "top",
        (
            _polygon(ACCESSORY, (-0.3, 0.1), (0.3, 0.1), (0.05, -0.62)),
            _disc(LIGHT, 0.05, -0.62, 0.12),
        ),
    ),
    "crown": (
        "top",
        (
            _polygon(
                ACCESSORY, (-0.36, 0.08), (-0.42, -0.42), (-0.18, -0.16), (0, -0.5), (0.18, -0.16),
                (0.42, -0.42), (0.36, 0.08),
            ),
        ),
    ),
    "antenna": (
        "top",
        (_bar(DARK, (0, 0.1), (0.08, -0.45), 0.09), _disc(ACCESSORY, 0.1, -0.5, 0.19)),
    ),
    "bow": (
        "top",
        (
            _polygon(ACCESSORY, (0, -0.02), (-0.46, -0.3), (-0.46, 0.26)),
            _polygon(ACCESSORY, (0, -0.02), (0.46, -0.3), (0.46, 0.26)),
            _disc(DARK, 0, -0.02, 0.12),
        ),
    ),
    "flag": (
        "side",
        (
            _bar(DARK, (0, 0.1), (0, -0.95), 0.08),
            _polygon(ACCESSORY, (0.03, -0.95), (0.6, -0.74), (0.03, -0.48)),
        ),
    ),
    "balloon": (
        "side",
        (
            _bar(DARK, (0, 0.05), (0.12, -0.65), 0.05),
            _disc(ACCESSORY, 0.14, -0.85, 0.27, 0.32),
        ),
    ),
    "badge": ("middle", (_disc(LIGHT, 0, 0, 0.32), _star(ACCESSORY, 0, 0, 0.3))),
    "heart": (
        "middle",
        (
            _disc(ACCESSORY, -0.14, -0.08, 0.18),
            _disc(ACCESSORY, 0.14, -0.08, 0.18),
            _polygon(ACCESSORY, (-0.31, -0.02), (0.31, -0.02), (0, 0.36)),
        ),
    ),
}  # fmt: skip
"""What a subject wears or carries: which of a shape's places it sits at, and its polygons there."""


def accessory_parts(name: str, shape: Shape) -> tuple[Part, ...]:
    """Return the polygons of one of `ACCESSORIES` where ``shape`` wears it.

    Raises:
        ValueError: there is no accessory of that name.
    """
    if name not in ACCESSORIES:
        raise ValueError(f"no accessory {name!r}: there are {', '.join(ACCESSORIES)}")
    place, parts = ACCESSORIES[name]
    left, top = {"top": shape.top, "side": shape.side, "middle": shape.middle}[place]
    return tuple(
        Part(part.role, tuple((x + left, y + top) for x, y in part.points)) for part in parts
    )
