"""Fused operations for personalising diffusion models; needs torch only, and fits any trainer."""

from fastppt_kernels.anchor_penalty import anchor_penalty_
from fastppt_kernels.lora_anchor_penalty import lora_anchor_penalty_
from fastppt_kernels.optim import AnchoredAdamW

__all__ = ["AnchoredAdamW", "anchor_penalty_", "lora_anchor_penalty_"]
