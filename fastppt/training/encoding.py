"""What is encoded once, before the first step: photos and prompts, of training and of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.data.buckets import Bucket, bucket_sizes, encode_buckets, nearest_size
from fastppt.data.class_images import ClassImages, encode_class_images
from fastppt.data.photos import Photo, cover_scale
from fastppt.data.prompts import (
    LivePrompts,
    caption_notes,
    quiet_truncation,
    sample_prompts,
    truncation_notes,
)
from fastppt.data.views import draw_views
from fastppt.families.base import Family, PromptEmbeddings
from fastppt.training.progress import encoding_line
from fastppt.training.seeds import VIEW_STREAM, split_seed

MOST_NOTES = 6
"""Notes of one kind that a run prints: as many as few photos can have, and of thousands enough."""


@dataclass(frozen=True)
class SampleSheet:
    """The prompts of the sample grid.

    Attributes:
        captions: As written.
        prompts: One row each, encoded before training.
        negative: One row, likewise: what guidance pushes away from.
        live: Both where text is trained, in that order, to be encoded for each grid; None where it
            is not. What is negative may be the same whatever encodes, and is None then.
    """

    captions: list[str]
    prompts: PromptEmbeddings
    negative: PromptEmbeddings
    live: tuple[LivePrompts, LivePrompts | None] | None = None

    @torch.no_grad()
    def encode(self) -> tuple[PromptEmbeddings, PromptEmbeddings]:
        """Return prompts and negative as the text encoders are now."""
        if self.live is None:
            return self.prompts, self.negative
        prompts, negative = self.live
        return prompts.encode(), self.negative if negative is None else negative.encode()


def encode(
    config: RunConfig, family: Family, photos: list[Photo], console: Console
) -> tuple[list[Bucket], SampleSheet]:
    """Encode photos and prompts once, then take the encoders off the device.

    Photos get augmented views where a stage draws them. The VAE stays on the device where views are
    drawn anew during training, the CLIPs where text is trained.

    Args:
        config: Resolved.
        family: The loaded model.
        photos: The subject's.
        console: Is told of photos that are scaled up, of captions without {subject}, of prompts
            that are cut off, and of the buckets.

    Returns:
        The buckets that have photos (the square alone where buckets are off), and the prompts of
        the sample grid.
    """
    resolution = config.photos.resolution
    assert resolution is not None
    sizes = [(resolution, resolution)] * len(photos)
    if config.photos.buckets:
        possible = [
            size
            for size in bucket_sizes(resolution, family.resolution_step)
            if family.largest_side is None or max(size) <= family.largest_side
        ]
        sizes = [nearest_size(photo, possible) for photo in photos]
    views = None
    if config.augment:
        seed = split_seed(config.seed, VIEW_STREAM)
        views = [draw_views(config.photos, seed, number, 0) for number in range(len(photos))]
    num_views = config.photos.views if config.augment else 0
    notes = [
        *_first(_upscaling_notes(photos, sizes)),
        *_first(caption_notes(config.prompts, photos)),
        *_first(truncation_notes(family, config.prompts, photos)),
    ]
    with quiet_truncation():
        with encoding_line(console, len(photos), num_views) as advance:
            buckets = encode_buckets(
                family,
                config.prompts,
                photos,
                sizes,
                views,
                advance,
                move_text=config.move_text,
            )
        sheet = make_sheet(config, family)
    keep_vae = config.photos.refresh_every > 0
    family.release_encoders(keep_vae=keep_vae, keep_text=config.move_text)
    if config.photos.buckets:
        plural = "s" * (len(buckets) > 1)
        notes.append(f"{len(buckets)} bucket{plural}: {', '.join(map(str, buckets))}")
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    return buckets, sheet


def encode_class_sets(
    config: RunConfig, family: Family, class_images: Mapping[int, ClassImages]
) -> dict[int, Bucket]:
    """Encode the class images of a run's stages once, before `encode` takes the encoders away.

    Args:
        config: Resolved.
        family: The loaded model.
        class_images: By stage; a set that several stages have is encoded once.

    Raises:
        UserError: a picture cannot be decoded.
    """
    resolution = config.photos.resolution
    assert resolution is not None
    encoded: dict[int, Bucket] = {}
    for images in class_images.values():
        if id(images) not in encoded:
            encoded[id(images)] = encode_class_images(
                family,
                config.prompts,
                images.pictures,
                (resolution, resolution),
                move_text=config.move_text,
            )
    return {index: encoded[id(images)] for index, images in class_images.items()}


def make_sheet(config: RunConfig, family: Family) -> SampleSheet:
    """Encode the prompts of the sample grid."""
    captions = sample_prompts(config.prompts)
    prompts, negative = family.encode_prompts(captions), family.encode_negative()
    if not config.move_text:
        return SampleSheet(captions, prompts, negative)
    ids = family.negative_ids()
    live_negative = None if ids is None else LivePrompts(ids, family)
    live = LivePrompts(family.prompt_ids(captions), family)
    return SampleSheet(captions, prompts, negative, (live, live_negative))


def _first(notes: list[str]) -> list[str]:
    """Return the first few of notes of one kind, and how many more there are."""
    num_more = len(notes) - MOST_NOTES
    return notes if num_more <= 0 else [*notes[:MOST_NOTES], f"{num_more} more are like these"]


def _upscaling_notes(photos: list[Photo], sizes: list[tuple[int, int]]) -> list[str]:
    """Return a line for each photo that is smaller than what is trained."""
    notes = []
    for photo, size in zip(photos, sizes, strict=True):
        scale = cover_scale(photo, size)
        if scale > 1:
            (height, width), (target_height, target_width) = photo.size, size
            notes.append(
                f"{photo.path} is {width}x{height} pixels and is scaled up {scale:.2g} times to "
                f"cover {target_width}x{target_height}; a larger photo, or a lower resolution, "
                "is sharper"
            )
    return notes
