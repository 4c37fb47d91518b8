"""Steps whose memory is predicted and then counted or measured, for tests."""

from __future__ import annotations

import torch
from rich.console import Console

from bench.networks import FAMILY_OF, FullModel, build_pipeline
from fastppt.config import ModelConfig, RunConfig
from fastppt.data.photos import find_photos
from fastppt.families.base import Family
from fastppt.families.loading import load_family, make_family
from fastppt.training.build import build_trainables
from fastppt.training.class_images import find_class_images
from fastppt.training.encoding import encode, encode_class_sets
from fastppt.training.loop import resolve
from fastppt.training.metric_names import metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.run import new_generator
from fastppt.training.stage import build_steps
from fastppt.training.step import Step

APT = {
    "stage.0.objectives.denoising.weighting": "adaptive",
    "stage.0.objectives.feature_alignment.weight": 30.0,
    "stage.0.objectives.attention_alignment.weight": 3e-4,
}
"""All objectives of Adaptive Personalized Training."""

RAW = {"denoising": {}, "anchor": {"weight": 0.1, "form": "raw"}}
HOST = {"denoising": {}, "anchor": {"weight": 0.1, "form": "raw", "storage": "host"}}
DCO = {"direct_consistency": {}}
EIGHT_BIT = {"optimizer": {"moments": "8bit"}}


def build_full_size(name: FullModel, device: str) -> Family:
    """The family of a published model in full size, of random weights, in bf16."""
    pipeline = build_pipeline(name, device, torch.bfloat16)
    model = ModelConfig(path="owner/name")
    return make_family(FAMILY_OF[name], pipeline, model, torch.device(device), torch.bfloat16)


def prepared(config: RunConfig, family: Family | None = None) -> Step:
    """A step with all that it needs; on the CPU, unless a family is given."""
    family = load_family(config.model) if family is None else family
    config = resolve(config, family)
    trainables = build_trainables(config, family)
    if config.gradient_checkpointing:
        family.checkpoint_blocks()
    quiet = Console(quiet=True)
    images = find_class_images(config, family, trainables, "", quiet, None)
    (class_set,) = encode_class_sets(config, family, images).values() or (None,)
    buckets, _sheet = encode(config, family, find_photos(config.photos.folder), quiet)
    ring = MetricRing(metric_names(config.stage), config.log_every, family.device)
    generators = [new_generator(config, family), new_generator(config, family)]
    (step,) = build_steps(
        config,
        config.stage[0],
        family,
        trainables,
        buckets,
        ring,
        generators[0],
        class_set,
        generators[1],
    )
    return step
