"""Which steps `bench.gpu` times. Nothing of the trainer is imported before one of them is."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.rows import Row
from bench.step_rows import print_steps

# The timed rounds of a plan.
SECONDS = 6.0
# Building, checking and capturing the ways of a full-size model, as far as that can be known.
LEAST_SECONDS = 40.0

PEER, PRIOR_PEER = "diffusers-style", "diffusers-style, prior preservation"
GRAPH_WAYS = (
    ("lora", "graph"),
    ("ppt-lora", "graph"),
    ("apt", "graph"),
    ("base pass alone", "graph"),
    ("lora", "eager"),
    (PEER, "eager"),
)
MORE_WAYS = (
    ("lora", "graph"),
    ("ppt-lora", "eager"),
    ("apt", "eager"),
    ("network alone", "graph"),
    ("diffusers-style, latents cached", "eager"),
    (PRIOR_PEER, "eager"),
)
COMPILED_WAYS = tuple((recipe, "graph+compile") for recipe in ("lora", "ppt-lora", "apt"))
# The method whole, beside the same trainables without its objectives.
APT_WAYS = (("apt-base", "graph"), ("apt-recipe", "graph"), ("base pass alone", "graph"))
# Larger batches leave no room for more of them side by side.
BATCH_WAYS = {
    2: (("lora", "graph"), ("apt", "graph"), (PEER, "eager")),
    4: (("lora", "graph"), (PEER, "eager")),
    8: (("lora", "graph"),),
}


@dataclass(frozen=True)
class StepPlan:
    """Ways to take a step of one model, timed in rotation.

    Attributes:
        title: What the ways have in common.
        ways: Recipe (or peer) and engine of each; the others are compared with the first.
        most_seconds: After these it is given up.
    """

    model: str
    title: str
    ways: tuple[tuple[str, str], ...]
    batch_size: int = 1
    resolution: int | None = None
    most_seconds: float = 90.0

    @property
    def least_seconds(self) -> float:
        return LEAST_SECONDS

    def modes(self, modes: Sequence[str]) -> tuple[str, ...]:
        """Return one: how a step is run is a matter of each way."""
        return ("steps",)

    def time(
        self, mode: str, device: str, copy_gb_per_s: float, seconds: float
    ) -> tuple[list[Row], list[Row]]:
        """Return the rows, and the refusals of what disagrees or is not made in ``seconds``."""
        from bench.step import StepWay, time_steps
        from bench.step_ways import Work
        from fastppt.mini import draw_demo_photos

        work = Work(self.model, self.batch_size, self.resolution)
        ways = [StepWay(*way) for way in self.ways]
        with tempfile.TemporaryDirectory() as folder:
            draw_demo_photos(Path(folder))
            return time_steps(
                work, ways, Path(folder), device=device, seconds=SECONDS, most_seconds=seconds
            )

    def show(self, rows: Sequence[Row]) -> None:
        print_steps(rows)

    def __str__(self) -> str:
        resolution = "" if self.resolution is None else f" at {self.resolution} px"
        return f"step, {self.model}{resolution}, batch {self.batch_size}, {self.title}"


# Before anything else but the most wanted kernels; then the rest, if there is time.
FIRST_PLANS = (
    StepPlan("sdxl", "in graphs", GRAPH_WAYS, most_seconds=140.0),
    StepPlan("sdxl", "in graphs, blocks compiled", COMPILED_WAYS, most_seconds=120.0),
    StepPlan("sd3-medium", "in graphs", GRAPH_WAYS, most_seconds=70.0),
    StepPlan("sd15", "in graphs", GRAPH_WAYS, most_seconds=50.0),
)
LAST_PLANS = (
    StepPlan("sdxl", "with text encoders that learn, in graphs", APT_WAYS),
    StepPlan("sdxl", "beside more peers", MORE_WAYS),
    *(StepPlan("sdxl", "in graphs", BATCH_WAYS[size], batch_size=size) for size in (4, 2, 8)),
    StepPlan("sdxl", "in graphs", BATCH_WAYS[2], resolution=512),
)
