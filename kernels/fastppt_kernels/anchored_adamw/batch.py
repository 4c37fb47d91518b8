"""What a step works on."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The parameters of a group that take part in a step, with all that it reads and writes.

    Attributes:
        params: The theta, of any shapes and floating-point dtypes, on one device; written.
        grads: The g, of the shapes of ``params`` and any floating-point dtypes; may be written.
        anchors: The theta_0, of the shapes of ``params``; None means zeros. In host memory (pinned,
            where the parameters are on a GPU) if ``host_anchors``.
        exp_avgs: First moments m, float32 (float64 for a float64 parameter), or their uint8 codes;
            written.
        exp_avg_sqs: Second moments v, likewise; written.
        steps: The t, a 0-dim float32 tensor for each parameter, on its device; written.
        copies: Working copies, of the shapes of ``params``; written with the new values. None
            where a parameter has none.
        form: "raw", "decoupled", or "none" where the step itself pulls to no anchor.
        lr: Learning rate, a float or a 0-dim tensor.
        anchor_weight: A float or a 0-dim tensor.
        betas: Decay rates of the two moments, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: AdamW's.
        exp_avg_scales: With codes, float32 [blocks] for each parameter, see ``eight_bit``; written.
        exp_avg_sq_scales: Likewise.
        host_anchors: The anchors come through buffers on the device, chunk by chunk.
        rounding_seed: Of the random bits that round float16 and bfloat16 parameters, see
            ``rounding``, in [0, 2^31); None: they are rounded to nearest.
    """

    params: list[Tensor]
    grads: list[Tensor]
    anchors: list[Tensor | None]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    copies: list[Tensor | None]
    form: str
    lr: float | Tensor
    anchor_weight: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    exp_avg_scales: list[Tensor] | None = None
    exp_avg_sq_scales: list[Tensor] | None = None
    host_anchors: bool = False
    rounding_seed: int | None = None

    @property
    def has_codes(self) -> bool:
        """Say whether the moments are kept in 8 bits."""
        return self.exp_avg_scales is not None

    @property
    def streams_anchors(self) -> bool:
        """Say whether the step reads anchors that are not on the device yet."""
        return self.host_anchors and self.form != "none"


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a parameter of ``dtype`` is updated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
