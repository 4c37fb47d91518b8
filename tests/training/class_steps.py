"""Steps with prior preservation, whose class images are other demo photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.data.photos import find_photos
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.trainables.trainables import Trainables
from fastppt.training.build import build_trainables
from fastppt.training.class_images import find_class_images
from fastppt.training.encoding import encode, encode_class_sets
from fastppt.training.loop import resolve
from fastppt.training.metric_names import metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.run import new_generator
from fastppt.training.seeds import CLASS_STREAM
from fastppt.training.stage import build_steps
from fastppt.training.step import Step

PRIOR = "stage.0.objectives.prior_preservation"
COLORS = ("red", "green", "blue", "white", "black", "yellow")


def write_class_pictures(folder: Path, count: int = 4, size: tuple[int, int] = (80, 72)) -> Path:
    """A folder of pictures of (width, height), each of another colour and a gradient."""
    folder.mkdir(parents=True)
    ramp = Image.linear_gradient("L").resize(size)
    for number, color in enumerate(COLORS[:count]):
        picture = Image.merge("RGB", (ramp, ramp.rotate(90 * number), ramp))
        picture.paste(color, (8 * number, 8, 8 * number + 12, 40))
        picture.save(folder / f"{number}.png")
    return folder


@dataclass
class ClassStage:
    """The first stage of a run."""

    config: RunConfig
    family: Family
    trainables: Trainables
    step: Step


def class_stage(
    make_config: Callable[..., RunConfig],
    folder: Path,
    model: str = "mini-sdxl",
    dtype: torch.dtype | None = None,
    **settings: object,
) -> ClassStage:
    """The step of a run's first stage, with class images from a folder unless that is None."""
    prior = {f"{PRIOR}.folder": str(folder), f"{PRIOR}.num_images": len(list(folder.iterdir()))}
    config = make_config("lora", **{"model.path": model, **prior, **settings})
    family = load_family(config.model, dtype=dtype)
    config = resolve(config, family)
    masters = torch.promote_types(family.dtype, torch.float32)
    trainables = build_trainables(config, family, dtype=masters)
    console = Console(quiet=True)
    images = find_class_images(config, family, trainables, "", console, None)
    sets = encode_class_sets(config, family, images)
    buckets, _ = encode(config, family, find_photos(config.photos.folder), console)
    ring = MetricRing(metric_names(config.stage), 64, family.device)
    (step,) = build_steps(
        config,
        config.stage[0],
        family,
        trainables,
        buckets,
        ring,
        new_generator(config, family),
        sets[0],
        new_generator(config, family, CLASS_STREAM),
    )
    return ClassStage(config, family, trainables, step)
