"""The diffusion model's own loss (DDPM, arXiv 2006.11239, eq. 14; flow matching likewise)."""

from torch import Tensor


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
