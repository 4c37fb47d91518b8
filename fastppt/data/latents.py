"""The latent bank: every photo of one size encoded once, kept at a fixed device address.

Shape legend: P photos, V encodings a photo (the plain one first), C latent channels, h and w
latent height and width, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppt.data.photos import CroppedPhoto
from fastppt.families.base import Family

PLAIN_VIEW = 0


@dataclass(frozen=True)
class LatentBank:
    """Posterior means and standard deviations of the photos' latents.

    Attributes:
        posteriors: [P, V, 2, C, h, w], mean and std, scaled as the network wants them.
    """

    posteriors: Tensor

    @property
    def num_photos(self) -> int:
        """Number of photos P."""
        return self.posteriors.shape[0]

    @property
    def latent_shape(self) -> torch.Size:
        """(C, h, w) of one latent."""
        return self.posteriors.shape[3:]

    def sample(self, photos: Tensor, views: Tensor, normals: Tensor) -> Tensor:
        """Return latents mean + std * normal of the VAE's posterior (arXiv 1312.6114, eq. 4).

        Args:
            photos: [B] int64.
            views: [B] int64.
            normals: [B, C, h, w] standard normal draws.
        """
        mean, std = self.posteriors[photos, views].unbind(1)
        return mean + std * normals


def encode_latents(family: Family, photos: Sequence[CroppedPhoto]) -> LatentBank:
    """Encode photos of one size, each on its own (one 1024-pixel picture fills a card enough)."""
    posteriors = []
    for photo in photos:
        mean_1chw, std_1chw = family.encode_photos(photo.pixels[None])
        posteriors.append(torch.stack([mean_1chw[0], std_1chw[0]]))
    return LatentBank(torch.stack(posteriors)[:, None].contiguous())
