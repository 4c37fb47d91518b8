"""The specification of a step of AdamW with an anchor and a clip, in the plainest code."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastppt_kernels.anchored_adamw.batch import Batch


def anchored_adamw_reference(
    batches: Sequence[Batch],
    max_grad_norm: float | None = None,
    *,
    skip: bool = False,
    skip_non_finite: bool = False,
) -> tuple[list[Batch], Tensor, Tensor]:
    """Return what a step makes of the batches, the penalty and the gradient's norm, in float64.

    d = theta - theta_0,   penalty = sum over batches of anchor_weight ||d||^2
    form "raw":  g += 2 anchor_weight d
    grad_norm = ||g|| over all batches,   g *= min(1, max_grad_norm / (grad_norm + 1e-6))
    t += 1,   m += (1 - beta1)(g - m),   v = beta2 v + (1 - beta2) g^2
    theta -= lr weight_decay theta + lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    form "decoupled":  theta -= lr anchor_weight d as well

    Source: Preserve and Personalize (arXiv 2505.19519), Algorithm 1, line 9, for the penalty;
    Decoupled Weight Decay Regularization (arXiv 1711.05101), Algorithm 2, for AdamW. Our choice:
    the clip counts the anchor, and the decoupled form.

    Args:
        batches: Of any floating-point dtypes, with moments in such a one too. Not written.
        max_grad_norm: None: no clip.
        skip: Nothing moves; penalty and norm are those of a step that is not skipped.
        skip_non_finite: Nor does anything where grad_norm is NaN or infinite.

    Returns:
        New batches with float64 tensors (the gradients after anchor and clip, the copies those
        given), and two 0-dim float64 tensors.
    """
    penalty = squares = torch.zeros((), dtype=torch.float64)
    coupled, differences = [], []
    for batch in batches:
        pulls = batch.form != "none"
        weight = float(batch.anchor_weight) if pulls else 0.0
        wide = replace(
            batch,
            params=_double(batch.params),
            grads=_double(batch.grads),
            exp_avgs=_double(batch.exp_avgs),
            exp_avg_sqs=_double(batch.exp_avg_sqs),
            steps=_double(batch.steps),
        )
        d = [
            p if a is None else p - a.double()
            for p, a in zip(wide.params, batch.anchors, strict=True)
        ]
        if pulls:
            penalty = penalty + sum(weight * x.square().sum() for x in d)
        if batch.form == "raw":
            wide = replace(
                wide, grads=[g + 2 * weight * x for g, x in zip(wide.grads, d, strict=True)]
            )
        squares = squares + sum(g.square().sum() for g in wide.grads)
        coupled.append(wide)
        differences.append(d)
    grad_norm = squares.sqrt()
    if skip or (skip_non_finite and not grad_norm.isfinite()):
        return coupled, penalty, grad_norm
    coefficient = torch.ones(())
    if max_grad_norm is not None:
        coefficient = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    updated = [_update(b, coefficient, d) for b, d in zip(coupled, differences, strict=True)]
    return updated, penalty, grad_norm


def _update(batch: Batch, coefficient: Tensor, differences: list[Tensor]) -> Batch:
    beta1, beta2 = batch.betas
    lr, weight = float(batch.lr), float(batch.anchor_weight)
    grads = [g * coefficient for g in batch.grads]
    steps = [t + 1 for t in batch.steps]
    firsts = [m + (1 - beta1) * (g - m) for m, g in zip(batch.exp_avgs, grads, strict=True)]
    seconds = [
        beta2 * v + (1 - beta2) * g * g for v, g in zip(batch.exp_avg_sqs, grads, strict=True)
    ]
    params = []
    for p, d, m, v, t in zip(batch.params, differences, firsts, seconds, steps, strict=True):
        denominator = (v / (1 - beta2**t)).sqrt() + batch.eps
        change = lr * batch.weight_decay * p + lr * (m / (1 - beta1**t)) / denominator
        if batch.form == "decoupled":
            change = change + lr * weight * d
        params.append(p - change)
    return replace(
        batch, params=params, grads=grads, exp_avgs=firsts, exp_avg_sqs=seconds, steps=steps
    )


def _double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double() for t in tensors]
