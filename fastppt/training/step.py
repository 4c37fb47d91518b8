"""One training step: draw, ask the base, predict, compare, pull back, update, note.

Everything that the step reads and writes sits at a fixed device address before the first step, and
nothing is read back on the host: the same step can be captured in a CUDA graph as it stands.

Shape legend: B batch, C latent channels, h and w latent height and width, S size conditions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppt.data.latents import LatentBank
from fastppt.data.prompts import PromptBank
from fastppt.families.base import Family, PromptEmbeddings
from fastppt.objectives.attention_alignment import AttentionAlignment
from fastppt.objectives.denoising import Indicator, denoising_losses
from fastppt.objectives.direct_consistency import direct_consistency_loss
from fastppt.objectives.feature_alignment import FeatureAlignment
from fastppt.objectives.prior_preservation import join_halves, mean_of_halves
from fastppt.stage_config import ObjectivesConfig, StageConfig
from fastppt.trainables.peft_tuners import PeftAdapters
from fastppt.trainables.tokens import LearnedTokens
from fastppt.trainables.trainables import Trainables
from fastppt.training.average import MovingAverage
from fastppt.training.batch import Batch, draw, make_batch, with_class_half
from fastppt.training.loss_scale import LossScale
from fastppt.training.metric_names import LAYER_TERMS, by_layer_of, loss_names
from fastppt.training.ring import MetricRing
from fastppt_kernels import AnchoredAdamW


@dataclass(frozen=True)
class Step:
    """Everything that a step of one stage reads and writes.

    The steps of a stage's buckets share all but latents and prompts.

    Attributes:
        trainables: All that the run trains, in this stage or another; without them the network is
            the base.
        indicator: Of adaptive weighting; None without it. Likewise the alignments.
        timestep_weights: [T], of min_snr weighting; None without it.
        learning_rates: 0-dim tensors on the device by the name of the arena that is trained, also
            the optimizer's; the loop writes them.
        generator: The run's own, on the device; nothing else draws from it.
        loss_scale: Of a network in float16; None for the others.
        kept_norms: The embeddings whose lengths are kept; None where there are none.
        held_rotations: The adapters whose rotations have a limit; None where there are none.
        average: Moving average of what the stage trains; None without it.
        losses: One number for each of `loss_names`, averaged over the passes of the step so far.
        layer_losses: Likewise the layers' parts of `LAYER_TERMS`, one after the other; None where
            no layer is aligned.
        photo_numbers: [photos of the bucket] int64, their numbers in the run.
        samples: [samples of a step, 2] int64, photo number and timestep of the latest ones, in the
            order of the passes.
        class_latents: Of the class images, with prior preservation; None without it.
        class_prompts: Likewise; the class prompt is what the network is asked of each.
        class_generator: What the class half is drawn with, on the device, so that the photos' half
            is drawn as without it; None where no stage of the run has class images.
    """

    family: Family
    stage: StageConfig
    latents: LatentBank
    prompts: PromptBank
    trainables: Trainables
    indicator: Indicator | None
    timestep_weights: Tensor | None
    feature_alignment: FeatureAlignment | None
    attention_alignment: AttentionAlignment | None
    optimizer: AnchoredAdamW
    learning_rates: Mapping[str, Tensor]
    generator: torch.Generator
    ring: MetricRing
    loss_scale: LossScale | None
    kept_norms: LearnedTokens | None
    held_rotations: PeftAdapters | None
    average: MovingAverage | None
    losses: Tensor
    layer_losses: Tensor | None
    photo_numbers: Tensor
    samples: Tensor
    class_latents: LatentBank | None = None
    class_prompts: PromptBank | None = None
    class_generator: torch.Generator | None = None

    @property
    def generators(self) -> dict[str, torch.Generator]:
        """All that the run draws with, by name."""
        both = {"generator": self.generator, "class_generator": self.class_generator}
        return {name: each for name, each in both.items() if each is not None}

    @property
    def learning_rate(self) -> Tensor:
        """The first learning rate, the network's where that is trained: the one in the metrics."""
        return next(iter(self.learning_rates.values()))


def needs_base_pass(stage: StageConfig, number: int) -> bool:
    """Say whether a step of a stage asks the base; steps count from 0."""
    return stage.objectives.need_base and number % stage.base_every == 0


def run_step(step: Step, number: int = 0) -> None:
    """Take one optimizer step and note its metrics.

    loss = denoising.weight * mean_B (1 - gamma_b) L_b        (or w_t L_b, of min_snr)
           + direct_consistency.weight * L_direct
           + feature_alignment.weight * (L_mean + L_std)
           + attention_alignment.weight * L_attention
           + prior_preservation.weight * mean_B L_class
           + anchor.weight * ||theta - theta_0||^2

    The gradients of the passes of one step are averaged; the anchor's is added once, by the
    optimizer, before clipping.

    Args:
        step: What it reads and writes.
        number: Which step of the stage it is, from 0; decides whether the base is asked.
    """
    for _ in range(step.stage.gradient_accumulation):
        accumulate_gradients(step, with_base=needs_base_pass(step.stage, number))
    update_parameters(step)


def accumulate_gradients(step: Step, *, with_base: bool = True) -> None:
    """Add the gradients of one pass, and its losses to `Step.losses`.

    Args:
        step: What it reads and writes.
        with_base: Ask the base, if an objective compares with it. A pass that does not leaves the
            alignments out (NaN in the metrics) and weighs by the gamma known so far.
    """
    objectives = step.stage.objectives
    batch = make_batch(step, draw(step))
    if step.class_latents is not None:
        batch = with_class_half(step, batch)
    note_samples(step, batch)
    with ExitStack() as comparison:
        base_prediction = None
        if with_base and objectives.need_base:
            base_prediction = base_pass(step, batch)
            comparison.enter_context(compared_with_base(step, batch))
        prediction = _predict(step, batch, _tuned_prompts(step, batch))
        terms = loss_terms(step, batch, prediction, base_prediction)
        loss = weighted_sum(objectives, terms)
        # Inside, because blocks that are checkpointed run again here.
        _scaled(step, loss / step.stage.gradient_accumulation).backward()
    terms["loss"] = loss
    missing = torch.full_like(loss, torch.nan, requires_grad=False)
    losses = torch.stack([terms.get(name, missing).detach() for name in loss_names(objectives)])
    share = 1 / step.stage.gradient_accumulation
    step.losses.add_(losses, alpha=share)
    if step.layer_losses is not None:
        by_layer = [terms[by_layer_of(name)] for name in LAYER_TERMS if by_layer_of(name) in terms]
        step.layer_losses.add_(torch.cat(by_layer).detach() if by_layer else missing, alpha=share)


def note_samples(step: Step, batch: Batch) -> None:
    """Add the photos of the batch to `Step.samples`, where the oldest make room."""
    timesteps = batch.timesteps[: len(batch.photos)]
    seen = torch.stack([step.photo_numbers[batch.photos], timesteps], dim=1)
    step.samples.copy_(torch.cat([step.samples[len(seen) :], seen]))


def update_parameters(step: Step) -> None:
    """Take the optimizer's step with the gradients that there are, and note the metrics.

    Where the loss or the norm of the gradients, the anchor's among them, is not finite, parameters,
    moments and all that goes with them stay bit for bit as they are.
    """
    metrics = dict(zip(loss_names(step.stage.objectives), step.losses.unbind(), strict=True))
    backs_off = _unscale_gradients_(step, metrics["loss"])
    step.optimizer.step(skip=~metrics["loss"].isfinite(), skip_non_finite=True)
    step.optimizer.zero_grad(set_to_none=False)
    skipped = step.optimizer.skipped
    if step.kept_norms is not None:
        step.kept_norms.keep_norms_(skipped)
    if step.held_rotations is not None:
        step.held_rotations.hold_(skipped)
    if step.average is not None:
        step.average.update_(skipped)
    metrics["skipped"] = skipped
    metrics["bad"] = skipped if backs_off is None else skipped & ~backs_off
    metrics["anchor"] = step.optimizer.penalty
    metrics["loss"] = metrics["loss"] + metrics["anchor"]
    metrics["grad_norm"] = step.optimizer.grad_norm
    metrics["learning_rate"] = step.learning_rate
    # Columns of other stages.
    missing = torch.full_like(step.learning_rate, torch.nan)
    details = [] if step.layer_losses is None else [step.layer_losses]
    if step.indicator is not None:
        details.append(step.indicator.gamma_by_bin())
    step.ring.write([metrics.get(name, missing) for name in step.ring.names], details, step.samples)
    step.losses.zero_()
    if step.layer_losses is not None:
        step.layer_losses.zero_()


def base_pass(step: Step, batch: Batch) -> Tensor:
    """Ask the base with the class prompt, and let the alignments remember what it does.

    A pass of its own. As the first half of one batch with the tuned pass it took 0.93 to 1.08 times
    as long, forward and backward, and kept 2.0 times as many bytes for the backward pass
    (``bench/base_pass.py`` on mini models, on the CPU).

    Returns:
        Its prediction [B, C, h, w], without a graph.
    """
    with torch.no_grad(), step.trainables.base(), ExitStack() as memory:
        if step.feature_alignment is not None:
            memory.enter_context(step.feature_alignment.base_pass())
        if step.attention_alignment is not None:
            memory.enter_context(step.attention_alignment.base_pass())
        return _predict(step, batch, step.prompts.plain_class(batch.photos))


def loss_terms(
    step: Step, batch: Batch, prediction: Tensor, base_prediction: Tensor | None
) -> dict[str, Tensor]:
    """Return the terms of the loss, unweighted, gamma's mean, and what else a pass notes.

    All are 0-dim, but for the layers' parts of `LAYER_TERMS`, [layers], under `by_layer_of`.

    Args:
        step: What it reads and writes; the indicator takes note of the losses.
        batch: What was asked.
        prediction: [B, C, h, w], of the tuned network, whose forward pass has just ended.
        base_prediction: Likewise of the base; None in a pass that did not ask it.
    """
    terms: dict[str, Tensor] = {}
    by_layer: dict[str, Tensor] = {}
    consistency = step.stage.objectives.direct_consistency
    if step.indicator is None:
        losses = denoising_losses(prediction, batch.target)
        if step.timestep_weights is not None:
            losses = step.timestep_weights[batch.timesteps] * losses
        if batch.class_images is None:
            terms["denoising"] = losses.mean()
        else:
            terms["denoising"], terms["prior_preservation"] = mean_of_halves(losses)
    elif base_prediction is None:
        gamma = step.indicator.gamma(batch.timesteps)
        terms["denoising"] = ((1 - gamma) * denoising_losses(prediction, batch.target)).mean()
        terms["gamma"] = gamma.mean()
    else:
        terms["denoising"], gamma = step.indicator.observe(
            prediction, base_prediction, batch.target, batch.timesteps
        )
        terms["gamma"] = gamma.mean()
    if base_prediction is not None and consistency is not None:
        terms["direct_consistency"] = direct_consistency_loss(
            prediction, base_prediction, batch.target, consistency.beta
        )
    if base_prediction is not None and step.feature_alignment is not None:
        means, stds = step.feature_alignment.losses()
        by_layer |= {"feature_mean": means, "feature_std": stds}
    if base_prediction is not None and step.attention_alignment is not None:
        by_layer["attention_alignment"] = step.attention_alignment.losses()
    for name, losses in by_layer.items():
        terms[name], terms[by_layer_of(name)] = losses.sum(), losses
    if base_prediction is not None:
        base = base_prediction.to(batch.target.dtype)
        terms["prediction_difference"] = denoising_losses(prediction.detach(), base).mean()
    return terms


def weighted_sum(objectives: ObjectivesConfig, terms: dict[str, Tensor]) -> Tensor:
    """Return the loss without the anchor: each objective's weight times its terms."""
    denoising, consistency = objectives.denoising, objectives.direct_consistency
    features, attention = objectives.feature_alignment, objectives.attention_alignment
    prior = objectives.prior_preservation
    parts: list[Tensor] = []
    if denoising is not None:
        parts.append(denoising.weight * terms["denoising"])
    if prior is not None:
        parts.append(prior.weight * terms["prior_preservation"])
    if consistency is not None:
        parts.append(consistency.weight * terms["direct_consistency"])
    if features is not None and "feature_mean" in terms:
        parts.append(features.weight * (terms["feature_mean"] + terms["feature_std"]))
    if attention is not None and "attention_alignment" in terms:
        parts.append(attention.weight * terms["attention_alignment"])
    return sum(parts[1:], start=parts[0])


@contextmanager
def compared_with_base(step: Step, batch: Batch) -> Iterator[None]:
    """Let the alignments compare the tuned pass inside with the base pass before it."""
    with ExitStack() as comparison:
        if step.feature_alignment is not None:
            comparison.enter_context(step.feature_alignment.tuned_pass())
        if step.attention_alignment is not None:
            columns = step.prompts.columns[batch.photos]
            comparison.enter_context(step.attention_alignment.tuned_pass(columns))
        yield


def _tuned_prompts(step: Step, batch: Batch) -> PromptEmbeddings:
    """Return what the tuned network is asked of each row of the batch."""
    subject = step.prompts.subject(batch.photos)
    if step.class_prompts is None or batch.class_images is None:
        return subject
    plain = step.class_prompts.subject(batch.class_images)
    pooled = None
    if subject.pooled is not None and plain.pooled is not None:
        pooled = join_halves(subject.pooled, plain.pooled)
    return PromptEmbeddings(join_halves(subject.tokens, plain.tokens), pooled)


def _predict(step: Step, batch: Batch, prompts: PromptEmbeddings) -> Tensor:
    """Ask the network as it is, with these prompts; returns [B, C, h, w]."""
    return step.family.predict(batch.noisy, batch.timesteps, prompts, batch.sizes)


def _scaled(step: Step, loss: Tensor) -> Tensor:
    return loss if step.loss_scale is None else loss * step.loss_scale.scale


def _unscale_gradients_(step: Step, loss: Tensor) -> Tensor | None:
    """Take the loss scale out of the gradients; returns whether it backs off, on the device."""
    if step.loss_scale is None:
        return None
    params = (param for group in step.optimizer.param_groups for param in group["params"])
    return step.loss_scale.unscale_([param.grad for param in params], loss)
