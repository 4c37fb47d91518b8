"""Augmented views of a photo: the same picture from farther off, turned, the rest filled up.

Shape legend: H and W height and width in pixels, h and w those of the picture once shrunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastppt.config import PhotosConfig

# What torch calls them.
PADDING_MODES = {"reflect": "reflection", "edge": "border"}


@dataclass(frozen=True)
class View:
    """What is done to a photo.

    Attributes:
        zoom_out: How many times smaller the photo is seen, from 1.
        angle: Degrees that it is turned, counter-clockwise.
        fill: What is seen outside the photo: `reflect` (its mirror image, repeated as often as
            need be) or `edge` (its outermost pixels drawn out).
    """

    zoom_out: float
    angle: float
    fill: Literal["reflect", "edge"]


def draw_views(settings: PhotosConfig, seed: int, photo: int, generation: int) -> list[View]:
    """Draw the augmented views of one photo, by seed alone.

    zoom_out ~ U[1, max_zoom_out], angle ~ U[-max_rotation, max_rotation]

    Source: Adaptive Personalized Training (arXiv 2507.02687), the augmentation that its indicator
    drives. The fill is our choice: the paper does not say.

    Args:
        settings: The run's; the first views stay the same whatever the number of ``views``.
        seed: Of the stream of views.
        photo: Number of the photo in the run, from 0.
        generation: How many times its views have been drawn before.
    """
    chance = np.random.default_rng([seed, photo, generation])
    low, high = (1.0, -settings.max_rotation), (settings.max_zoom_out, settings.max_rotation)
    draws = chance.uniform(low, high, (settings.views, 2))
    return [View(zoom_out, angle, settings.fill) for zoom_out, angle in draws.tolist()]


def take_view(pixels_chw: Tensor, view: View) -> Tensor:
    """Return the photo as a view shows it, of the same size.

    The pixel at p shows what was at q = zoom_out * R(-angle) p, both counted in pixels from the
    centre. The photo is shrunk first, with antialiasing (bicubic), and the turned grid is read from
    what is left (bicubic): read from the photo itself, a grid three times as coarse would see one
    pixel in nine. Coordinates and sums are float64, so that devices agree to rounding and
    the view of scale 1 and angle 0 is the photo bit for bit.

    Args:
        pixels_chw: [C, H, W] in [-1, 1], as training sees the photo. Not written.
        view: What to do.

    Returns:
        [C, H, W] in [-1, 1] on the same device, in the same dtype.
    """
    height, width = pixels_chw.shape[1:]
    shrunk_size = [max(1, round(side / view.zoom_out)) for side in (height, width)]
    shrunk_1chw = F.interpolate(
        pixels_chw[None].double(), size=shrunk_size, mode="bicubic", antialias=True
    )
    view_1chw = F.grid_sample(
        shrunk_1chw,
        _source_grid(height, width, view, pixels_chw.device),
        mode="bicubic",
        padding_mode=PADDING_MODES[view.fill],
        align_corners=False,
    )
    # Bicubic weights may overshoot beside an edge.
    return view_1chw[0].clamp(-1, 1).to(pixels_chw.dtype)


def _source_grid(height: int, width: int, view: View, device: torch.device) -> Tensor:
    """Return where each pixel of a view lies in the photo, [1, H, W, 2] as (x, y) in [-1, 1].

    Made of ranges and numbers alone: a table copied from the host would make it wait.
    """
    y_h1, x_1w = (
        torch.arange(side, dtype=torch.float64, device=device) + (0.5 - side / 2)
        for side in (height, width)
    )
    y_h1, x_1w = y_h1[:, None], x_1w[None]
    angle = math.radians(view.angle)
    cos, sin = view.zoom_out * math.cos(angle), view.zoom_out * math.sin(angle)
    # y points down, so a turn counter-clockwise is one by -angle, and this is its inverse.
    source_x_hw = cos * x_1w - sin * y_h1
    source_y_hw = sin * x_1w + cos * y_h1
    return torch.stack([source_x_hw * (2 / width), source_y_hw * (2 / height)], dim=-1)[None]
