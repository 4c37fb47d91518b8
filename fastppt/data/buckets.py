"""Aspect-ratio buckets: the few sizes that photos are cropped to, and the banks of each.

A step takes photos of one bucket, so each bucket is one set of shapes, and as a captured graph one
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fastppt.config import PromptsConfig
from fastppt.data.latents import LatentBank, encode_latents
from fastppt.data.photos import Photo, cover_scale, crop_photo, outline_crop
from fastppt.data.prompts import PromptBank, encode_prompt_bank
from fastppt.data.views import View
from fastppt.families.base import Family

ASPECT_RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
"""Width to height, the squarer first: what cameras, phones and screens give, upright and lying."""

FULL_SIZE = 512
"""Pixels from which on buckets are multiples of `FULL_SIZE_STEP`."""

FULL_SIZE_STEP = 64
"""Full-size models were trained on buckets of such sides (Podell et al., arXiv 2307.01952, section
2.3 and appendix I): at 1024 pixels these ratios give four of theirs, 1024x1024, 1152x896, 1216x832
and 1344x768, and the three that are these on end."""


@dataclass(frozen=True)
class Bucket:
    """The photos of one size.

    Attributes:
        size: (height, width) in pixels.
        photos: Which of the run's photos they are, by their number there, in the banks' order.
        latents: Their latents.
        prompts: Their prompts, in the same order; the embeddings are those of all buckets.
    """

    size: tuple[int, int]
    photos: dict[int, Photo]
    latents: LatentBank
    prompts: PromptBank

    @property
    def num_photos(self) -> int:
        """Number of photos."""
        return self.latents.num_photos

    def __str__(self) -> str:
        height, width = self.size
        return f"{width}x{height} ({self.num_photos} photo{'s' * (self.num_photos > 1)})"


def bucket_sizes(resolution: int, step: int) -> list[tuple[int, int]]:
    """Return the different (height, width) of the aspect ratios, in pixels.

    The short side is the multiple of the step nearest to resolution / sqrt(ratio), the long one the
    largest that keeps the area within resolution^2.

    Args:
        resolution: Side of the square, a multiple of the family's step.
        step: The family's own.
    """
    if resolution >= FULL_SIZE and resolution % FULL_SIZE_STEP == 0 == FULL_SIZE_STEP % step:
        step = FULL_SIZE_STEP
    sizes = []
    for width, height in ASPECT_RATIOS:
        ratio = max(width, height) / min(width, height)
        short = round(resolution / ratio**0.5 / step) * step
        long = resolution**2 // (short * step) * step
        sizes.append((short, long) if width > height else (long, short))
    return list(dict.fromkeys(sizes))


def nearest_size(photo: Photo, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (height, width) that crops least of the photo, the first of equals."""

    def kept(size: tuple[int, int]) -> float:
        """Return the share of the photo that is left."""
        scale = cover_scale(photo, size)
        return (size[0] * size[1]) / (photo.size[0] * photo.size[1] * scale**2)

    return max(sizes, key=kept)


def encode_buckets(
    family: Family,
    prompts: PromptsConfig,
    photos: Sequence[Photo],
    sizes: Sequence[tuple[int, int]],
    views: Sequence[Sequence[View]] | None = None,
    on_encoded: Callable[[], object] = lambda: None,
    *,
    move_text: bool = False,
) -> list[Bucket]:
    """Crop each photo to its size and encode it once, and its augmented views.

    Where the network is told of a photo's size, it is told the same of its augmented views (our
    choice): they are made of the crop, so they show no more than it does, and nothing but the
    picture differs from the plain one.

    Args:
        family: The loaded model.
        prompts: The run's.
        photos: All photos.
        sizes: (height, width) of each photo's bucket, pixels.
        views: The augmented views of each photo, of all the same number; None for none.
        on_encoded: Called after each picture.
        move_text: Whether text is trained.

    Returns:
        The buckets that have photos, in the order of their first.
    """
    outlines = [outline_crop(photo, size) for photo, size in zip(photos, sizes, strict=True)]
    bank = encode_prompt_bank(family, prompts, photos, outlines, move_text=move_text)
    buckets = []
    for size in dict.fromkeys(sizes):
        rows = [row for row, other in enumerate(sizes) if other == size]
        own_views = [views[row] if views is not None else () for row in rows]
        # One at a time: thousands of photos do not fit into memory.
        crops = (crop_photo(photos[row], size) for row in rows)
        latents = encode_latents(family, crops, own_views, on_encoded)
        numbered = {row: photos[row] for row in rows}
        buckets.append(Bucket(size, numbered, latents, bank.select(rows)))
    return buckets


def bucket_of_draw(draw: int, nums_photos: Sequence[int]) -> int:
    """Return which bucket a draw falls into, each with its share of the photos.

    Args:
        draw: Uniform over far more integers from 0 than there are photos.
        nums_photos: Photos in each bucket.
    """
    photo = draw % sum(nums_photos)
    return next(index for index, end in enumerate(accumulate(nums_photos)) if photo < end)
