"""The diffusion model's own loss (DDPM, arXiv 2006.11239, eq. 14; flow matching likewise).

Weighted uniformly, by the noise of the timestep (min-SNR, Hang et al., arXiv 2303.09556), or by how
much the tuned network overfits (Adaptive Personalized Training, arXiv 2507.02687, eq. 1 to 3).

Shape legend: B batch, C latent channels, h and w latent height and width, T diffusion timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastppt.families.base import Family
from fastppt.stage_config import DenoisingConfig
from fastppt_kernels import adaptive_denoising_loss


def denoising_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Return each sample's mean squared error.

    L_b = mean over C, h, w of (prediction_b - target_b)^2

    Args:
        prediction: [B, C, h, w], any float dtype.
        target: [B, C, h, w], float32 or float64; the error is taken in its dtype.

    Returns:
        [B] in the target's dtype.
    """
    return (prediction.to(target.dtype) - target).square().mean(dim=(1, 2, 3))


def min_snr_weights(signal_to_noise: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Return the weight of a sample's loss by its timestep, [T].

    weight_t = min(snr_t, gamma) / snr_t          where noise is predicted
    weight_t = min(snr_t, gamma) / (snr_t + 1)    where velocity is

    Either weighs the error of the predicted image by min(snr_t, gamma). Where there is no signal at
    all (snr_t = 0), noise weighs 1, the limit, and velocity 0.

    Source: Min-SNR (arXiv 2303.09556), section 3.4, and its supplement for the velocity.

    Args:
        signal_to_noise: [T], abar_t / (1 - abar_t).
        prediction_type: `epsilon` or `v_prediction`.
        gamma: Ratio above which a timestep weighs less.
    """
    if prediction_type == "epsilon":
        return (gamma / signal_to_noise).clamp(max=1.0)
    assert prediction_type == "v_prediction"
    return signal_to_noise.clamp(max=gamma) / (signal_to_noise + 1)


@dataclass(frozen=True)
class Indicator:
    """Says by timestep bin how much the tuned network overfits: gamma, from 0 to 1.

    gamma_bin = clamp(1 - exp(-temperature (EMA_base - EMA_tuned)), 0, 1)

    The averages are those of the denoising losses in the bin, of the base on the class prompt and
    of the tuned network on the subject prompt. They lie at fixed addresses, are NaN until a bin is
    seen, and nothing of them is read on the host.

    Source: Adaptive Personalized Training (arXiv 2507.02687), equations 1 to 3; gamma of a bin that
    was not seen is 0, our choice.

    Attributes:
        base_ema: [bins], float32 (float64 of a float64 network).
        tuned_ema: Likewise.
        num_timesteps: Of the family; the bins are equal parts of them.
        temperature: In units of 1 / loss.
        smoothing: Part of a new loss in the averages.
    """

    base_ema: Tensor
    tuned_ema: Tensor
    num_timesteps: int
    temperature: float
    smoothing: float

    @classmethod
    def of(cls, config: DenoisingConfig, family: Family) -> Indicator:
        """Make one that has seen nothing."""
        dtype = torch.promote_types(family.dtype, torch.float32)
        nothing = torch.full((config.bins,), torch.nan, device=family.device, dtype=dtype)
        temperature = config.temperature or family.indicator_temperature
        return cls(nothing, nothing.clone(), family.num_timesteps, temperature, config.smoothing)

    def bins(self, timesteps: Tensor) -> Tensor:
        """Return the bins [B] of the timesteps [B], int64 both."""
        return timesteps * len(self.base_ema) // self.num_timesteps

    def gamma_by_bin(self) -> Tensor:
        """Return gamma of each bin, [bins]; NaN of a bin that was not seen."""
        ahead = self.base_ema.double() - self.tuned_ema.double()
        gamma = -torch.expm1(-self.temperature * ahead)
        return gamma.clamp(0, 1).to(self.base_ema.dtype)

    def gamma(self, timesteps: Tensor) -> Tensor:
        """Return gamma of the timesteps' bins, [B], as far as it is known."""
        return self.gamma_by_bin().nan_to_num(0.0)[self.bins(timesteps)]

    def observe(
        self, prediction: Tensor, base_prediction: Tensor, target: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bring the averages up to date; return the loss weighted by the new gamma, and gamma.

        loss = mean_B (1 - gamma[bin_b]) L_b, with no gradient through gamma

        A loss that is not finite, as float16 can give, leaves the averages as they were.

        Args:
            prediction: [B, C, h, w], of the tuned network; it alone has a gradient.
            base_prediction: Of the base, on the same noisy latents.
            target: What both were to predict.
            timesteps: [B] int64.

        Returns:
            0-dim loss, and gamma [B].
        """
        loss, gamma, base_ema, tuned_ema = adaptive_denoising_loss(
            prediction,
            base_prediction,
            target,
            self.bins(timesteps),
            self.base_ema,
            self.tuned_ema,
            temperature=self.temperature,
            smoothing=self.smoothing,
        )
        finite = base_ema.isfinite() & tuned_ema.isfinite()
        for ema, moved in ((self.base_ema, base_ema), (self.tuned_ema, tuned_ema)):
            ema.copy_(torch.where(finite, moved, ema))
        return loss, gamma
