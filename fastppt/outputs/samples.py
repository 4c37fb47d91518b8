"""Grids of sample pictures, each with its prompt under it."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastppt.config import SamplesConfig
from fastppt.families.base import Family, PromptEmbeddings
from fastppt.outputs.files import write_file

# Pixels: narrower pictures are enlarged to this, so that a prompt fits under them.
MIN_CELL = 192
MARGIN = 8
FONT_SIZE = 13
LINES = 3


def draw_samples(
    family: Family,
    prompts: PromptEmbeddings,
    negative: PromptEmbeddings,
    samples: SamplesConfig,
    resolution: int,
    before_each: Callable[[], None],
) -> list[Image.Image]:
    """Draw one picture a prompt, all from the same seed.

    Args:
        family: Draws them.
        prompts: One a picture.
        negative: What guidance leads away from.
        samples: Sampler steps, seed, guidance scale.
        resolution: Side in pixels.
        before_each: Is called before each picture, and may raise.
    """
    pictures = family.sample(
        prompts,
        negative,
        seeds=[samples.seed] * len(prompts.tokens),
        resolution=resolution,
        steps=samples.steps,
        guidance_scale=samples.guidance_scale,
    )
    drawn = []
    for _ in prompts.tokens:
        before_each()
        drawn.append(next(pictures))
    return drawn


def write_grid(path: Path, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    """Write the pictures side by side as a PNG."""
    side = max(MIN_CELL, images[0].width)
    font = ImageFont.load_default(size=FONT_SIZE)
    grid = Image.new("RGB", grid_size(len(images), images[0].width), "white")
    pen = ImageDraw.Draw(grid)
    for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = MARGIN + column * (side + MARGIN)
        if image.width < side:
            image = image.resize((side, side), Image.Resampling.NEAREST)
        grid.paste(image, (left, MARGIN))
        lines = textwrap.wrap(caption, width=side // 7)[:LINES]
        pen.text((left, side + MARGIN + 4), "\n".join(lines), fill="black", font=font)
    write_file(path, png_bytes(grid))


def grid_size(num_images: int, resolution: int) -> tuple[int, int]:
    """Return (width, height) of a grid of pictures of that side, in pixels."""
    side = max(MIN_CELL, resolution)
    text_height = LINES * (FONT_SIZE + 4)
    return MARGIN + num_images * (side + MARGIN), side + text_height + 2 * MARGIN


def png_bytes(image: Image.Image) -> bytes:
    """Return the picture as a PNG file's content.

    At the lowest level of compression: a photo of 1024 pixels takes 0.06 s instead of 0.3 s, which
    whoever draws class images waits for; about a tenth more bytes, and more for flat pictures.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
