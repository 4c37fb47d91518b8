"""Who runs in a race, and what each of them is given: alike, but for what makes it another way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.race_ratios import EAGER
from bench.race_results import Kind, RaceSettings, Record
from fastppt.config import RunConfig
from fastppt.config_io import RECIPES, build_config, load_recipe, stage_tables
from fastppt.errors import UserError

# In the order of the report; of them, those that there are for the model's family.
ALL_RECIPES = (
    *("lora-prior", "dreambooth-prior", "custom-diffusion-prior"),
    *("ppt-lora", "ppt-dreambooth", "ppt-custom-diffusion"),
    *("apt", "dco", "rare-token"),
)
# Where compiling is worth it depends on how many runs there are; `--engines` adds it.
ENGINES = {"cpu": ("eager",), "cuda": ("eager", "graph")}

PEER = "diffusers-style"
PRIOR_PEER = f"{PEER}, prior preservation"
CACHED_PEER = f"{PRIOR_PEER}, latents cached"
PEER_NOTES = {
    PEER: "photos alone: nothing holds the rest of the model",
    PRIOR_PEER: "the scripts' defaults: photos and class images are encoded anew in each step",
    CACHED_PEER: "the strongest form that a user has: the flag --cache_latents, which the advanced "
    "scripts and those of the newest models have",
}

# Class images that are sampled at a time: the default of diffusers' scripts, and of ours.
SAMPLING_BATCH = 4
# Of a part, the last batch says how long the others take; the first is slower.
LEAST_SAMPLED = 2 * SAMPLING_BATCH
LEAST_TRAINED = 3

# Of a prompt, of SD3's T5: the default of diffusers' script, and what our trainer reads of it.
T5_TOKENS = 77

# What our configuration calls a precision.
SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OBJECTIVES, TRAINABLES = "objectives", "trainables"


class EntrantPlan(Record):
    """One way to teach the subject."""

    name: str
    kind: Kind
    recipe: str | None = None
    engine: str = EAGER
    prior: bool = False
    """With class images."""
    cached: bool = False
    """A peer that caches latents; ours always does."""

    @property
    def samples_like(self) -> str:
        """Whose class images are the same, from the same code: one word for all of them."""
        sampler = "captured" if "graph" in self.engine else EAGER
        return self.kind if self.recipe is None else f"{self.recipe}, {sampler}"

    @property
    def slug(self) -> str:
        """Of a folder's name."""
        return self.name.replace(",", "").replace(" ", "-")

    @property
    def note(self) -> str:
        return PEER_NOTES.get(self.name, "")

    def settings(self) -> dict[str, str | int | float | bool | None]:
        """Return what it is given that the race's settings do not say."""
        found: dict[str, str | int | float | bool | None] = {}
        if self.kind == "diffusers":
            found = {"optimizer": "AdamW", "schedule": "constant", "latents cached": self.cached}
        if self.prior:
            found |= {"prior weight": 1.0, "class images at a time": SAMPLING_BATCH}
        return found


class Job(Record):
    """What the process of one entrant is given: the whole of it, as JSON."""

    settings: RaceSettings
    entrant: EntrantPlan
    model: str
    """Diffusers folder."""
    device: str
    photos: Path
    class_noun: str
    output: Path
    """Folder of what the job writes."""
    class_images: Path
    """Folder of the class images; where they are there already, they are not sampled."""
    sampled_images: int
    """Class images that are sampled (or found); the other ones' time is extrapolated."""
    trained_steps: int
    """Steps that are trained; likewise."""

    @property
    def prompts(self) -> tuple[str, str]:
        """Of subject and class, as our recipe `lora-prior` has them."""
        return f"a photo of sks {self.class_noun}", f"a photo of a {self.class_noun}"


@dataclass(frozen=True)
class RacePlan:
    """A race before it is run.

    Attributes:
        settings: What all are given.
        entrants: Who runs, in the order of the first round.
        model: Diffusers folder.
        device: "cpu" or "cuda".
        photos: Folder.
        class_noun: What they show.
        work: Folder of what the jobs write.
        keep: Leave that there.
        sampled_images: Class images that are sampled; None for all. Where that takes too long, a
            few are, and what the others would take is extrapolated and said to be.
        trained_steps: Steps that are trained; None for all.
    """

    settings: RaceSettings
    entrants: Sequence[EntrantPlan]
    model: str
    device: str
    photos: Path
    class_noun: str
    work: Path
    keep: bool = False
    sampled_images: int | None = None
    trained_steps: int | None = None

    def job(self, entrant: EntrantPlan, output: Path, class_images: Path) -> Job:
        """Return what an entrant is given."""
        return Job(
            settings=self.settings,
            entrant=entrant,
            model=self.model,
            device=self.device,
            photos=self.photos,
            class_noun=self.class_noun,
            output=output,
            class_images=class_images,
            sampled_images=self.sampled_images or self.settings.class_images,
            trained_steps=self.trained_steps or self.settings.steps,
        )


def list_entrants(recipes: Sequence[str], engines: Sequence[str], family: str) -> list[EntrantPlan]:
    """Return diffusers-style jobs and ours: each recipe under each engine.

    Raises:
        UserError: a recipe that there is not, or not for the family.
    """
    peers = [
        EntrantPlan(name=PRIOR_PEER, kind="diffusers", prior=True),
        EntrantPlan(name=CACHED_PEER, kind="diffusers", prior=True, cached=True),
        EntrantPlan(name=PEER, kind="diffusers"),
    ]
    for recipe in recipes:
        check_recipe(recipe, family)
    ours = [
        EntrantPlan(
            name=f"{recipe}, {engine}",
            kind="ours",
            recipe=recipe,
            engine=engine,
            prior=any("prior_preservation" in table for table in _objectives(recipe, family)),
        )
        for recipe in recipes
        for engine in engines
    ]
    return [*peers, *ours]


def check_recipe(recipe: str, family: str) -> None:
    """Refuse a recipe that does not exist for the family.

    Raises:
        UserError: names those that there are.
    """
    if recipe not in RECIPES or family not in load_recipe(recipe)[0].families:
        fitting = ", ".join(recipes_for(family, RECIPES))
        raise UserError(f"--recipes {recipe}: is no recipe for {family}; there are {fitting}")


def recipes_for(family: str, recipes: Sequence[str] = ALL_RECIPES) -> list[str]:
    """Return those recipes that there are for a family."""
    return [name for name in recipes if family in load_recipe(name)[0].families]


def make_config(job: Job) -> RunConfig:
    """Return the configuration of one of our runs: the recipe, and the race's settings over it.

    Pictures, plots and checkpoints beside the result are off, for no other entrant makes any, and
    gradients are accumulated over one pass. Rates and weights stay the recipe's: they take no time.
    """
    settings = job.settings
    keys: dict[str, Any] = {
        "model.path": job.model,
        "model.device": job.device,
        "model.precision": SHORT_NAMES[settings.precision],
        "photos.folder": str(job.photos),
        "photos.resolution": settings.resolution,
        "prompts.class_noun": job.class_noun,
        "output": str(job.output),
        "seed": settings.seed,
        "engine": job.entrant.engine,
        "samples.enabled": False,
        "plots": False,
    }
    assert job.entrant.recipe is not None
    stages = stage_tables(job.entrant.recipe, settings=list(keys.items()))
    shares = split_steps(job.trained_steps, [stage.get("steps", 1) for stage in stages])
    for number, (stage, steps) in enumerate(zip(stages, shares, strict=True)):
        place = f"stage.{number}"
        keys |= {
            f"{place}.steps": steps,
            f"{place}.batch_size": settings.batch_size,
            f"{place}.gradient_accumulation": 1,
            f"{place}.checkpoint_every": 0,
        }
        for name in ("lora", "text_encoder_lora"):
            if name in stage[TRAINABLES]:
                keys[f"{place}.{TRAINABLES}.{name}.rank"] = settings.rank
        if "prior_preservation" in stage[OBJECTIVES]:
            prior = f"{place}.{OBJECTIVES}.prior_preservation"
            keys |= {
                f"{prior}.num_images": job.sampled_images,
                f"{prior}.steps": settings.sampler_steps,
                f"{prior}.guidance_scale": settings.guidance_scale,
                f"{prior}.batch_size": SAMPLING_BATCH,
                f"{prior}.seed": settings.seed,
                f"{prior}.cache": str(job.class_images),
            }
    return build_config(job.entrant.recipe, settings=list(keys.items()))


def split_steps(total: int, parts: Sequence[int]) -> list[int]:
    """Return the steps of each stage, in the recipe's proportions, each at least one.

    Raises:
        UserError: fewer steps than stages.
    """
    if total < len(parts):
        raise UserError(f"--steps {total}: a recipe of {len(parts)} stages needs at least as many")
    shares = [max(1, math.floor(total * part / sum(parts))) for part in parts]
    shares[shares.index(max(shares))] += total - sum(shares)
    return shares


def check_part(name: str, part: int | None, whole: int, least: int, multiple: int = 1) -> None:
    """Refuse a part of the work from which the rest cannot be told.

    Args:
        name: Of the flag.
        part: Its value; None: all is done.
        whole: What there is to do.
        least: Fewer say nothing of the rest.
        multiple: Part and rest are done so many at a time: what is done of a last few is smaller,
            and says nothing of the others.

    Raises:
        UserError: names the flag.
    """
    if part is None:
        return
    if not least <= part <= whole:
        raise UserError(f"--{name} must be {least} to {whole}, got {part}; leave it out to do all")
    if part < whole and (part % multiple or whole % multiple):
        raise UserError(
            f"--{name} {part} of {whole}: must both be multiples of {multiple}, which are done at "
            "a time; leave it out to do all"
        )


def _objectives(recipe: str, family: str) -> list[dict[str, Any]]:
    stages = load_recipe(recipe, family)[1]["stage"]
    return [stage[OBJECTIVES] for stage in stages]
