"""Fused operations for personalising diffusion models; needs torch only, and fits any trainer."""

from fastppt_kernels.adaptive_denoising import adaptive_denoising_loss
from fastppt_kernels.anchor_penalty import anchor_penalty_
from fastppt_kernels.attention_alignment import attention_alignment_loss, attention_map_sum
from fastppt_kernels.feature_alignment import (
    align_features,
    feature_alignment_loss,
    feature_statistics,
)
from fastppt_kernels.joint_attention import joint_attention, joint_attention_map_sum
from fastppt_kernels.lora_anchor_penalty import lora_anchor_penalty_
from fastppt_kernels.optim import AnchoredAdamW

__all__ = [
    "AnchoredAdamW",
    "adaptive_denoising_loss",
    "align_features",
    "anchor_penalty_",
    "attention_alignment_loss",
    "attention_map_sum",
    "feature_alignment_loss",
    "feature_statistics",
    "joint_attention",
    "joint_attention_map_sum",
    "lora_anchor_penalty_",
]
