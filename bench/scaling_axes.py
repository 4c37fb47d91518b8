"""What grows, one thing at a time, in `bench.scaling`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from bench.networks import FULL_MODELS
from bench.step_ways import Settings, Source, Work

Kind = Literal["a step", "a run", "runs in turn"]
STEP, RUN, RUNS = "a step", "a run", "runs in turn"


@dataclass(frozen=True)
class Axis:
    """One thing that grows.

    Attributes:
        name: As the command line calls it.
        x: What is counted on it.
        unit: One of these.
        of: Whose cost it is: a step's, a whole run's, or that of several runs one after the other.
        mini: Its values on a mini model.
        full: Its values on a full-size one.
    """

    name: str
    x: str
    unit: str
    of: Kind
    mini: tuple[float, ...]
    full: tuple[float, ...]

    def values(self, model: str) -> tuple[float, ...]:
        if self.name == "resolution" and model == "sd15":
            return SD15_SIDES
        return self.full if model in FULL_MODELS else self.mini


# SD1.5's own side is 512 pixels.
SD15_SIDES = (256, 384, 512, 640, 768)
RESOLUTION = Axis(
    name="resolution",
    x="pixels of a photo",
    unit="pixel",
    of=STEP,
    mini=(64, 96, 128, 192, 256),
    full=(512, 640, 768, 1024, 1280),
)
BATCH = Axis("batch", "photos in a step", "photo", STEP, (1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 6))
RANK = Axis(
    "rank", "rank of the adapters", "rank", STEP, (4, 8, 16, 32, 64, 128), (4, 8, 16, 32, 64, 128)
)
# As parts of the projections that can be adapted; what is counted are the tensors.
TENSORS = Axis(
    "tensors", "adapter tensors", "tensor", STEP, (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1), (1 / 8, 1 / 2, 1)
)
STEPS = Axis("steps", "steps of a run", "step", RUN, (10, 20, 40, 80, 160), (25, 50, 100, 200))
SUBJECTS = Axis("subjects", "subjects", "subject", RUNS, (1, 2, 3, 4, 6), (1, 2, 3))
AXES = {axis.name: axis for axis in (RESOLUTION, BATCH, RANK, TENSORS, STEPS, SUBJECTS)}


@dataclass(frozen=True)
class Point:
    """One value of an axis of steps.

    Attributes:
        value: As the axis has it.
        work: What is trained there.
        changes: Settings of the run over the recipe's.
    """

    value: float
    work: Work
    changes: Settings = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.value:g}"


def check_values(axis: Axis, values: Sequence[float]) -> None:
    """Refuse values that the axis does not have.

    Raises:
        ValueError: one that is no part of the projections, or no count; names it.
    """
    for value in values:
        if axis is TENSORS:
            if not 0 < value <= 1:
                raise ValueError(f"want a part of the projections in (0, 1], got {value:g}")
        elif value < 1 or value != int(value):
            raise ValueError(f"want whole numbers from 1 on for {axis.name}, got {value:g}")


def list_points(axis: Axis, values: Sequence[float], base: Work, source: Source) -> list[Point]:
    """Return the points of an axis of steps, by rising value.

    Args:
        axis: Whose cost is a step's.
        values: On it.
        base: What is trained wherever the axis does not say otherwise.
        source: The model.
    """
    make: dict[str, Callable[[float], Point]] = {
        "resolution": lambda side: Point(side, replace(base, resolution=int(side))),
        "batch": lambda size: Point(size, replace(base, batch_size=int(size))),
        "rank": lambda rank: Point(rank, replace(base, rank=int(rank))),
    }
    if axis.name in make:
        return [make[axis.name](value) for value in sorted(values)]
    groups = [list(group.names) for group in source.make_family().make_adaptable()]
    return [
        Point(part, base, {"stage.0.trainables.lora.targets": choose_targets(groups, part)})
        for part in sorted(values)
    ]


def choose_targets(groups: Sequence[Sequence[str]], part: float) -> list[str]:
    """Return the names of a part of the groups, spread evenly over all of them.

    The first group is always among them, so that the backward pass goes as far back at every
    point; groups, whose projections share an input, stay whole.

    Args:
        groups: Names of projections, in the order of the network.
        part: In (0, 1].
    """
    count = max(1, round(part * len(groups)))
    chosen = [index * len(groups) // count for index in range(count)]
    return [name for index in chosen for name in groups[index]]
