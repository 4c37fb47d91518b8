"""What is measured of a tuned model of the plane, and of several seeds together."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.toy2d_model import Model, add_noise, weight_distance
from bench.toy2d_world import CLASSES, Subject

# One in the middle of each tenth of the timesteps.
TIMESTEPS = range(50, 1000, 100)


def energy_distance(ours: Tensor, theirs: Tensor) -> float:
    """Return sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|) of two samples [N, 2] and [M, 2].

    Source: Székely and Rizzo, "Energy statistics" (2013). It is 0 for equal samples alone; for two
    far apart in comparison to their width it is the root of twice the distance between them.
    """
    ours, theirs = ours.double(), theirs.double()
    within = torch.cdist(ours, ours).mean() + torch.cdist(theirs, theirs).mean()
    # Rounding may leave less than nothing.
    return (2 * torch.cdist(ours, theirs).mean() - within).clamp(min=0).sqrt().item()


@dataclass(frozen=True)
class Draws:
    """What every model of a seed is asked to draw, and judged by.

    Attributes:
        noise: [N, 2], what the sampler starts from, the same for each label.
        truth: [N, 2], points of the subject's own distribution.
    """

    noise: Tensor
    truth: Tensor

    def sample(self, model: Model) -> list[Tensor]:
        """Return points [N, 2] of each label that the model knows."""
        count, labels = len(self.noise), torch.arange(len(model.embeddings))
        points = model.sample(labels.repeat_interleave(count), self.noise.repeat(len(labels), 1))
        return list(points.split(count))


def measure(
    tuned: Model, base: Model, subject: Subject, draws: Draws, base_points: Sequence[Tensor]
) -> dict[str, object]:
    """Return the numbers of a tuned model, by name.

    Samples of the two start from the same noise: of an unchanged model every drift is exactly 0.

    Args:
        tuned: Knows the subject by its last label.
        base: What it was tuned from.
        subject: What it was to learn.
        draws: Of the seed.
        base_points: What the base draws of each class.
    """
    own = subject.label
    others = [label for label in range(len(CLASSES)) if label != own]
    points = draws.sample(tuned)
    drifts = [energy_distance(points[i], base_points[i]) for i in range(len(CLASSES))]
    differences = [noise_difference(tuned, base, i, base_points[i], draws) for i in [own, *others]]
    own_difference = differences[0]
    other_difference = torch.tensor(differences[1:]).mean(0).tolist()
    return {
        "subject distance": energy_distance(points[-1], draws.truth),
        "subject share": subject.share_of(points[-1]),
        "class drift": drifts[own],
        "class share on subject": subject.share_of(points[own]),
        "other drift": statistics.mean(drifts[label] for label in others),
        "class noise difference": statistics.mean(own_difference),
        "other noise difference": statistics.mean(other_difference),
        "class noise difference by timestep": own_difference,
        "other noise difference by timestep": other_difference,
        "weight distance": weight_distance(tuned, base),
        "word distance": (tuned.embeddings[-1] - base.embeddings[own]).norm().item(),
    }


def noise_difference(
    tuned: Model, base: Model, label: int, points: Tensor, draws: Draws
) -> list[float]:
    """Return the mean squared difference of the two predictions at each of `TIMESTEPS`.

    Args:
        tuned: One model.
        base: The other.
        label: What both are asked for.
        points: [N, 2], of that class; the draws' noise, shuffled, is added to them.
        draws: Of the seed.
    """
    noise, labels = draws.noise.roll(1, 0), torch.full((len(points),), label)
    differences = []
    for timestep in TIMESTEPS:
        times = torch.full((len(points),), timestep)
        noisy = add_noise(points, times, noise)
        predicted = [model.predict(noisy, times, labels) for model in (tuned, base)]
        differences.append((predicted[0] - predicted[1]).square().mean().item())
    return differences
