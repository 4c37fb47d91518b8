"""The specification of feature alignment, in the plainest code."""

from torch import Tensor


def feature_statistics_reference(
    features: Tensor, *, channel_dim: int = 1, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of each sample, all in float64.

    mean = mean_n x_n,   std = sqrt(mean_n (x_n - mean)^2 + eps)

    Source: Adaptive Personalized Training (arXiv 2507.02687), equations 4 and 5; statistics per
    channel, the population variance and ``eps`` are our choice.

    Args:
        features: [B, C, ...] or, with ``channel_dim`` -1, [B, ..., C]; autograd follows it.
        channel_dim: 1 or -1.
        eps: What is added to the variance.

    Returns:
        mean [B, C] and std [B, C], float64.
    """
    values = features.double().movedim(channel_dim, 1).flatten(2)
    mean = values.mean(2)
    variance = (values - mean[:, :, None]).square().mean(2)
    return mean, (variance + eps).sqrt()


def feature_alignment_reference(
    features: Tensor,
    base_mean: Tensor,
    base_std: Tensor,
    *,
    channel_dim: int = 1,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return the two losses, in float64; autograd gives their gradients.

    mean_loss = mean_b sum_c (mean - base_mean)^2,   std_loss = mean_b sum_c (std - base_std)^2

    Source: Adaptive Personalized Training (arXiv 2507.02687), equations 4 and 5.

    Args:
        features: As of :func:`feature_statistics_reference`.
        base_mean: [B, C].
        base_std: [B, C].
        channel_dim: 1 or -1.
        eps: What is added to the variance.
    """
    mean, std = feature_statistics_reference(features, channel_dim=channel_dim, eps=eps)
    mean_loss = (mean - base_mean.detach().double()).square().sum(1).mean()
    std_loss = (std - base_std.detach().double()).square().sum(1).mean()
    return mean_loss, std_loss
