"""What a step works on."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The parameters of a group that take part in a step, with all that it reads and writes.

    Attributes:
        params: The theta, of any shapes and floating-point dtypes, on one device; written.
        grads: The g, of the shapes of ``params``; may be written.
        anchors: The theta_0, of the shapes of ``params``; None means zeros.
        exp_avgs: First moments m, float32 (float64 for a float64 parameter); written.
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
