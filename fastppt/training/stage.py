"""What the steps of a stage read and write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastppt.config import RunConfig
from fastppt.data.buckets import Bucket
from fastppt.data.prompts import still_banks
from fastppt.errors import UserError
from fastppt.families.attention import TextAttention
from fastppt.families.base import Family
from fastppt.objectives.anchor import anchored_groups
from fastppt.objectives.attention_alignment import AttentionAlignment, aligned_attentions
from fastppt.objectives.denoising import Indicator, min_snr_weights
from fastppt.objectives.feature_alignment import FeatureAlignment, aligned_layers
from fastppt.stage_config import ObjectivesConfig, StageConfig
from fastppt.trainables.peft_tuners import PeftAdapters
from fastppt.trainables.trainables import Trainables, part_name
from fastppt.training.average import MovingAverage
from fastppt.training.loss_scale import LossScale
from fastppt.training.metric_names import bin_names, layer_loss_names, loss_names, metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.seeds import ROUNDING_STREAM, split_seed
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
    class_images: Bucket | None = None,
    class_generator: torch.Generator | None = None,
) -> list[Step]:
    """Make everything that the steps of a stage read and write; one step a bucket.

    What they begin with, anchors and averages and prompts where text stands still, is made of the
    values that are there now. Class images and their generator belong to prior preservation.
    """
    trainables.train(stage.trainables.given.keys())
    values = next(iter(trainables.arenas.values())).flat
    # Values may have 16 bits; what is counted with them has not.
    like = values.new_empty(0, dtype=torch.promote_types(values.dtype, torch.float32))
    # A trainable whose targets leave a part without weights has no arena of it.
    moving = learning_rates(stage).keys() & trainables.arenas.keys()
    rates = {name: like.new_zeros(()) for name in trainables.arenas if name in moving}
    settings = stage.optimizer
    optimizer = AnchoredAdamW(
        anchored_groups(trainables, rates, stage.objectives.anchor, settings.moments),
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or None,
        seed=split_seed(config.seed, ROUNDING_STREAM),
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
    prompts = [bucket.prompts for bucket in buckets]
    class_prompts = [class_images.prompts] if class_images is not None else []
    if not stage.trainables.move_text:
        prompts = still_banks(prompts)
        class_prompts = [still for bank in class_prompts for still in still_banks([bank])]
    average = MovingAverage(trainables, rates, stage.ema_decay) if stage.ema_decay else None
    return [
        Step(
            family=family,
            stage=stage,
            latents=bucket.latents,
            prompts=bank,
            trainables=trainables,
            indicator=indicator,
            timestep_weights=timestep_weights(family, objectives, key),
            feature_alignment=feature_alignment,
            attention_alignment=attention_alignment,
            optimizer=optimizer,
            learning_rates=rates,
            generator=generator,
            ring=ring,
            loss_scale=loss_scale,
            kept_norms=trainables.tokens if tokens is not None and tokens.keep_norm else None,
            held_rotations=_held_rotations(stage, trainables),
            average=average,
            losses=losses,
            layer_losses=layer_losses,
            photo_numbers=torch.tensor([*bucket.photos], device=family.device),
            samples=samples,
            class_latents=class_images.latents if class_images is not None else None,
            class_prompts=next(iter(class_prompts), None),
            class_generator=class_generator,
        )
        for bucket, bank in zip(buckets, prompts, strict=True)
    ]


def _held_rotations(stage: StageConfig, trainables: Trainables) -> PeftAdapters | None:
    """Return the adapters that are trained and have a limit."""
    network = trainables.network
    moves = stage.trainables.network is not None
    return network if isinstance(network, PeftAdapters) and moves and network.are_held else None


def check_objectives(config: RunConfig, family: Family) -> None:
    """Refuse objectives that mean nothing to the model's family.

    Raises:
        UserError: names the key, and what it could be.
    """
    for index, stage in enumerate(config.stage):
        timestep_weights(family, stage.objectives, f"stage.{index}.objectives")


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
    """Return the learning rate of each arena of a stage, before schedule and warm-up."""
    return {
        part_name(name, part): rate
        for name, table in stage.trainables.given.items()
        for part, rate in table.rates.items()
    }


def timestep_weights(family: Family, objectives: ObjectivesConfig, key: str) -> Tensor | None:
    """Return the weight of a sample by its timestep, [T]; None where all weigh the same.

    Raises:
        UserError: the model was not trained by DDPM, which min_snr is about.
    """
    denoising = objectives.denoising
    if denoising is None or denoising.weighting != "min_snr":
        return None
    ratios = family.signal_to_noise()
    if ratios is None:
        raise UserError(
            f"{key}.denoising.weighting: min_snr weighs by DDPM's signal-to-noise ratio, and "
            f"{family.model.path} was trained by flow matching, which has a weighting of its own "
            'in how timesteps are drawn; set it to "uniform"'
        )
    return min_snr_weights(ratios, family.prediction_type, denoising.snr_gamma)


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
