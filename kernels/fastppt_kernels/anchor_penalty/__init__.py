"""The pull of parameters back to their anchor."""

from fastppt_kernels.anchor_penalty.op import anchor_penalty_

__all__ = ["anchor_penalty_"]
