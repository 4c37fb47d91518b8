"""Feature alignment and the adaptive denoising loss: problems, what float64 makes of them, ways.

A call does what a training step does: the base's side without a gradient, the losses of the tuned
side, and their gradient; or that gradient added to what flows into the features from elsewhere.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.shapes import Shape
from bench.ways import Call
from fastppt_kernels import (
    adaptive_denoising_loss,
    align_features,
    feature_alignment_loss,
    feature_statistics,
)
from fastppt_kernels.adaptive_denoising.reference import adaptive_denoising_reference
from fastppt_kernels.feature_alignment.reference import (
    feature_alignment_reference,
    feature_statistics_reference,
)
from fastppt_kernels.testing import draw_denoising_arguments

EPS = 1e-6
# The base's features and those of the tuned network differ by this part of their size, so that the
# difference of their statistics has digits enough to be compared.
DRIFT = 0.5
# About the size of the losses' gradients of a layer of SDXL.
INCOMING_SIZE = 1e-3

Statistics = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# The losses of all layers, and the gradient of each.
LossAndGrads = tuple[Tensor, Sequence[Tensor]]


class FeatureProblem:
    """Features of the base and of the tuned network, a tensor a layer.

    [B, C, H, W] in channels_last memory where ``channels_last``; [B, N, C] of three dimensions.
    With ``incoming``, a tensor a layer flows into the features in a backward pass.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        incoming: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.base, self.tuned = [], []
        for shape in shapes:
            base, drift = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
            for features, kept in ((base, self.base), (base + DRIFT * (1 + drift), self.tuned)):
                features = features.to(dtype)
                if channels_last and features.dim() == 4:
                    features = features.contiguous(memory_format=torch.channels_last)
                kept.append(features)
        for features in self.tuned:
            features.requires_grad_()
        self.channel_dims = [1 if len(shape) == 4 else -1 for shape in shapes]
        self.incoming = [
            torch.empty_like(tuned).normal_(std=INCOMING_SIZE, generator=generator)
            for tuned in self.tuned
            if incoming
        ]

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor, int]]:
        """Base features, tuned features and channel_dim of each layer."""
        return list(zip(self.base, self.tuned, self.channel_dims, strict=True))


def exact_features(problem: FeatureProblem) -> LossAndGrads:
    total, leaves = torch.zeros((), dtype=torch.float64), []
    for base, tuned, channel_dim in problem.pairs:
        statistics = feature_statistics_reference(base, channel_dim=channel_dim, eps=EPS)
        leaves.append(tuned.detach().double().requires_grad_())
        losses = feature_alignment_reference(
            leaves[-1], *statistics, channel_dim=channel_dim, eps=EPS
        )
        total = total.to(tuned.device) + sum(losses)
    grads = torch.autograd.grad(total, leaves)
    if problem.incoming:
        pairs = zip(grads, problem.incoming, strict=True)
        grads = tuple(grad + incoming.double() for grad, incoming in pairs)
    return total.detach(), grads


def align_op(problem: FeatureProblem) -> Call:
    def call() -> LossAndGrads:
        losses, reads = [], []
        for base, tuned, channel_dim in problem.pairs:
            with torch.no_grad():
                statistics = feature_statistics(base, channel_dim=channel_dim, eps=EPS)
            read, *own = align_features(tuned, *statistics, channel_dim=channel_dim, eps=EPS)
            losses += own
            reads.append(read)
        return _loss_and_grads(torch.stack(losses).sum(), problem.tuned, reads, problem.incoming)

    return call


def feature_op(problem: FeatureProblem) -> Call:
    def call() -> LossAndGrads:
        losses = []
        for base, tuned, channel_dim in problem.pairs:
            with torch.no_grad():
                statistics = feature_statistics(base, channel_dim=channel_dim, eps=EPS)
            losses += feature_alignment_loss(tuned, *statistics, channel_dim=channel_dim, eps=EPS)
        return _feature_grads(torch.stack(losses).sum(), problem)

    return call


def feature_autograd(problem: FeatureProblem, statistics: Statistics) -> Call:
    """What a trainer would write, with the statistics of its choice."""

    def call() -> LossAndGrads:
        losses = []
        for base, tuned, channel_dim in problem.pairs:
            with torch.no_grad():
                base_mean, base_std = statistics(base, channel_dim)
            mean, std = statistics(tuned, channel_dim)
            losses.append((mean - base_mean).square().sum(1).mean())
            losses.append((std - base_std).square().sum(1).mean())
        return _feature_grads(torch.stack(losses).sum(), problem)

    return call


def var_mean(features: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    space = (1,) if channel_dim == -1 else (2, 3)
    variance, mean = torch.var_mean(features.float(), space, correction=0)
    return mean, (variance + EPS).sqrt()


def two_means(features: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """The mean, then the mean of squares: the fastest of plain PyTorch on the CPU."""
    space = (1,) if channel_dim == -1 else (2, 3)
    features = features.float()
    mean = features.mean(space, keepdim=True)
    variance = (features - mean).square().mean(space)
    return mean.view_as(variance), (variance + EPS).sqrt()


class DenoisingProblem:
    """The arguments of the adaptive denoising loss; the one shape is that of the prediction."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        ((num_samples, *shape),) = shapes
        self.arguments = draw_denoising_arguments(
            num_samples, shape, dtype, seed=seed, device=device
        )
        self.prediction: Tensor = self.arguments["prediction"].requires_grad_()


def exact_denoising(problem: DenoisingProblem) -> LossAndGrads:
    leaf = problem.prediction.detach().double().requires_grad_()
    loss = adaptive_denoising_reference(**problem.arguments | {"prediction": leaf})[0]
    return loss.detach(), torch.autograd.grad(loss, leaf)


def denoising_op(problem: DenoisingProblem) -> Call:
    def call() -> LossAndGrads:
        loss = adaptive_denoising_loss(**problem.arguments)[0]
        return _loss_and_grads(loss, [problem.prediction])

    return call


def denoising_autograd(problem: DenoisingProblem) -> Call:
    """What a careful trainer would write, without a host read."""
    given = problem.arguments

    def call() -> LossAndGrads:
        target = given["target"].float()
        others = tuple(range(1, target.dim()))
        losses = (given["prediction"].float() - target).square().mean(others)
        with torch.no_grad():
            base_losses = (given["base_prediction"].float() - target).square().mean(others)
            bins, num_bins = given["bins"], len(given["base_ema"])
            count = torch.zeros(num_bins, device=target.device).index_add_(
                0, bins, torch.ones_like(losses)
            )
            emas = []
            for ema, observed in (("base_ema", base_losses), ("tuned_ema", losses.detach())):
                mean = torch.zeros_like(count).index_add_(0, bins, observed) / count
                new = torch.where(given[ema].isnan(), mean, torch.lerp(given[ema], mean, 0.1))
                emas.append(torch.where(count > 0, new, given[ema]))
            gamma = (1 - (-1000.0 * (emas[0] - emas[1])).exp()).clamp(0, 1)[bins]
        loss = (given["sample_weight"] * (1 - gamma) * losses).mean()
        return _loss_and_grads(loss, [problem.prediction])

    return call


def _feature_grads(loss: Tensor, problem: FeatureProblem) -> LossAndGrads:
    # Autograd adds what flows in by way of the views.
    reads = [tuned.view_as(tuned) for tuned in problem.tuned if problem.incoming]
    return _loss_and_grads(loss, problem.tuned, reads, problem.incoming)


def _loss_and_grads(
    loss: Tensor,
    leaves: Sequence[Tensor],
    reads: Sequence[Tensor] = (),
    incoming: Sequence[Tensor] = (),
) -> LossAndGrads:
    """Return the loss and the leaves' gradients, ``incoming`` being those of ``reads``."""
    return loss.detach(), torch.autograd.grad([loss, *reads], leaves, [None, *incoming])
