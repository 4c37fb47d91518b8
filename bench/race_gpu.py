"""The races of `bench.gpu --group race`: full-size networks of random weights, in a few minutes.

Each is what DESIGN's targets speak of: 500 steps, and as many class images as diffusers' scripts
have by default. Two batches of class images are sampled, 50 steps are trained, and what the rest
would take is extrapolated and said to be. Nothing of the trainer is imported before one is run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.rows import Row, describe_target, find_row
from bench.time_limit import OutOfTimeError

if TYPE_CHECKING:
    from bench.race_plan import EntrantPlan, RacePlan
    from bench.race_results import RaceReport

SUITE = "race"
COMMAND = "python -m bench.gpu --group race"
STEPS, CLASS_IMAGES, RANK = 500, 100, 32
# Two batches: the first is slower.
SAMPLED_IMAGES, TRAINED_STEPS = 8, 50
# One entrant of the smallest model, its process included, as far as that can be known.
LEAST_SECONDS = 40.0
# For what comes after the last entrant.
MARGIN_SECONDS = 3.0

PEER = "diffusers-style"
PRIOR_PEER = f"{PEER}, prior preservation"
# The most wanted first, for the time may be up before the last: the two that the targets speak of;
# what parts their ratio into method and engine; the strongest form of the peer.
ENTRANTS = (
    *(PRIOR_PEER, "ppt-lora, graph", "ppt-lora, eager", "lora-prior, eager"),
    *(f"{PRIOR_PEER}, latents cached", "lora-prior, graph"),
)


@dataclass(frozen=True)
class GpuRace:
    """One model's race: a file of its own, and a row that says where it is.

    Attributes:
        model: As `bench.race` takes it.
        folder: Of the file.
        prefix: Of its name: what keeps it out of the tables.
        most_seconds: After these the entrants that have run are all.
        entrants: Their names, in the order in which they run.
        steps: Of training.
        trained_steps: So many of them are trained.
        class_images: Of prior preservation.
        sampled_images: So many of them are sampled.
        sampler_steps: Of each of them; None: the pipeline's default.
    """

    model: str
    folder: Path
    prefix: str = ""
    most_seconds: float = 180.0
    entrants: tuple[str, ...] = ENTRANTS
    steps: int = STEPS
    trained_steps: int = TRAINED_STEPS
    class_images: int = CLASS_IMAGES
    sampled_images: int = SAMPLED_IMAGES
    sampler_steps: int | None = None

    @property
    def least_seconds(self) -> float:
        return LEAST_SECONDS

    @property
    def ours(self) -> str:
        """The first of ours: what is held against the peer."""
        return next(name for name in self.entrants if not name.startswith(PEER))

    @property
    def part(self) -> str:
        """What was measured of the work, in words."""
        return (
            f"extrapolated from {self.sampled_images} of {self.class_images} class images and "
            f"{self.trained_steps} of {self.steps} steps; a step is timed as it is"
        )

    def modes(self, modes: Sequence[str]) -> tuple[str, ...]:
        """Return one: how a step is run is a matter of each entrant."""
        return ("jobs",)

    def time(
        self, mode: str, device: str, copy_gb_per_s: float, seconds: float
    ) -> tuple[list[Row], list[Row]]:
        """Run as many entrants as fit and leave the race's file.

        Returns:
            A row; and a refusal for each entrant that failed, which ends the race.
        """
        from bench.machine import describe_machine
        from bench.race_ratios import make_report
        from bench.race_results import write_race
        from bench.race_rounds import run_race
        from bench.race_words import describe_round
        from fastppt.errors import UserError

        until = time.monotonic() + seconds - MARGIN_SECONDS
        machine = describe_machine(device)
        path = self.folder / f"{self.prefix}{device}-race-{self.model}-{machine['date']}.json"
        rows: list[Row] = []
        with tempfile.TemporaryDirectory(prefix="fastppt-race-") as work:
            plan = make_plan(self, Path(work), device)
            machine["threads"] = plan.settings.threads
            try:
                # Written each time: the next entrant may fail.
                for last, entrants in run_race(plan, until=until):
                    print(describe_round(*last), flush=True)
                    report = make_report(machine, plan.settings, entrants, COMMAND)
                    write_race(path, report)
                    rows = [row_of(self, path, report)]
            except UserError as error:
                return rows, [{"suite": SUITE, "model": self.model, "refused": str(error)}]
        if not rows:
            raise OutOfTimeError("the time was up before the first entrant was done")
        return rows, []

    def show(self, rows: Sequence[Row]) -> None:
        """Print how many times as fast ours was, and who is left out."""
        for row in rows:
            for what, ratio in row["times as fast"].items():
                print(f"  {self.ours}, {what}: {ratio:.2f}x as fast as {PRIOR_PEER}")
            print(f"  {self.part}")
            if row["left out"]:
                print(f"  left out: {', '.join(row['left out'])}")
            print(f"  {row['file']}")

    def __str__(self) -> str:
        return f"race, {self.model}, {self.steps} steps, {self.class_images} class images"


def list_races(folder: Path, *, is_red: bool = False) -> tuple[GpuRace, ...]:
    """Return the races in the order of how much they are wanted.

    Args:
        folder: Of their files.
        is_red: The GPU tests are, so no table may be made of them.
    """
    prefix = "red-" if is_red else ""
    return (
        GpuRace("sdxl", folder, prefix, most_seconds=220.0),
        GpuRace("sd15", folder, prefix, most_seconds=100.0),
        GpuRace("sd3-medium", folder, prefix, most_seconds=170.0),
    )


def make_plan(race: GpuRace, work: Path, device: str) -> RacePlan:
    """Write the model and the photos to a folder, and return the race on them."""
    import torch

    from bench.race_plan import RacePlan
    from bench.race_results import RaceSettings
    from bench.race_rounds import prepare_model
    from fastppt.config import ModelConfig
    from fastppt.data.photos import find_photos
    from fastppt.families.loading import outline_family, resolve_dtype, resolve_resolution
    from fastppt.mini import draw_demo_photos

    dtype = resolve_dtype("auto", torch.device(device))
    source = prepare_model(race.model, work / "model", device, dtype)
    family = outline_family(ModelConfig(path=str(source), device=device), dtype)
    assert family is not None
    draw_demo_photos(work / "photos")
    settings = RaceSettings(
        model=race.model,
        family=family.name,
        resolution=resolve_resolution(None, family),
        batch_size=1,
        precision=str(dtype).removeprefix("torch."),
        rank=RANK,
        steps=race.steps,
        class_images=race.class_images,
        sampler_steps=race.sampler_steps or family.sampler_steps,
        guidance_scale=family.sampler_guidance,
        num_photos=len(find_photos(work / "photos")),
        seed=0,
        rounds=1,
        threads=torch.get_num_threads() if device == "cuda" else 1,
    )
    return RacePlan(
        settings=settings,
        entrants=choose_entrants(race.entrants, family.name),
        model=str(source),
        device=device,
        photos=work / "photos",
        class_noun="robot",
        work=work,
        sampled_images=race.sampled_images,
        trained_steps=race.trained_steps,
    )


def choose_entrants(names: Sequence[str], family: str) -> list[EntrantPlan]:
    """Return the entrants of these names; ours are called by recipe and engine."""
    from bench.race_plan import list_entrants

    ours = [name.rpartition(", ") for name in names if not name.startswith(PEER)]
    known = {
        each.name: each
        for recipe, _, engine in ours
        for each in list_entrants([recipe], [engine], family)
    }
    return [known[name] for name in names]


def row_of(race: GpuRace, path: Path, report: RaceReport) -> Row:
    """Return where a race is, and what the targets ask of it."""
    pair = race.ours, PRIOR_PEER
    found = [ratio for ratio in report.ratios if (ratio.of, ratio.against) == pair]
    names = [entrant.name for entrant in report.entrants]
    return {
        "suite": SUITE,
        "model": race.model,
        "file": path.name,
        "steps": race.steps,
        "trained steps": race.trained_steps,
        "class images": race.class_images,
        "sampled images": race.sampled_images,
        "seconds": {each.name: each.rounds[0].seconds("total") for each in report.entrants},
        "times as fast": {ratio.what: ratio.value for ratio in found},
        "left out": [name for name in race.entrants if name not in names],
    }


def list_race_targets(rows: Sequence[Row]) -> list[Row]:
    """Return what is asked of SDXL's race, beside what was measured and extrapolated."""
    row = find_row(rows, suite=SUITE, model="sdxl", steps=STEPS, **{"class images": CLASS_IMAGES})
    ratios = {} if row is None else row["times as fast"]
    what = f"SDXL, {STEPS} steps, anchored, in a graph: times as fast as {PRIOR_PEER}"
    part = f"extrapolated from {TRAINED_STEPS} steps"
    total = f"{what} ({CLASS_IMAGES} class images; {part} and {SAMPLED_IMAGES} of them)"
    return [
        describe_target(total, 11.0, ratios.get("total")),
        describe_target(
            f"{what} (class images on disk; {part})", 3.0, ratios.get("class images cached")
        ),
    ]
