"""The specification of the adaptive denoising loss, in the plainest code."""

import math

import torch
from torch import Tensor


def adaptive_denoising_reference(
    prediction: Tensor,
    base_prediction: Tensor,
    target: Tensor,
    bins: Tensor,
    base_ema: Tensor,
    tuned_ema: Tensor,
    *,
    temperature: float = 1000.0,
    smoothing: float = 0.1,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, gamma [B], new_base_ema and new_tuned_ema, in float64, with host reads.

    L = mean over C, H, W of squared errors, of both predictions of a sample
    EMA_bin <- (1 - smoothing) EMA_bin + smoothing * mean of the L in the bin; the first L sets it
    gamma_bin = clamp(1 - exp(-temperature (EMA_base - EMA_tuned)), 0, 1), of the new EMAs
    loss = mean_b sample_weight_b (1 - gamma[bin_b]) L_tuned_b

    Source: Adaptive Personalized Training (arXiv 2507.02687), equations 1 to 3; the mean of several
    samples of one bin and the clamp at 0 are our choice.

    Args:
        prediction: [B, ...] of the tuned network; autograd follows it.
        base_prediction: Of that shape.
        target: Of that shape.
        bins: int64 [B], each from 0 to num_bins - 1.
        base_ema: [num_bins]; NaN marks a bin that was not seen yet.
        tuned_ema: Alike.
        temperature: T of the equation.
        smoothing: The share of the new observation.
        sample_weight: [B], or None for ones.
    """
    losses = (prediction.double() - target.double()).square().flatten(1).mean(1)
    base_losses = (base_prediction.double() - target.double()).square().flatten(1).mean(1)
    new_emas = []
    for ema, observed in ((base_ema, base_losses), (tuned_ema, losses.detach())):
        new = ema.double().clone()
        for index in set(bins.tolist()):
            mean = observed[bins == index].mean()
            old = new[index]
            new[index] = mean if old.isnan() else (1 - smoothing) * old + smoothing * mean
        new_emas.append(new)
    # 1 - gamma itself: as a difference it would lose its digits where gamma is close to 1.
    kept = []
    for index in bins.tolist():
        distance = float(new_emas[0][index] - new_emas[1][index])
        kept.append(1.0 if distance <= 0 else math.exp(-temperature * distance))
    share = torch.tensor(kept, dtype=torch.float64, device=losses.device)
    weight = 1.0 if sample_weight is None else sample_weight.detach().double()
    return (weight * share * losses).mean(), 1 - share, new_emas[0], new_emas[1]
