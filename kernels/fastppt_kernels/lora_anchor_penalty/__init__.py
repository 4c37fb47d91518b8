"""The pull of LoRA adapters back to their anchor, in the weights the network sees."""

from fastppt_kernels.lora_anchor_penalty.op import lora_anchor_penalty_

__all__ = ["lora_anchor_penalty_"]
