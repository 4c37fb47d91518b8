"""Augmented views that change while training goes on, so that a bank of few never becomes stale.

Shape legend: V augmented views a photo, C latent channels, h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppt.config import PhotosConfig
from fastppt.data.buckets import Bucket
from fastppt.data.latents import PLAIN_VIEW, encode_picture
from fastppt.data.photos import crop_photo
from fastppt.data.views import View, draw_views
from fastppt.families.base import Family


@dataclass(frozen=True)
class _Place:
    """One photo and where its views lie.

    Attributes:
        photo: Its number in the run.
        pixels: [3, H, W] on the host, pinned for a GPU.
        staging: [V, 2, C, h, w], where the next views are put together; one a bucket.
        encodings: [V, 2, C, h, w], the bank's own.
    """

    photo: int
    pixels: Tensor
    staging: Tensor
    encodings: Tensor


class ViewRefresh:
    """Draws one photo's augmented views anew every so many steps, beside the steps.

    Refresh r, from 0, is of photo r mod P. It begins before step ``r * refresh_every``, its views
    are encoded spread evenly over the steps that follow, and they all come into the bank at once
    before step ``(r + 1) * refresh_every``, however long encoding them took. So what a step sees
    follows from seed and step number, on every device. A refresh that no step would see is left
    out.

    On a GPU the VAE runs on a stream of its own, into a staging buffer. The stream of the steps
    waits for it, then copies: a step, replayed graphs among them, sees the old views or the new
    ones, never half of either. The host does not wait. The memory that the VAE works in comes on
    top of the step's.

    Args:
        family: The loaded model, its VAE on the device and to stay there.
        settings: The run's; ``refresh_every`` is not 0.
        seed: Of the stream of views, as the bank's first ones were drawn from.
        buckets: All photos and their banks, which are written.
        num_steps: Steps that may draw augmented views, in the whole run.
    """

    def __init__(
        self,
        family: Family,
        settings: PhotosConfig,
        seed: int,
        buckets: Sequence[Bucket],
        num_steps: int,
    ) -> None:
        self._family, self._settings, self._seed = family, settings, seed
        self._num_steps = num_steps
        on_gpu = family.device.type == "cuda"
        self._stream = torch.cuda.Stream(family.device) if on_gpu else None
        places = []
        for bucket in buckets:
            staging = torch.empty_like(bucket.latents.posteriors[0, PLAIN_VIEW + 1 :])
            for row, (number, photo) in enumerate(bucket.photos.items()):
                pixels = crop_photo(photo, bucket.size).pixels
                pixels = pixels.pin_memory() if on_gpu else pixels
                encodings = bucket.latents.posteriors[row, PLAIN_VIEW + 1 :]
                places.append(_Place(number, pixels, staging, encodings))
        self._places = sorted(places, key=lambda place: place.photo)
        self._step = 0
        self._begun: tuple[_Place, list[View]] | None = None

    def start_at(self, num_steps: int) -> None:
        """Put bank and staging where they are after so many calls of `before_step`.

        Args:
            num_steps: Steps that might draw augmented views and have been taken; none by this
                object yet.
        """
        if num_steps == 0:
            return
        every, num_views = self._settings.refresh_every, self._settings.views
        refresh, offset = divmod(num_steps - 1, every)
        # Each photo's latest views; those before have been replaced.
        for earlier in range(max(0, refresh - len(self._places)), refresh):
            self._begin(earlier)
            self._encode(range(num_views))
            self._take_in()
        if refresh * every + every < self._num_steps:
            self._begin(refresh)
            self._encode(range((offset + 1) * num_views // every))
        self._step = num_steps

    def before_step(self) -> None:
        """Do what is due before the next step that may draw augmented views."""
        every = self._settings.refresh_every
        refresh, offset = divmod(self._step, every)
        if offset == 0:
            self._take_in()
            if self._step + every < self._num_steps:
                self._begin(refresh)
        num_views = self._settings.views
        self._encode(range(offset * num_views // every, (offset + 1) * num_views // every))
        self._step += 1

    def _begin(self, refresh: int) -> None:
        generation, index = divmod(refresh, len(self._places))
        place = self._places[index]
        # Generation 0 is what the bank was filled with.
        views = draw_views(self._settings, self._seed, place.photo, generation + 1)
        self._begun = place, views
        if self._stream is not None:
            # The staging buffer may still be read by the copy into the bank.
            self._stream.wait_stream(torch.cuda.current_stream(self._family.device))

    def _encode(self, views: range) -> None:
        """Encode some of the views that are under way."""
        if self._begun is None:
            return
        place, all_views = self._begun
        with torch.cuda.stream(self._stream):
            for index in views:
                encoding = encode_picture(self._family, place.pixels, all_views[index])
                place.staging[index].copy_(encoding)

    def _take_in(self) -> None:
        """Copy the views that are under way into the bank."""
        if self._begun is None:
            return
        if self._stream is not None:
            torch.cuda.current_stream(self._family.device).wait_stream(self._stream)
        place, _ = self._begun
        place.encodings.copy_(place.staging)
        self._begun = None
