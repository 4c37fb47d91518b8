"""Attention over image and text tokens together, with the alignment of its text columns."""

from fastppt_kernels.joint_attention.op import joint_attention, joint_attention_map_sum

__all__ = ["joint_attention", "joint_attention_map_sum"]
