"""The mini world: scenes whose truth is known, their captions, and subjects that are new to it.

A scene is one object in one place in one style. What a model trained on such scenes should draw
for a prompt is known exactly, so whether it still does after it has learned a subject can be
measured. Everything is decided by seeds: the same scene is the same pixels.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastppt.mini.contexts import CONTEXTS
from fastppt.mini.objects import PATTERNS, Look, Pose, cast_shadow, paint_object, place_object
from fastppt.mini.painter import Color, Generator
from fastppt.mini.shapes import ACCESSORIES, SHAPES
from fastppt.mini.styles import paint, photograph, sketch

NOUNS: tuple[str, ...] = tuple(SHAPES)
"""What the objects of the world are."""

COLORS: dict[str, Color] = {
    "red": (208, 36, 42),
    "orange": (242, 132, 24),
    "yellow": (246, 214, 44),
    "green": (58, 160, 62),
    "blue": (38, 84, 204),
    "purple": (128, 52, 168),
    "pink": (246, 142, 186),
    "white": (240, 240, 236),
}
"""The colours an object may have, 8-bit RGB before light and texture."""

PLACES: tuple[str, ...] = tuple(CONTEXTS)
"""The contexts by name; `CONTEXTS` has the words of a prompt and what paints them."""

STYLES: tuple[str, ...] = ("photo", "painting", "sketch")
"""How a picture is made."""

IMAGE_SIZE = 64
"""Pixels a side of the pictures that the mini models learn."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Subject:
    """One object that the pretrained model has never seen: of a known noun, of its own look.

    Raises:
        ValueError: the world has no such noun.
    """

    noun: str
    look: Look

    def __post_init__(self) -> None:
        _known("noun", self.noun, NOUNS)


@dataclass(frozen=True)
class Scene:
    """One picture's truth.

    Attributes:
        noun: One of `NOUNS`.
        color: One of `COLORS`; None for a subject, whose colours have no name.
        context: One of `PLACES`.
        style: One of `STYLES`.
        look: The object's.
        pose: The object's.
        seed: Of the place, the texture and the light.

    Raises:
        ValueError: the world has no such noun, colour, context or style.
    """

    noun: str
    color: str | None
    context: str
    style: str
    look: Look
    pose: Pose
    seed: int

    def __post_init__(self) -> None:
        _known("noun", self.noun, NOUNS)
        if self.color is not None:
            _known("color", self.color, tuple(COLORS))
        _known("context", self.context, PLACES)
        _known("style", self.style, STYLES)


def random_scene(
    rng: Generator,
    *,
    noun: str | None = None,
    color: str | None = None,
    context: str | None = None,
    style: str | None = None,
    subject: Subject | None = None,
) -> Scene:
    """Draw a scene; what is not given is random, every value as likely as another.

    Args:
        rng: Read the same number of times whatever is given.
        noun: One of `NOUNS`; of a subject, its own.
        color: One of `COLORS`; a subject has none.
        context: One of `PLACES`.
        style: One of `STYLES`.
        subject: Shown instead of an object of the world.

    Raises:
        ValueError: a value that the world does not have.
    """
    drawn_noun, drawn_color, drawn_context, drawn_style = (
        _choice(rng, options) for options in (NOUNS, tuple(COLORS), PLACES, STYLES)
    )
    color = _known("color", drawn_color if color is None else color, tuple(COLORS))
    plain, pose = _plain_look(rng, color), _random_pose(rng)
    if subject is not None:
        noun = subject.noun
    return Scene(
        noun=drawn_noun if noun is None else noun,
        color=color if subject is None else None,
        context=drawn_context if context is None else context,
        style=drawn_style if style is None else style,
        look=plain if subject is None else subject.look,
        pose=pose,
        seed=int(rng.integers(2**32)),
    )


def random_subject(seed: int, noun: str | None = None) -> Subject:
    """Draw a subject: a two-coloured pattern, a trim of a third colour and an accessory.

    Args:
        seed: The same seed is the same subject (of the same noun).
        noun: One of `NOUNS`; random without.

    Raises:
        ValueError: ``noun`` is none of the world's.
    """
    rng = np.random.default_rng([seed, 20_519])
    drawn = _choice(rng, NOUNS)
    first = rng.uniform(0, 1)
    # Three hues that are far from each other, each light or dark, none a colour of the palette
    # alone: what tells a subject apart is the whole of them.
    hues = [(first + shift) % 1 for shift in (0, rng.uniform(0.25, 0.45), rng.uniform(0.55, 0.75))]
    values = [(rng.uniform(0.55, 0.95), rng.uniform(0.5, 0.95)) for _ in hues]
    body, second, third = (
        colorsys.hsv_to_rgb(hue, saturation, value)
        for hue, (saturation, value) in zip(hues, values, strict=True)
    )
    if rng.random() < 0.4:
        second = ((0.95, 0.93, 0.86), (0.14, 0.13, 0.16))[int(rng.integers(2))]
    look = Look(
        body=body,
        trim=third,
        pattern=_choice(rng, PATTERNS),
        pattern_color=second,
        pattern_scale=float(rng.uniform(2.0, 3.6)),
        pattern_angle=float(rng.choice([0, 30, 60, 90, 120, 150])),
        accessory=_choice(rng, tuple(ACCESSORIES)),
        accessory_color=colorsys.hsv_to_rgb(rng.uniform(0, 1), rng.uniform(0.6, 0.95), 0.92),
    )
    return Subject(drawn if noun is None else noun, look)


def caption(scene: Scene, *, style: bool = True, color: bool = True, context: bool = True) -> str:
    """Say a scene as a prompt: "a sketch of a red boat on the beach".

    Args:
        scene: Of the world; a subject's colour is never said.
        style: Say it; otherwise "a picture".
        color: Say it.
        context: Say it.
    """
    words = [f"a {scene.style if style else 'picture'} of"]
    thing = f"{scene.color} {scene.noun}" if color and scene.color else scene.noun
    words.append(f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}")
    if context:
        words.append(CONTEXTS[scene.context][0])
    return " ".join(words)


def render(scene: Scene, size: int = IMAGE_SIZE) -> Pixels:
    """Draw a scene.

    Args:
        scene: What to draw.
        size: Pixels a side. Everything is drawn three times as large and scaled down, for smooth
            edges. A photo or a painting is the same picture at every size; the pencil lines of a
            sketch are as many pixels thick at every size.

    Returns:
        RGB [size, size, 3].
    """
    canvas = 3 * size
    rng = np.random.default_rng(scene.seed)
    picture = CONTEXTS[scene.context][1](rng, canvas)
    placed = place_object(scene.noun, scene.look, scene.pose, canvas)
    picture = cast_shadow(picture, scene.pose)
    picture = paint_object(picture, placed, scene.look, rng)
    if scene.style == "photo":
        picture = photograph(picture, rng)
    elif scene.style == "painting":
        picture = paint(picture, placed.roles, rng)
    else:
        picture = sketch(picture, placed.roles, rng)
    full = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.asarray(full.reduce(3))


def _plain_look(rng: Generator, color: str) -> Look:
    """A colour of the palette with its everyday spread; the trim is a darker shade of it."""
    spread = rng.uniform(-0.05, 0.05, 3)
    light = rng.uniform(0.92, 1.06)
    red, green, blue = (
        min(1.0, max(0.0, channel / 255 * light + change))
        for channel, change in zip(COLORS[color], spread.tolist(), strict=True)
    )
    darker = rng.uniform(0.6, 0.75)
    return Look(body=(red, green, blue), trim=(red * darker, green * darker, blue * darker))


def _random_pose(rng: Generator) -> Pose:
    size = rng.uniform(0.25, 0.36)
    return Pose(
        size=float(size),
        x=float(rng.uniform(0.36, 0.64)),
        y=float(rng.uniform(0.94, 0.98) - size - rng.uniform(0, 0.1)),
        tilt=float(rng.uniform(-14, 14)),
        mirrored=bool(rng.random() < 0.5),
        stretch=float(rng.uniform(0.9, 1.12)),
    )


def _choice(rng: Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _known(what: str, value: str, options: tuple[str, ...]) -> str:
    if value not in options:
        raise ValueError(f"no {what} {value!r} in the mini world: there are {', '.join(options)}")
    return value
