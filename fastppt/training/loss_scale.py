"""The loss scale of float16 runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Those of torch.amp.GradScaler.
START = 2.0**16
GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5
GROWTH_INTERVAL = 2000


class LossScale:
    """Keeps gradients inside float16's range: the loss is scaled up, the gradients down again.

    Activation gradients below 6e-8 are zero in float16. With the loss multiplied by s, all of them
    are s times as large; the gradients of the float32 masters are divided by s before anything
    else looks at them. If one of them is not finite, the step is skipped and s halves; after
    `GROWTH_INTERVAL` steps without one, s doubles. A step whose loss itself is not finite says
    nothing of s, and leaves it (our choice: such steps, of one bad photo say, would bring it down
    to zero).

    Source: Mixed Precision Training (Micikevicius et al., arXiv 1710.03740), section 3.2; numbers
    and primitives are those of ``torch.amp.GradScaler``, which cannot be used itself: its ``step``
    asks the host whether to skip. Here nothing is read on the host, and the state is kept where it
    is, so that a step can be captured.

    Args:
        device: Where steps run.

    Attributes:
        scale: 0-dim float32, s.
        good_steps: 0-dim int32, steps in a row without a gradient that is not finite.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), START, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale_(self, gradients: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Divide the gradients by the scale, in place, and bring the scale up to date.

        Args:
            gradients: float32, of the loss times `scale`.
            loss: 0-dim, not scaled.

        Returns:
            0-dim bool, whether the scale has backed off as it is meant to: a gradient is not
            finite, but the loss is, and the scale was above 1, so that it may be the reason.
        """
        scale, good_steps, finite = self.scale.clone(), self.good_steps.clone(), loss.isfinite()
        non_finite = torch.zeros_like(self.scale)
        torch._amp_foreach_non_finite_check_and_unscale_(
            list(gradients), non_finite, self.scale.reciprocal()
        )
        torch._amp_update_scale_(
            self.scale,
            self.good_steps,
            non_finite,
            GROWTH_FACTOR,
            BACKOFF_FACTOR,
            GROWTH_INTERVAL,
        )
        self.scale.copy_(torch.where(finite, self.scale, scale))
        self.good_steps.copy_(torch.where(finite, self.good_steps, good_steps))
        return finite & (non_finite != 0) & (scale > 1)
