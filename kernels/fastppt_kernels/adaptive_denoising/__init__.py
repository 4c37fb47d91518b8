"""The denoising loss with weights by the overfitting indicator."""

from fastppt_kernels.adaptive_denoising.op import adaptive_denoising_loss

__all__ = ["adaptive_denoising_loss"]
