"""The adaptive denoising loss: checks, the PyTorch path, the registration with torch.library."""

from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.adaptive_denoising.launch import launch_backward, launch_forward
from fastppt_kernels.checks import compute_dtype, refuse_second_derivative
from fastppt_kernels.launch import have_codes, use_triton
from fastppt_kernels.operation import operation

# What the operation returns: loss, gamma, new_base_ema, new_tuned_ema, coefficients.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def adaptive_denoising_loss(
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
    """Return the denoising loss weighted by the indicator, the indicator, and its new EMAs.

    L_b = mean over all but the samples of (prediction_b - target_b)^2, and of the base's alike
    EMA_bin <- (1 - smoothing) EMA_bin + smoothing * mean of the L in the bin; the first L sets it
    gamma_bin = clamp(1 - exp(-temperature (EMA_base - EMA_tuned)), 0, 1), of the new EMAs
    loss = mean_b sample_weight_b (1 - gamma[bin_b]) L_tuned_b

    Source: Adaptive Personalized Training (arXiv 2507.02687), equations 1 to 3; the mean of several
    samples of one bin (their order does not matter) and the clamp at 0 are our choice.

    Args:
        prediction: [B, ...], floating-point, of the tuned network on the subject prompt. The only
            one with a gradient: none flows through gamma.
        base_prediction: Of its shape, of the base on the class prompt; the same noise and timestep.
        target: Of its shape.
        bins: int64 [B]: each sample's part of the timestep range, from 0 to num_bins - 1. Another
            value is not looked for on the host: its gamma is NaN, and so is the loss.
        base_ema: float32 or float64 [num_bins], the mean loss of the base in each bin; NaN marks a
            bin that was not seen yet. Not written: the caller copies what is returned.
        tuned_ema: Alike, of the tuned network.
        temperature: T of the equation, > 0; 1 / loss.
        smoothing: The share of the new observation, > 0 and at most 1.
        sample_weight: Floating-point [B], or None for ones. No gradient flows into it.

    Returns:
        loss, 0-dim; gamma [B], each sample's own; new_base_ema and new_tuned_ema, of the dtypes of
        the EMAs. The first two are float64 if a prediction or the target is, else float32. Reading
        any of them on the host synchronises. The gradient of the prediction has its dtype and
        strides; differentiating it again raises RuntimeError.

    Raises:
        ValueError: A tensor of another shape, dtype or device than asked for, an empty one, a
            temperature or smoothing outside its range.

    Rounding: errors are squared in float32 (float64 if a prediction or the target is float64), and
        on the CPU summed so along the last dimension; all further sums, the EMAs and gamma are in
        float64 and rounded once, for the temperature multiplies a small difference by 1000. Two
        runs are equal bit by bit.

    Memory traffic: each element of the three tensors is read once; backward: of two, and one is
        written. FLOPs: 6 an element, backward 2. GPU launches: 2, backward 1, and a copy of each
        tensor whose samples lie otherwise in memory than those of the prediction; where one of the
        three tensors or an EMA is float64, PyTorch's own, more and slower.
    """
    tensors = {"prediction": prediction, "base_prediction": base_prediction, "target": target}
    _check_predictions(tensors)
    _check_bins(prediction, bins, base_ema, tuned_ema, sample_weight)
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, want > 0")
    if not 0 < smoothing <= 1:
        raise ValueError(f"smoothing: got {smoothing}, want > 0 and at most 1")
    loss, gamma, new_base_ema, new_tuned_ema, _ = _loss(
        prediction,
        # Or the graph of the base's pass would live as long as the loss.
        base_prediction.detach(),
        target.detach(),
        bins,
        base_ema,
        tuned_ema,
        sample_weight,
        temperature,
        smoothing,
    )
    return loss, gamma.detach(), new_base_ema.detach(), new_tuned_ema.detach()


def _check_predictions(tensors: dict[str, Tensor]) -> None:
    prediction = tensors["prediction"]
    shape = tuple(prediction.shape)
    if prediction.dim() < 2 or prediction.numel() == 0:
        raise ValueError(f"prediction: got shape {shape}, want [B, ...] with at least one element")
    for name, tensor in tensors.items():
        if tensor.shape != prediction.shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, want {shape}, the shape of prediction"
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, want a floating-point dtype")
        _check_device(name, tensor, prediction)


def _check_bins(
    prediction: Tensor,
    bins: Tensor,
    base_ema: Tensor,
    tuned_ema: Tensor,
    sample_weight: Tensor | None,
) -> None:
    num_samples = len(prediction)
    if bins.shape != (num_samples,) or bins.dtype != torch.int64:
        raise ValueError(
            f"bins: got {bins.dtype} of shape {tuple(bins.shape)}, want torch.int64 of shape "
            f"({num_samples},), one for each sample of prediction"
        )
    for name, ema in (("base_ema", base_ema), ("tuned_ema", tuned_ema)):
        if ema.dim() != 1 or ema.numel() == 0 or ema.shape != base_ema.shape:
            raise ValueError(
                f"{name}: got shape {tuple(ema.shape)}, want [num_bins], the same for both EMAs"
            )
        if ema.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}: got dtype {ema.dtype}, want torch.float32 or torch.float64: a narrower "
                "one would round the observations away"
            )
        _check_device(name, ema, prediction)
    _check_device("bins", bins, prediction)
    if sample_weight is None:
        return
    if sample_weight.shape != (num_samples,) or not sample_weight.dtype.is_floating_point:
        raise ValueError(
            f"sample_weight: got {sample_weight.dtype} of shape {tuple(sample_weight.shape)}, want "
            f"a floating-point dtype and shape ({num_samples},), one for each sample of prediction"
        )
    _check_device("sample_weight", sample_weight, prediction)


def _check_device(name: str, tensor: Tensor, prediction: Tensor) -> None:
    if tensor.device != prediction.device:
        raise ValueError(f"{name}: is on {tensor.device}, want {prediction.device} like prediction")


@operation("fastppt_kernels::adaptive_denoising")
def _loss(
    prediction: Tensor,
    base_prediction: Tensor,
    target: Tensor,
    bins: Tensor,
    base_ema: Tensor,
    tuned_ema: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    floats = (prediction, base_prediction, target, base_ema, tuned_ema)
    run = launch_forward if use_triton(prediction) and have_codes(floats) else plain_forward
    return run(
        prediction,
        base_prediction,
        target,
        bins,
        base_ema,
        tuned_ema,
        sample_weight,
        temperature,
        smoothing,
    )


@operation("fastppt_kernels::adaptive_denoising_backward")
def _backward(
    prediction: Tensor, target: Tensor, coefficients: Tensor, loss_grad: Tensor
) -> Tensor:
    triton = use_triton(prediction) and have_codes((prediction, target, coefficients))
    run = launch_backward if triton else plain_backward
    return run(prediction, target, coefficients, loss_grad)


def plain_forward(
    prediction: Tensor,
    base_prediction: Tensor,
    target: Tensor,
    bins: Tensor,
    base_ema: Tensor,
    tuned_ema: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    smoothing: float,
) -> Outputs:
    """Return loss, gamma, new_base_ema, new_tuned_ema and coefficients, in PyTorch."""
    dtype = compute_dtype([prediction, base_prediction, target])
    wanted = target.to(dtype)
    losses = torch.stack([_mean_squares(p - wanted) for p in (base_prediction, prediction)])
    old = torch.stack([base_ema, tuned_ema]).double()
    # [B, num_bins]; what follows is [2, B, num_bins] and [2, num_bins], the base's first.
    inside = bins[:, None] == torch.arange(len(base_ema), device=bins.device)
    count = inside.sum(0)
    mean = torch.where(inside, losses[:, :, None], 0).sum(1) / count
    moved = torch.where(old.isnan(), mean, old + smoothing * (mean - old))
    new_base, new_tuned = torch.where(count > 0, moved, old)
    kept_of_bin = (temperature * (new_tuned - new_base)).exp_().clamp_(max=1)
    kept = torch.where(inside, kept_of_bin, 0).sum(1)
    kept = torch.where(inside.any(1), kept, torch.nan)
    weight = kept if sample_weight is None else kept * sample_weight
    num_elements = prediction[0].numel()
    return (
        (weight * losses[1]).mean().to(dtype),
        (1 - kept).to(dtype),
        # Copies, for these are rows of one tensor, and results may share no memory.
        new_base.to(base_ema.dtype, copy=True),
        new_tuned.to(tuned_ema.dtype, copy=True),
        (weight * (2 / (len(bins) * num_elements))).to(dtype),
    )


def _mean_squares(errors: Tensor) -> Tensor:
    """Return the mean of squares of each sample, float64 [B]; ``errors`` are overwritten.

    Rows are summed in their own dtype, which takes half the time, and their sums in float64.
    """
    rows = errors.square_().sum(-1).double().reshape(len(errors), -1)
    return rows.sum(1) / errors[0].numel()


def plain_backward(
    prediction: Tensor, target: Tensor, coefficients: Tensor, loss_grad: Tensor
) -> Tensor:
    """Return the gradient of the prediction, in PyTorch."""
    factor = (loss_grad * coefficients).view(-1, *[1] * (prediction.dim() - 1))
    return torch.empty_like(prediction).copy_((prediction - target.to(factor.dtype)).mul_(factor))


@_loss.register_fake
def _(
    prediction: Tensor,
    base_prediction: Tensor,
    target: Tensor,
    bins: Tensor,
    base_ema: Tensor,
    tuned_ema: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    smoothing: float,
) -> Outputs:
    dtype = compute_dtype([prediction, base_prediction, target])
    gamma = prediction.new_empty(prediction.shape[0], dtype=dtype)
    new_base_ema = base_ema.new_empty(base_ema.shape)
    new_tuned_ema = tuned_ema.new_empty(tuned_ema.shape)
    return gamma.new_empty(()), gamma, new_base_ema, new_tuned_ema, torch.empty_like(gamma)


@_backward.register_fake
def _(prediction: Tensor, target: Tensor, coefficients: Tensor, loss_grad: Tensor) -> Tensor:
    return torch.empty_like(prediction)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    prediction, _, target, *_ = inputs
    ctx.save_for_backward(prediction, target, output[4])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    prediction, target, coefficients = ctx.saved_tensors
    loss_grad = coefficients.new_zeros(()) if grads[0] is None else grads[0]
    grad = _backward(prediction, target, coefficients, loss_grad)
    return grad, None, None, None, None, None, None, None, None


_loss.register_autograd(_loss_backward, setup_context=_save)
_backward.register_autograd(refuse_second_derivative("adaptive_denoising_loss"))
