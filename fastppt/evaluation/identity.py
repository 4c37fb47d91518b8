"""Which pictures show the subject: nearness to its photos, and where to draw the line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppt.evaluation.autoencoder import decode, encode
from fastppt.mini.judge import Judge
from fastppt.mini.prompt_following import read, render_pictures
from fastppt.mini.world import random_scene, random_subject

NUM_SUBJECTS, NUM_QUERIES = 20, 4
"""Other subjects that the line is drawn by, and scenes of each beside what stands for photos."""

NUM_PLAIN = 64
"""Plain objects of the noun that must not be taken for the subject."""

FIRST_SUBJECT = 500_000
"""Seed of the first other subject: neither the judge's training nor demos and benches have it."""


@dataclass(frozen=True)
class Reference:
    """What is known of the subject.

    Attributes:
        photos: The judge's embeddings of the photos, [P, E], of unit length.
        threshold: A picture whose mean cosine to the photos is at least this counts as the
            subject.
        error_rate: How often that is wrong, on the scenes that it was set by: a share of them that
            is the same on both sides, as nearly as they allow.
    """

    photos: Tensor
    threshold: float
    error_rate: float

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Return the mean cosine of each embedding [N, E] to the photos, [N]."""
        return similarity(embeddings, self.photos)


def similarity(embeddings: Tensor, photos: Tensor) -> Tensor:
    """Return (1/P) sum_p e . f_p for each of the embeddings e [N, E], with photos f [P, E]: [N]."""
    return embeddings @ photos.mean(dim=0)


def make_reference(photos: Tensor, noun: str, judge: Judge, base: Any) -> Reference:
    """Embed the photos, and set the threshold of what counts as the subject.

    The threshold has an equal error rate on rendered scenes of the noun. Of the subject nothing
    but its photos is known, so what must be accepted is shown by other subjects: scenes of each,
    compared with as many photos of the same one. What must be refused are scenes of these
    subjects, and plain objects of the noun, compared with the photos of this one. All scenes go
    through the base's VAE: no model can draw more sharply than that.

    Args:
        photos: [P, 3, 64, 64] in -1 to 1.
        noun: The subject's, one of the world's.
        judge: Who embeds.
        base: Stock pipeline of the base model.
    """
    own = read(judge, photos).embedding
    rng = np.random.default_rng(FIRST_SUBJECT)
    others = [random_subject(FIRST_SUBJECT + at, noun) for at in range(NUM_SUBJECTS)]
    others_photos = [
        random_scene(rng, style="photo", subject=other) for other in others for _ in photos
    ]
    shown = [random_scene(rng, subject=other) for other in others for _ in range(NUM_QUERIES)]
    shown += [random_scene(rng, noun=noun) for _ in range(NUM_PLAIN)]
    references = read(judge, render_pictures(others_photos)).embedding.unflatten(
        0, (NUM_SUBJECTS, len(photos))
    )
    embeddings = read(judge, decode(base, encode(base, render_pictures(shown)))).embedding
    queries = embeddings[:-NUM_PLAIN].unflatten(0, (NUM_SUBJECTS, NUM_QUERIES))
    same = torch.cat([similarity(*pair) for pair in zip(queries, references, strict=True)])
    return Reference(own, *equal_error_threshold(same, similarity(embeddings, own)))


def equal_error_threshold(same: Tensor, strange: Tensor) -> tuple[float, float]:
    """Return the threshold at which as large a share of both sets is misjudged, and that share.

    A value of at least the threshold counts as same. Where no threshold makes the two shares
    equal, it is the one that brings them nearest, and the share is their mean.

    Args:
        same: [N], should lie above.
        strange: [M], should lie below.
    """
    values = torch.cat([same, strange]).unique()
    # Between neighbours: a value right at the threshold would hang on rounding.
    candidates = (values[1:] + values[:-1]) / 2
    missed = (same[None] < candidates[:, None]).double().mean(dim=1)
    taken = (strange[None] >= candidates[:, None]).double().mean(dim=1)
    best = (missed - taken).abs() + 1e-3 * (missed + taken)
    at = int(best.argmin())
    return candidates[at].item(), (missed[at] + taken[at]).item() / 2
