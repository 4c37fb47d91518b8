"""Single-file checkpoints of the mini models, in the layout of published full-size ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppt.families.original_layout import original_layout


def original_state(pipeline: Any) -> dict[str, Tensor]:
    """Return a mini model's weights under the keys and in the shapes of the original layout.

    Args:
        pipeline: As `fastppt.mini.build_mini` builds it. Not written.

    Returns:
        Contiguous tensors that share no memory.
    """
    return {
        key: tensor.clone(memory_format=torch.contiguous_format)
        for key, tensor in original_layout(pipeline).items()
    }
