"""The ways to do one thing: ours, and the strongest forms that a trainer would write instead.

Each function takes a problem and returns a call that works on it; a call returns the penalty, or
the penalty and the gradient norm.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.problems import BETAS, EPS, LR, SCALE, WEIGHT, WEIGHT_DECAY, Problem
from fastppt_kernels import AnchoredAdamW, anchor_penalty_, lora_anchor_penalty_

Call = Callable[[], object]


@dataclass(frozen=True)
class Way:
    """A call, and what sets the optimizer behind it back to before its first step.

    ``letting_go``: the call without its results kept, where their memory is not to be counted.
    """

    call: Call
    rewind: Callable[[], None] = lambda: None
    letting_go: Call | None = None


# The anchor on the tensors themselves.


def op(problem: Problem) -> Call:
    return lambda: anchor_penalty_(problem.params, problem.anchors, problem.grads, WEIGHT)


def foreach(problem: Problem) -> Call:
    """What a careful trainer would write."""

    @torch.no_grad()
    def call() -> Tensor:
        differences = torch._foreach_sub(problem.params, problem.anchors)
        torch._foreach_add_(problem.grads, differences, alpha=2 * WEIGHT)
        return WEIGHT * torch.stack(torch._foreach_norm(differences)).square().sum()

    return call


def autograd_loop(problem: Problem) -> Call:
    """What a trainer would write: a term of the loss."""

    def call() -> Tensor:
        both = zip(problem.params, problem.anchors, strict=True)
        penalty = WEIGHT * sum((p - a).square().sum() for p, a in both)
        penalty.backward()
        return penalty.detach()

    return call


# The anchor on what LoRA pairs add to the weights.


def lora_op(problem: Problem, *, anchored: bool = False) -> Call:
    lists = _split(problem.param_views), _split(problem.grad_views), _split(problem.anchor_views)
    (downs, ups), (down_grads, up_grads), (anchor_downs, anchor_ups) = lists
    scales = [SCALE] * len(downs)
    anchors = {"anchor_downs": anchor_downs, "anchor_ups": anchor_ups} if anchored else {}
    return lambda: lora_anchor_penalty_(downs, ups, scales, down_grads, up_grads, WEIGHT, **anchors)


def lora_batched(problem: Problem, *, anchored: bool = False) -> Call:
    """What a careful trainer would write: batched products over the pairs of one shape."""
    lists = _split(problem.param_views), _split(problem.grad_views), _split(problem.anchor_views)
    (downs, ups), (down_grads, up_grads), (anchor_downs, anchor_ups) = lists
    alike: defaultdict[object, list[int]] = defaultdict(list)
    for index, (down, up) in enumerate(zip(downs, ups, strict=True)):
        alike[down.shape, up.shape].append(index)

    @torch.no_grad()
    def call() -> Tensor:
        squares = []
        for indices in alike.values():
            a, b = (torch.stack([ts[i] for i in indices]) for ts in (downs, ups))
            x, a_gram = b, a @ a.mT
            if anchored:
                a0, b0 = (
                    torch.stack([ts[i] for i in indices]) for ts in (anchor_downs, anchor_ups)
                )
                x, y = b - b0, a - a0
                cross, b_cross = y @ a.mT, b.mT @ b0
            b_gram = b.mT @ x
            factor = 2 * WEIGHT * SCALE**2
            a_delta, b_delta = factor * (b_gram @ a), factor * (x @ a_gram)
            if anchored:
                a_delta += factor * (b_cross @ y)
                b_delta += factor * (b0 @ cross)
                square = (x.mT @ x * a_gram).sum() + 2 * (b0.mT @ x * cross).sum()
                square += (b0.mT @ b0 * (y @ y.mT)).sum()
            else:
                square = (b_gram * a_gram).sum()
            squares.append(SCALE**2 * square)
            torch._foreach_add_([down_grads[i] for i in indices], list(a_delta.unbind()))
            torch._foreach_add_([up_grads[i] for i in indices], list(b_delta.unbind()))
        return WEIGHT * torch.stack(squares).sum()

    return call


def lora_autograd_loop(problem: Problem) -> Call:
    """||s B A||^2 as a term of the loss, from Grams: no B A is formed here either."""

    def call() -> Tensor:
        penalty = WEIGHT * sum(
            scale**2 * ((up.T @ up) * (down @ down.T)).sum() for down, up, scale in problem.pairs
        )
        penalty.backward()
        return penalty.detach()

    return call


# Anchor, clip and AdamW.


def anchored_adamw(problem: Problem, form: str, anchor_storage: str = "device") -> Way:
    group: dict[str, object] = {"params": problem.params, "form": form}
    group["anchor_storage"] = anchor_storage
    if form == "effective":
        group |= {"lora_pairs": problem.pairs, "anchor": "zero"}
    else:
        group |= {"anchor": problem.anchors}
    optimizer = AnchoredAdamW(
        [group],
        lr=_learning_rate(problem),
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        anchor_weight=WEIGHT,
        max_grad_norm=problem.max_norm,
    )

    def call() -> tuple[Tensor, Tensor]:
        optimizer.step()
        return optimizer.penalty, optimizer.grad_norm

    def rewind() -> None:
        state_dict = optimizer.state_dict()
        for state in state_dict["state"].values():
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state[name].zero_()
        optimizer.load_state_dict(state_dict)

    return Way(call, rewind)


def anchor_then_adamw(
    problem: Problem, anchor: Callable[[Problem], Call], *, compiled: bool = False, **kind: bool
) -> Way:
    """An anchor, ``clip_grad_norm_`` and ``torch.optim.AdamW``; ``kind``: fused or foreach."""
    optimizer = torch.optim.AdamW(
        problem.params,
        lr=_learning_rate(problem),
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        capturable=problem.device == "cuda",
        **kind,
    )
    add_anchor = anchor(problem)

    def call() -> tuple[object, Tensor]:
        penalty = add_anchor()
        norm = nn.utils.clip_grad_norm_(problem.params, problem.max_norm, foreach=True)
        optimizer.step()
        return penalty, norm

    def rewind() -> None:
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()

    return Way(torch.compile(call) if compiled else call, rewind)


def _split(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return tensors[::2], tensors[1::2]


def _learning_rate(problem: Problem) -> float | Tensor:
    """A tensor where a captured step is to see new values, as a trainer would have it."""
    return LR if problem.device == "cpu" else torch.tensor(LR, device=problem.device)
