"""The latent bank: every photo of one size encoded once, kept at a fixed device address.

Shape legend: P photos, V augmented views a photo, C latent channels, h and w latent height and
width, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppt.data.photos import CroppedPhoto
from fastppt.data.views import View, take_view
from fastppt.families.base import Family

PLAIN_VIEW = 0


@dataclass(frozen=True)
class LatentBank:
    """Posterior means and standard deviations of the photos' latents.

    Attributes:
        posteriors: [P, 1 + V, 2, C, h, w], mean and std, scaled as the network wants them: of the
            photo as it is (`PLAIN_VIEW`), then of its augmented views.
    """

    posteriors: Tensor

    @property
    def num_photos(self) -> int:
        """Number of photos P."""
        return self.posteriors.shape[0]

    @property
    def num_views(self) -> int:
        """Number of augmented views a photo V."""
        return self.posteriors.shape[1] - 1

    @property
    def latent_shape(self) -> torch.Size:
        """(C, h, w) of one latent."""
        return self.posteriors.shape[3:]

    @property
    def num_bytes(self) -> int:
        """Memory that the bank takes."""
        return self.posteriors.nbytes

    def sample(self, photos: Tensor, views: Tensor, normals: Tensor) -> Tensor:
        """Return latents mean + std * normal of the VAE's posterior (arXiv 1312.6114, eq. 4).

        Args:
            photos: [B] int64.
            views: [B] int64.
            normals: [B, C, h, w] standard normal draws.
        """
        mean, std = self.posteriors[photos, views].unbind(1)
        return mean + std * normals


def encode_latents(
    family: Family,
    photos: Iterable[CroppedPhoto],
    views: Sequence[Sequence[View]],
    on_encoded: Callable[[], object],
) -> LatentBank:
    """Encode photos of one size and their augmented views.

    Args:
        family: The loaded model, its VAE on the device.
        photos: The photos.
        views: The augmented views of each, of all the same number.
        on_encoded: Called after each picture.
    """
    posteriors: Tensor | None = None
    for number, (photo, own_views) in enumerate(zip(photos, views, strict=True)):
        for place, view in enumerate((None, *own_views)):
            latent_2chw = encode_picture(family, photo.pixels, view)
            if posteriors is None:
                # All at once: what does not fit is found out with the first picture.
                shape = len(views), 1 + len(own_views), *latent_2chw.shape
                posteriors = latent_2chw.new_empty(shape)
            posteriors[number, place] = latent_2chw
            on_encoded()
    assert posteriors is not None
    return LatentBank(posteriors)


def encode_picture(family: Family, pixels_chw: Tensor, view: View | None) -> Tensor:
    """Encode one picture by itself: at 1024 pixels one fills the VAE's memory enough.

    Args:
        family: The loaded model, its VAE on the device.
        pixels_chw: [3, H, W] in [-1, 1]; from pinned memory nothing here makes the host wait.
        view: What is done to the picture first; None for nothing.

    Returns:
        [2, C, h, w], mean and std.
    """
    pixels_chw = pixels_chw.to(family.device, non_blocking=True)
    if view is not None:
        pixels_chw = take_view(pixels_chw, view)
    mean_1chw, std_1chw = family.encode_photos(pixels_chw[None])
    return torch.cat([mean_1chw, std_1chw])
