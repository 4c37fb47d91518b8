"""Attention maps summed over heads, and their alignment with the base's."""

from fastppt_kernels.attention_alignment.op import attention_alignment_loss, attention_map_sum

__all__ = ["attention_alignment_loss", "attention_map_sum"]
