"""Feature alignment: checks, the PyTorch path, and the registration with torch.library."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.checks import compute_dtype, refuse_second_derivative
from fastppt_kernels.feature_alignment.launch import launch_backward, launch_statistics
from fastppt_kernels.launch import have_codes, use_triton
from fastppt_kernels.operation import operation

# Features of a piece on the CPU, measured: what is computed of them stays in the cache.
CPU_PIECE_SIZE = 1 << 18


def feature_statistics(
    features: Tensor, *, channel_dim: int = 1, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over space of each channel of each sample.

    mean = mean_n x_n,   std = sqrt(mean_n (x_n - mean)^2 + eps)

    Source: Adaptive Personalized Training (arXiv 2507.02687), equations 4 and 5; statistics per
    channel, the population variance and ``eps`` are our choice.

    Args:
        features: [B, C, ...] or, with ``channel_dim`` -1, [B, ..., C]; floating-point, of any
            strides: contiguous, channels_last, a view of either. Not written, not copied.
        channel_dim: 1 or -1.
        eps: Added to the variance, > 0: without it a channel without variance has no gradient.

    Returns:
        mean [B, C] and std [B, C], float64 for float64 features, else float32. Both are
        differentiable: dx = (dmean + dstd * (x - mean) / std) / N, in one pass over the features,
        of their dtype and strides. It is a new tensor, which autograd adds to what else flows into
        the features. Differentiating that gradient again raises RuntimeError.

    Raises:
        ValueError: features with fewer than three dimensions, empty or not floating-point; on a
            GPU also those with positions that two strides do not reach; another ``channel_dim``;
            ``eps`` not > 0.

    Rounding: in float32 (float64 of float64 features). The mean of a piece comes first, then the
        squares of what differs from it; pieces are merged by count, mean and sum of squares (Chan,
        Golub, LeVeque 1983) in a fixed order. Two runs are equal bit by bit, and the statistics
        are those of :func:`feature_alignment_loss`.

    Memory traffic: each feature is read once, 8 bytes a channel are written; backward: each is
        read and its gradient written once. FLOPs: 4 a feature, backward 3: memory is the limit.
        GPU launches: 2, backward 1; of float64 features, PyTorch's own, more and slower.
    """
    _check_features(features, channel_dim, eps)
    return _statistics(_channels_second(features, channel_dim), eps)


def feature_alignment_loss(
    features: Tensor,
    base_mean: Tensor,
    base_std: Tensor,
    *,
    channel_dim: int = 1,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return how far the features' mean and standard deviation are from those of the base.

    For loops that cannot put :func:`align_features` between a layer and what reads its output: that
    one gives the same losses and has the gradient added in one pass.

    mean_loss = mean_b sum_c (mean - base_mean)^2,   std_loss = mean_b sum_c (std - base_std)^2

    Source: Adaptive Personalized Training (arXiv 2507.02687), equations 4 and 5.

    Args:
        features: As of :func:`feature_statistics`, of the tuned network.
        base_mean: [B, C], floating-point, on the device of ``features``: what
            :func:`feature_statistics` returned for the base. No gradient flows into it.
        base_std: Alike.
        channel_dim: 1 or -1.
        eps: Added to the variance, > 0; the same as for the base.

    Returns:
        mean_loss and std_loss, 0-dim, float64 for float64 features, else float32; exactly 0, with
        gradients of 0, where the features are the base's, in memory of the same layout. Reading
        them on the host synchronises. The gradient of the features is as of
        :func:`feature_statistics`, with dmean = 2 / B * dmean_loss * (mean - base_mean), and dstd
        alike.

    Raises:
        ValueError: As :func:`feature_statistics`; base statistics of another shape or device, or
            not floating-point.

    Rounding: as of :func:`feature_statistics`. A difference that is small beside the statistics
        keeps what their float32 leaves of it.

    Memory traffic, FLOPs and GPU launches: as of :func:`feature_statistics`; the losses are summed
        where the pieces are merged.
    """
    _check_features(features, channel_dim, eps)
    base_mean, base_std = _check_base(features, channel_dim, base_mean, base_std)
    values = _channels_second(features, channel_dim)
    _, _, mean_loss, std_loss = _alignment(values, base_mean, base_std, eps)
    return mean_loss, std_loss


def align_features(
    features: Tensor,
    base_mean: Tensor,
    base_std: Tensor,
    *,
    channel_dim: int = 1,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features for the network to go on with, and the losses of their statistics.

    A network that reads the returned features in place of those given, as a forward hook can have
    it, gets both gradients in one pass: with g what flows into the returned ones,

        dx = g + (dmean + dstd * (x - mean) / std) / N

    with dmean and dstd of :func:`feature_alignment_loss`, whose losses these are.

    Args:
        features: As of :func:`feature_alignment_loss`, as are the next four.
        base_mean: [B, C].
        base_std: [B, C].
        channel_dim: 1 or -1.
        eps: Added to the variance, > 0.

    Returns:
        The features, a view of those given, not to be written in place; mean_loss and std_loss,
        0-dim. Any of the three may be left unread. Differentiating the gradient again raises
        RuntimeError.

    Raises:
        ValueError: As :func:`feature_alignment_loss`.

    Rounding: as of :func:`feature_alignment_loss`, but that g is added in float32 (float64 of
        float64 features) and the sum is rounded once, where autograd rounds both terms and their
        sum. Exactly g where the features are the base's and finite.

    Memory traffic: forward as of :func:`feature_alignment_loss`. Backward 3 reads or writes a
        feature; the loss alone takes 2, and autograd 3 more to add it to g. A g that does not lie
        like the features, channels first or last, is copied before, 2 more. GPU launches: 2,
        backward 1.
    """
    _check_features(features, channel_dim, eps)
    base_mean, base_std = _check_base(features, channel_dim, base_mean, base_std)
    aligned: tuple[Tensor, Tensor, Tensor] = _AlignFeatures.apply(  # type: ignore[no-untyped-call]
        features, base_mean, base_std, channel_dim, eps
    )
    return aligned


def _check_base(
    features: Tensor, channel_dim: int, base_mean: Tensor, base_std: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the base's statistics in the dtype of the features', without a gradient."""
    shape = features.shape
    wanted = (shape[0], shape[channel_dim])
    for name, base in (("base_mean", base_mean), ("base_std", base_std)):
        if base.shape != wanted:
            raise ValueError(
                f"{name}: got shape {tuple(base.shape)}, want {wanted}: the samples and channels "
                f"of features {tuple(shape)}, channel_dim {channel_dim}"
            )
        if not base.dtype.is_floating_point:
            raise ValueError(f"{name}: got dtype {base.dtype}, want a floating-point dtype")
        if base.device != features.device:
            raise ValueError(f"{name}: is on {base.device}, want {features.device} like features")
    # Or the backward would go on, with zeros, through a base pass that was not under no_grad.
    dtype = compute_dtype([features])
    return base_mean.detach().to(dtype), base_std.detach().to(dtype)


def _check_features(features: Tensor, channel_dim: int, eps: float) -> None:
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim: got {channel_dim}, want 1 or -1")
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, want > 0")
    shape = tuple(features.shape)
    if features.dim() < 3:
        raise ValueError(f"features: got shape {shape}, want [B, C, ...] or [B, ..., C]")
    if features.numel() == 0:
        raise ValueError(f"features: got shape {shape}, want at least one element")
    if not features.dtype.is_floating_point:
        raise ValueError(f"features: got dtype {features.dtype}, want a floating-point dtype")


def _channels_second(features: Tensor, channel_dim: int) -> Tensor:
    """Return the features as a view [B, C, ...]."""
    return features if channel_dim == 1 else features.movedim(-1, 1)


# In what follows features are [B, C, ...].


@operation("fastppt_kernels::feature_statistics")
def _statistics(features: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if use_triton(features) and have_codes([features]):
        mean, std = launch_statistics(features, None, eps)
        return mean, std
    return plain_statistics(features, eps)


@operation("fastppt_kernels::feature_alignment")
def _alignment(
    features: Tensor, base_mean: Tensor, base_std: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, std, mean_loss, std_loss; the base in the dtype of the statistics."""
    if use_triton(features) and have_codes([features]):
        mean, std, mean_loss, std_loss = launch_statistics(features, (base_mean, base_std), eps)
        return mean, std, mean_loss, std_loss
    mean, std = plain_statistics(features, eps)
    mean_loss = (mean - base_mean).square_().sum() / len(mean)
    std_loss = (std - base_std).square_().sum() / len(std)
    return mean, std, mean_loss, std_loss


@operation("fastppt_kernels::feature_backward")
def _backward(
    features: Tensor,
    mean: Tensor,
    std: Tensor,
    base_mean: Tensor | None,
    base_std: Tensor | None,
    mean_grad: Tensor,
    std_grad: Tensor,
    incoming: Tensor | None,
) -> Tensor:
    """Return the gradient of the features; ``mean_grad`` is that of mean_loss with a base.

    ``incoming``, of the features' shape, is added to it.
    """
    base = None if base_mean is None or base_std is None else (base_mean, base_std)
    if use_triton(features) and have_codes([features]):
        return launch_backward(features, mean, std, base, mean_grad, std_grad, incoming)
    if base is not None:
        mean_grad = 2 / len(mean) * mean_grad * (mean - base[0])
        std_grad = 2 / len(std) * std_grad * (std - base[1])
    return plain_backward(features, mean, std, mean_grad, std_grad, incoming)


def plain_statistics(features: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and std in PyTorch, a piece of the channels after the other.

    ``torch.var_mean`` goes over the features once, but on the CPU it is five to twenty times
    slower than a mean and the mean of squares.
    """
    dtype = compute_dtype([features])
    space = tuple(range(2, features.dim()))
    means, variances = [], []
    num_channels = max(1, CPU_PIECE_SIZE * features.shape[1] // features.numel())
    for (piece,) in _cut([features], num_channels, 1):
        values = piece.to(dtype)
        mean = values.mean(space, keepdim=True)
        variances.append((values - mean).square_().mean(space))
        means.append(mean.flatten(1))
    if len(means) == 1:
        return means[0], variances[0].add_(eps).sqrt_()
    return torch.cat(means, 1), torch.cat(variances, 1).add_(eps).sqrt_()


def plain_backward(
    features: Tensor,
    mean: Tensor,
    std: Tensor,
    mean_grad: Tensor,
    std_grad: Tensor,
    incoming: Tensor | None,
) -> Tensor:
    """Return the gradient of the features in PyTorch, a piece of their memory after the other.

    All but ``incoming`` are [B, C].
    """
    num_positions = features.shape[2:].numel()
    shape = (*mean.shape, *[1] * (features.dim() - 2))
    channels = (mean, mean_grad / num_positions, std_grad / (num_positions * std))
    grad = torch.empty_like(features)
    cut = [features, grad, *(t.view(shape) for t in channels)]
    cut += [] if incoming is None else [incoming]
    outermost = max(
        range(features.dim()), key=lambda dim: features.stride(dim) * (features.shape[dim] > 1)
    )
    size = max(1, CPU_PIECE_SIZE * features.shape[outermost] // features.numel())
    for value, out, centre, shift, scale, *added in _cut(cut, size, outermost):
        # In the dtype of the statistics, which narrow features have not.
        result = out if out.dtype == mean.dtype else torch.empty_like(out, dtype=mean.dtype)
        torch.sub(value, centre, out=result)
        torch.addcmul(shift, result, scale, out=result)
        for gradient in added:
            result.add_(gradient)
        if result is not out:
            out.copy_(result)
    return grad


def _cut(tensors: list[Tensor], size: int, dim: int) -> Iterator[list[Tensor]]:
    """Yield the tensors in pieces of ``size`` along a dimension; those of 1 there are in each."""
    if tensors[0].shape[dim] <= size:
        yield tensors
        return
    for start in range(0, tensors[0].shape[dim], size):
        yield [
            t if t.shape[dim] == 1 else t.narrow(dim, start, min(size, t.shape[dim] - start))
            for t in tensors
        ]


@_statistics.register_fake
def _(features: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = features.new_empty(features.shape[:2], dtype=compute_dtype([features]))
    return mean, torch.empty_like(mean)


@_alignment.register_fake
def _(
    features: Tensor, base_mean: Tensor, base_std: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = features.new_empty(features.shape[:2], dtype=compute_dtype([features]))
    return mean, torch.empty_like(mean), mean.new_empty(()), mean.new_empty(())


@_backward.register_fake
def _(features: Tensor, *others: Tensor | None) -> Tensor:
    return torch.empty_like(features)


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.set_materialize_grads(False)


def _save_alignment(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, base_mean, base_std, _ = inputs
    ctx.save_for_backward(features, *output[:2], base_mean, base_std)
    ctx.set_materialize_grads(False)


def _statistics_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
    features, mean, std = ctx.saved_tensors
    mean_grad, std_grad = (torch.zeros_like(mean) if g is None else g for g in grads)
    return _backward(features, mean, std, None, None, mean_grad, std_grad, None), None


def _alignment_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    features, mean, std, base_mean, base_std = ctx.saved_tensors
    # Only the losses leave this module.
    mean_grad, std_grad = (mean.new_zeros(()) if g is None else g for g in grads[2:])
    grad = _backward(features, mean, std, base_mean, base_std, mean_grad, std_grad, None)
    return grad, None, None, None


_statistics.register_autograd(_statistics_backward, setup_context=_save_statistics)
_alignment.register_autograd(_alignment_backward, setup_context=_save_alignment)
_backward.register_autograd(
    refuse_second_derivative("feature_statistics, feature_alignment_loss, align_features")
)


class _AlignFeatures(torch.autograd.Function):
    """The features and their losses; a custom op may not return a view of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        base_mean: Tensor,
        base_std: Tensor,
        channel_dim: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = _channels_second(features, channel_dim)
        mean, std, mean_loss, std_loss = _alignment(values, base_mean, base_std, eps)
        ctx.save_for_backward(features, mean, std, base_mean, base_std)
        ctx.set_materialize_grads(False)
        ctx.channel_dim = channel_dim
        return features.view_as(features), mean_loss, std_loss

    @staticmethod
    def backward(
        ctx: Any, incoming: Tensor | None, mean_grad: Tensor | None, std_grad: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        features, mean, std, base_mean, base_std = ctx.saved_tensors
        if mean_grad is None and std_grad is None:
            return incoming, None, None, None, None
        grad = _backward(
            _channels_second(features, ctx.channel_dim),
            mean,
            std,
            base_mean,
            base_std,
            mean.new_zeros(()) if mean_grad is None else mean_grad,
            mean.new_zeros(()) if std_grad is None else std_grad,
            None if incoming is None else _channels_second(incoming, ctx.channel_dim),
        )
        grad = grad if ctx.channel_dim == 1 else grad.movedim(1, -1)
        return grad, None, None, None, None
