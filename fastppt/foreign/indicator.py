"""The overfitting indicator for loops of others: adaptive loss weights in one call.

Shape legend: B batch, W processes that train together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastppt.objectives.denoising import Indicator
from fastppt_kernels import adaptive_denoising_loss

# The largest probability of augmentation (Adaptive Personalized Training, section 4.1).
MAX_AUGMENTATION = 0.8


class OverfittingIndicator(nn.Module):
    """Says by timestep how much the tuned network overfits, and weighs the denoising loss by it.

    L_b = mean over all but the samples of (prediction_b - target_b)^2, of tuned and base network
    EMA_bin <- (1 - smoothing) EMA_bin + smoothing * mean of the L in the bin; the first L sets it
    gamma_bin = clamp(1 - exp(-temperature (EMA_base - EMA_tuned)), 0, 1)
    loss = mean_b sample_weight_b (1 - gamma[bin_b]) L_tuned_b

    Source: Adaptive Personalized Training (arXiv 2507.02687), equations 1 to 3; the mean of several
    samples of one bin, the clamp at 0, and a gamma of 0 where nothing was seen are our choice.

    A module with two buffers and no parameter, so ``to(device)`` moves it and
    ``Accelerator.register_for_checkpointing`` keeps it; do not ``prepare`` it, for it has nothing
    to train. The buffers are written where they are and never read on the host: the call can stand
    in a step that a CUDA graph captures. A loss that is not finite leaves them as they were.

    Several processes: where `torch.distributed` is initialised, `loss` gathers predictions and
    target of all processes, so that each has the EMAs that one process with all their samples would
    have, bit for bit. All must call it together, with batches of one shape. The loss is that of the
    process's own samples, as gradients are averaged over the processes afterwards.

    Args:
        num_timesteps: End of the range that timesteps lie in: 1000 for the steps of a DDPM
            schedule (0 to 999) and for the timesteps of diffusers' flow-matching schedulers, 1 for
            sigmas or times from 0 to 1. Bins are equal parts of it, of the timesteps as they are
            given: `fastppt train` bins flow matching by the place before the shift of the schedule.
        num_bins: Parts that are watched on their own.
        temperature: How sharply gamma answers, in units of 1 / loss.
        smoothing: Share of a new loss in the EMAs, > 0 and at most 1.
        device: Of the EMAs: that of the predictions.
        dtype: Of the EMAs, float32 or float64.
        synchronized: Gather over processes; without it each process follows its own samples.
        process_group: Those that train one network on different samples; None for all processes.

    Attributes:
        base_ema: [num_bins], mean denoising loss of the base; NaN of a bin that was not seen.
        tuned_ema: Likewise of the tuned network.

    Raises:
        ValueError: A number outside its range.
    """

    base_ema: Tensor
    tuned_ema: Tensor

    def __init__(
        self,
        num_timesteps: float = 1000,
        num_bins: int = 10,
        temperature: float = 1000.0,
        smoothing: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        synchronized: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_timesteps", num_timesteps),
            ("num_bins", num_bins),
            ("temperature", temperature),
        ):
            if not value > 0:
                raise ValueError(f"{name}: got {value}, want a number > 0")
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing: got {smoothing}, want > 0 and at most 1")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: got {dtype}, want torch.float32 or torch.float64")
        self.num_timesteps = num_timesteps
        self.temperature = temperature
        self.smoothing = smoothing
        self.synchronized = synchronized
        self.process_group = process_group
        for name in ("base_ema", "tuned_ema"):
            unseen = torch.full((num_bins,), torch.nan, device=device, dtype=dtype)
            self.register_buffer(name, unseen)

    def bins(self, timesteps: Tensor) -> Tensor:
        """Return the bin of each timestep, [B] int64, from 0 to num_bins - 1.

        Args:
            timesteps: [B], integers from 0 to num_timesteps - 1, or floats from 0 to num_timesteps;
                the end of that range belongs to the last bin.

        Raises:
            ValueError: Another shape, dtype or device than asked for; on the CPU also a timestep
                outside the range. On a GPU nothing is read to find one: its bin is none, and gamma
                and loss are NaN.
        """
        if timesteps.dim() != 1 or timesteps.dtype == torch.bool or timesteps.is_complex():
            raise ValueError(
                f"timesteps: got {timesteps.dtype} of shape {tuple(timesteps.shape)}, want integers"
                " or floats of shape [B], one for each sample"
            )
        if timesteps.device != self.base_ema.device:
            raise ValueError(
                f"timesteps: are on {timesteps.device}, and the indicator on "
                f"{self.base_ema.device}; move one of them with .to(device)"
            )
        if timesteps.device.type == "cpu":
            self._check_range(timesteps)
        num_bins = len(self.base_ema)
        if not timesteps.is_floating_point():
            return (
                (timesteps.long() * num_bins).div(self.num_timesteps, rounding_mode="floor").long()
            )
        times = timesteps.detach().double()
        bins = (times * num_bins / self.num_timesteps).floor().long()
        return torch.where(times == self.num_timesteps, num_bins - 1, bins)

    def gamma_by_bin(self) -> Tensor:
        """Return gamma of each bin, [num_bins]; NaN of a bin that was not seen."""
        return self._indicator.gamma_by_bin()

    def gamma(self, timesteps: Tensor) -> Tensor:
        """Return gamma as it is known so far, [B]; 0 where nothing was seen.

        Args:
            timesteps: As of `bins`.

        Raises:
            ValueError: As `bins`.
        """
        bins = self.bins(timesteps)
        inside = bins.clamp(0, len(self.base_ema) - 1)
        # An index outside would end the process on a GPU.
        return self._indicator.gamma(inside).where(inside == bins, torch.nan)

    def augmentation_probability(self, timesteps: Tensor) -> Tensor:
        """Return how likely each sample's photo is to be augmented, [B]: min(gamma, 0.8).

        Source: Adaptive Personalized Training (arXiv 2507.02687), section 4.1.

        Args:
            timesteps: As of `bins`; those that the step is going to use.

        Raises:
            ValueError: As `bins`.
        """
        return self.gamma(timesteps).clamp(max=MAX_AUGMENTATION)

    def loss(
        self,
        prediction: Tensor,
        base_prediction: Tensor,
        target: Tensor,
        timesteps: Tensor,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Take note of both losses, and return the tuned one weighted by the new gamma.

        Args:
            prediction: [B, ...] of the tuned network on the subject prompt; it alone has a
                gradient.
            base_prediction: Of that shape, of the base on the class prompt; the same noisy latents
                and timesteps.
            target: What both were to predict.
            timesteps: As of `bins`.
            sample_weight: [B], floating-point; None for ones. It has no part in gamma.

        Returns:
            0-dim, float32; float64 if a prediction or the target is. Read it on the host seldom: it
            waits for the device.

        Raises:
            ValueError: A tensor of another shape, dtype or device than asked for; it is named. As
                `bins`.
        """
        bins = self.bins(timesteps)
        if bins.shape != prediction.shape[:1]:
            raise ValueError(
                f"timesteps: got shape {tuple(timesteps.shape)}, want ({len(prediction)},), one for"
                " each sample of prediction"
            )
        if sample_weight is not None and sample_weight.shape != bins.shape:
            raise ValueError(
                f"sample_weight: got shape {tuple(sample_weight.shape)}, want {tuple(bins.shape)}, "
                "one for each sample of prediction"
            )
        if prediction.device != self.base_ema.device:
            raise ValueError(
                f"prediction: is on {prediction.device}, and the indicator on "
                f"{self.base_ema.device}; move the indicator with .to(prediction.device)"
            )
        group = self._training_group()
        if group is not None:
            _check_alike(prediction, base_prediction, target)
            if sample_weight is None:
                sample_weight = prediction.new_ones(len(prediction), dtype=torch.float32)
            sample_weight = _others_left_out(sample_weight, group)
            base_prediction, target, bins = (
                _gathered(tensor, group) for tensor in (base_prediction, target, bins)
            )
            prediction = _gathered(prediction, group)
        loss, _, base_ema, tuned_ema = adaptive_denoising_loss(
            prediction,
            base_prediction,
            target,
            bins,
            self.base_ema,
            self.tuned_ema,
            temperature=self.temperature,
            smoothing=self.smoothing,
            sample_weight=sample_weight,
        )
        finite = base_ema.isfinite() & tuned_ema.isfinite()
        for ema, moved in ((self.base_ema, base_ema), (self.tuned_ema, tuned_ema)):
            ema.copy_(torch.where(finite, moved, ema))
        return loss

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Write saved EMAs to where these are.

        Args:
            state_dict: What `state_dict` returned of an indicator with as many bins.
            strict: As of `torch.nn.Module`.
            assign: Only False: captured steps read the EMAs where they are.

        Returns:
            What `torch.nn.Module.load_state_dict` returns.

        Raises:
            ValueError: A saved EMA of another shape; `assign`.
        """
        if assign:
            raise ValueError("assign: got True, want False: the EMAs are written where they are")
        for name in ("base_ema", "tuned_ema"):
            saved, here = state_dict.get(name), self.get_buffer(name)
            if saved is not None and saved.shape != here.shape:
                raise ValueError(
                    f"state_dict: {name} has shape {tuple(saved.shape)}, want "
                    f"{tuple(here.shape)}; make the indicator with num_bins={len(saved)}"
                )
        return super().load_state_dict(state_dict, strict=strict)

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        return (
            f"num_timesteps={self.num_timesteps}, num_bins={len(self.base_ema)}, "
            f"temperature={self.temperature}, smoothing={self.smoothing}"
        )

    @property
    def _indicator(self) -> Indicator:
        """The trainer's own, of these EMAs; its timesteps are bins."""
        num_bins = len(self.base_ema)
        return Indicator(self.base_ema, self.tuned_ema, num_bins, self.temperature, self.smoothing)

    def _check_range(self, timesteps: Tensor) -> None:
        last = self.num_timesteps if timesteps.is_floating_point() else self.num_timesteps - 1
        outside = timesteps[(timesteps < 0) | ~(timesteps <= last)]
        if len(outside):
            raise ValueError(
                f"timesteps: got {outside[0].item()}, want 0 to {last}; num_timesteps is the end "
                "of the range they lie in (1 for sigmas)"
            )

    def _training_group(self) -> dist.ProcessGroup | None:
        """Return the processes to gather over; None where this one is alone."""
        if not (self.synchronized and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group if self.process_group is not None else dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


def _check_alike(prediction: Tensor, base_prediction: Tensor, target: Tensor) -> None:
    """Raise ValueError before a gather of different shapes, which would hang or fill with noise."""
    for name, tensor in (("base_prediction", base_prediction), ("target", target)):
        if tensor.shape != prediction.shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, want {tuple(prediction.shape)}, the "
                "shape of prediction"
            )


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the samples of all processes [W B, ...] in their order; the own keep their graph."""
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    parts[dist.get_rank(group)] = tensor
    return torch.cat(parts)


def _others_left_out(sample_weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return weights [W B] by which a mean over all samples is the one over this process's own."""
    num_processes = dist.get_world_size(group)
    weights = sample_weight.new_zeros(num_processes, len(sample_weight))
    weights[dist.get_rank(group)] = num_processes * sample_weight.detach()
    return weights.flatten()
