"""What the steps of a stage read and write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastppt.config import ObjectivesConfig, RunConfig, StageConfig, TrainablesConfig
from fastppt.data.buckets import Bucket
from fastppt.families.attention import TextAttention
from fastppt.families.base import Family
from fastppt.objectives.anchor import anchored_groups
from fastppt.objectives.attention_alignment import AttentionAlignment, aligned_attentions
from fastppt.objectives.denoising import Indicator
from fastppt.objectives.feature_alignment import FeatureAlignment, aligned_layers
from fastppt.trainables.trainables import Trainables
from fastppt.training.loss_scale import LossScale
from fastppt.training.metric_names import bin_names, layer_loss_names, loss_names, metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.step import Step
from fastppt_kernels import AnchoredAdamW


def build_steps(
    config: RunConfig,
    stage: StageConfig,
    family: Family,
    trainables: Trainables,
    buckets: Sequence[Bucket],
    ring: MetricRing,
    generator: torch.Generator,
) -> list[Step]:
    """Make everything that the steps of a stage read and write; one step a bucket."""
    like = trainables.lora.arena.flat
    rates = {
        name: torch.zeros((), device=like.device, dtype=like.dtype) for name in trainables.arenas
    }
    settings = stage.optimizer
    optimizer = AnchoredAdamW(
        anchored_groups(trainables, rates, stage.objectives.anchor),
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or None,
    )
    loss_scale = LossScale(family.device) if family.dtype == torch.float16 else None
    tokens = stage.trainables.tokens
    objectives, key = stage.objectives, f"stage.{config.stage.index(stage)}.objectives"
    indicator = (
        Indicator.of(objectives.denoising, family)
        if objectives.adaptive and objectives.denoising is not None
        else None
    )
    layers, attentions = layers_to_align(family, objectives, key)
    feature_alignment = FeatureAlignment(family, [*layers.values()]) if layers else None
    attention_alignment = AttentionAlignment([*attentions.values()]) if attentions else None
    losses = like.new_zeros(len(loss_names(objectives)))
    layer_names = layer_loss_names(layers, attentions)
    layer_losses = like.new_zeros(len(layer_names)) if layer_names else None
    details = (*layer_names, *bin_names(objectives))
    num_samples = stage.batch_size * stage.gradient_accumulation
    ring.lay_out(details, num_samples)
    samples = torch.zeros_like(ring.samples[0])
    return [
        Step(
            family=family,
            stage=stage,
            latents=bucket.latents,
            prompts=bucket.prompts,
            switch=trainables.switch,
            indicator=indicator,
            feature_alignment=feature_alignment,
            attention_alignment=attention_alignment,
            optimizer=optimizer,
            learning_rates=rates,
            generator=generator,
            ring=ring,
            loss_scale=loss_scale,
            kept_norms=trainables.tokens if tokens is not None and tokens.keep_norm else None,
            losses=losses,
            layer_losses=layer_losses,
            photo_numbers=torch.tensor([*bucket.photos], device=family.device),
            samples=samples,
        )
        for bucket in buckets
    ]


def noted_names(config: RunConfig, family: Family) -> list[str]:
    """Return all that the steps of a run note, those of layers and bins included.

    Args:
        config: The run's.
        family: After `Family.make_adaptable`.

    Raises:
        UserError: a pattern of layers matches nothing.
    """
    names = [*metric_names(config.stage)]
    for index, stage in enumerate(config.stage):
        aligned = layers_to_align(family, stage.objectives, f"stage.{index}.objectives")
        names += [*layer_loss_names(*aligned), *bin_names(stage.objectives)]
    return names


def learning_rates(stage: StageConfig) -> dict[str, float]:
    """Return the learning rate of each trainable of a stage, before schedule and warm-up."""
    trained = {name: getattr(stage.trainables, name) for name in TrainablesConfig.model_fields}
    return {name: one.learning_rate for name, one in trained.items() if one is not None}


def layers_to_align(
    family: Family, objectives: ObjectivesConfig, key: str
) -> tuple[dict[str, nn.Module], dict[str, TextAttention]]:
    """Return the layers of feature and of attention alignment, by their paths in the network.

    There are none of what is not an objective.

    Raises:
        UserError: a pattern of layers matches nothing.
    """
    features, attention = objectives.feature_alignment, objectives.attention_alignment
    return (
        aligned_layers(family, features, f"{key}.feature_alignment") if features else {},
        aligned_attentions(family, attention, f"{key}.attention_alignment") if attention else {},
    )
