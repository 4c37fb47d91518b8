"""A world in the plane: eight classes of points, and a subject beside one of them.

Our choice throughout. Lengths are in units of the plane; over all classes a coordinate has a
standard deviation of about 1, as diffusion's noise has.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the circle that the classes' centres lie on, and of a class.
CIRCLE_RADIUS, CLASS_RADIUS = 1.4, 0.3
# The subject: a small round blob just outside its class, on the side away from the middle.
SUBJECT_STD, SUBJECT_OFFSET, SUBJECT_ANGLE = 0.05, 0.45, math.pi / 3
# A point so near to the subject's centre is one of the subject: 98.9 % of the subject's are.
SUBJECT_RADIUS = 3 * SUBJECT_STD

# Returns so many points [N, 2] of a class around the origin.
Draw = Callable[[int, torch.Generator], Tensor]


def _blob(count: int, generator: torch.Generator) -> Tensor:
    return 0.5 * torch.randn(count, 2, generator=generator)


def _stripe(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 2, generator=generator) * torch.tensor([0.7, 0.12])


def _pair(count: int, generator: torch.Generator) -> Tensor:
    side = torch.randint(2, (count, 1), generator=generator) * 1.4 - 0.7
    spread = 0.2 * torch.randn(count, 2, generator=generator)
    return spread + side * torch.tensor([0.0, 1.0])


def _ring(count: int, generator: torch.Generator) -> Tensor:
    return _arc(count, generator, 0.0, 2 * math.pi)


def _moon(count: int, generator: torch.Generator) -> Tensor:
    return _arc(count, generator, 0.0, math.pi) - torch.tensor([0.0, 0.5])


def _quarter(count: int, generator: torch.Generator) -> Tensor:
    return _arc(count, generator, math.pi, 1.5 * math.pi) + torch.tensor([0.5, 0.5])


def _square(count: int, generator: torch.Generator) -> Tensor:
    return 1.6 * torch.rand(count, 2, generator=generator) - 0.8


def _cross(count: int, generator: torch.Generator) -> Tensor:
    along = 2 * torch.rand(count, generator=generator) - 1
    across = 0.08 * torch.randn(count, generator=generator)
    upright = torch.randint(2, (count,), generator=generator) == 1
    return torch.where(upright[:, None], *(torch.stack(p, 1) for p in _both(along, across)))


def _both(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (a, b), (b, a)


def _arc(count: int, generator: torch.Generator, first: float, last: float) -> Tensor:
    angle = first + (last - first) * torch.rand(count, generator=generator)
    radius = 1 + 0.08 * torch.randn(count, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


# In the order of their labels, around the circle.
CLASSES: dict[str, Draw] = {
    "blob": _blob,
    "ring": _ring,
    "stripe": _stripe,
    "moon": _moon,
    "pair": _pair,
    "square": _square,
    "quarter": _quarter,
    "cross": _cross,
}


def draw_class(label: int, count: int, generator: torch.Generator) -> Tensor:
    """Return points [count, 2] of a class."""
    draw = list(CLASSES.values())[label]
    return class_centre(label) + CLASS_RADIUS * draw(count, generator)


def class_centre(label: int) -> Tensor:
    angle = 2 * math.pi * label / len(CLASSES)
    return CIRCLE_RADIUS * torch.tensor([math.cos(angle), math.sin(angle)])


@dataclass(frozen=True)
class Subject:
    """What is to be learned: a new concept of a class.

    Attributes:
        label: Of its class.
        centre: [2], of its points.
    """

    label: int
    centre: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return points [count, 2] of its own distribution."""
        return self.centre + SUBJECT_STD * torch.randn(count, 2, generator=generator)

    def share_of(self, points: Tensor) -> float:
        """Return which part of the points [N, 2] lies on the subject."""
        near = torch.linalg.vector_norm(points - self.centre, dim=1) < SUBJECT_RADIUS
        return near.double().mean().item()


def draw_subject(label: int, generator: torch.Generator) -> Subject:
    """Return a subject beside a class, up to `SUBJECT_ANGLE` from the way outwards."""
    turn = (2 * torch.rand((), generator=generator).item() - 1) * SUBJECT_ANGLE
    angle = 2 * math.pi * label / len(CLASSES) + turn
    offset = SUBJECT_OFFSET * torch.tensor([math.cos(angle), math.sin(angle)])
    return Subject(label, class_centre(label) + offset)
