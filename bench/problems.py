"""Tensors drawn from a seed, what float64 makes of them, and the refusal of what disagrees."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.shapes import Shape, count_elements
from fastppt_kernels.anchor_penalty.reference import anchor_penalty_reference
from fastppt_kernels.testing import make_arena

# At this weight the anchor's gradient is as large as the loss's, so that a fault shows.
WEIGHT = 0.05
SCALE = 0.5
PARAM_RANGE, DRIFT_RANGE, GRAD_RANGE = 0.1, 1e-2, 1e-3
# Gradients of successive steps differ in sign and size: AdamW's first step shows neither.
GRAD_FACTORS = (1.0, -0.3, 2.0)
# A decay that one step shows.
LR, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.999), 1e-8, 1.0
# Where an arena's tensors begin: 256 bytes, as from torch's allocator.
ALIGNMENT = 64

# Relative errors that a time is still reported at; a wrong sign, factor or norm makes 0.01.
TOLERANCES = {"penalty": 1e-4, "gradient norm": 1e-4, "gradients": 1e-4, "updates": 1e-3}
# Of a loss, and of a gradient that is rounded to bfloat16.
TOLERANCES |= {"loss": 1e-4, "narrow gradients": 5e-3}
# torch's float32 norm of one large tensor on the CPU is that far off, and what follows from it.
BASELINE_TOLERANCES = dict.fromkeys(TOLERANCES, 5e-3)
# An attention rounds its maps and their gradients too; a projection its low ranks.
TOLERANCES |= {"narrow gradients of attention": 1e-2, "narrow gradients of projections": 1e-2}
# What a trainer would write rounds the products of queries and keys: 0.016 to 0.018 in bfloat16.
BASELINE_TOLERANCES |= {kind: 3e-2 for kind in TOLERANCES if kind.startswith("narrow")}


class DisagreementError(Exception):
    """A way's result is not the reference's, so that its time says nothing."""


class Problem:
    """Parameters, anchors and gradients to work on.

    Attributes:
        params: What an optimizer is given, with ``.grad``: one tensor a shape, or one arena.
        anchors: Of the shapes of ``params``.
        grads: The ``.grad`` of ``params``.
        param_views: One tensor a shape, and so ``anchor_views`` and ``grad_views``: the tensors
            of ``params`` themselves, or views into the arena.
    """

    def __init__(
        self, shapes: Sequence[Shape], device: str = "cpu", *, arena: bool = False, seed: int = 0
    ) -> None:
        self.shapes, self.device, self.seed = shapes, device, seed
        if arena:
            arenas = [make_arena(shapes, alignment=ALIGNMENT, device=device) for _ in range(3)]
            lists = [[flat] for flat, _ in arenas]
            views = [views for _, views in arenas]
        else:
            lists = views = [[torch.empty(s, device=device) for s in shapes] for _ in range(3)]
        self.params, self.anchors, self.grads = lists
        self.param_views, self.anchor_views, self.grad_views = (list(tensors) for tensors in views)
        for param, grad in zip(self.params, self.grads, strict=True):
            param.requires_grad_().grad = grad
        self.reset()

    @property
    def num_elements(self) -> int:
        return count_elements(list(self.shapes))

    @property
    def max_norm(self) -> float:
        """A clip that acts on some of the steps: on all, AdamW would hide its size."""
        return 0.8 * GRAD_RANGE * self.num_elements**0.5

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor, float]]:
        """The views as LoRA pairs."""
        downs, ups = self.param_views[::2], self.param_views[1::2]
        return [(down, up, SCALE) for down, up in zip(downs, ups, strict=True)]

    def reset(self) -> None:
        """Draw all values anew, the same each time."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        with torch.no_grad():
            for param, anchor, grad in zip(
                self.param_views, self.anchor_views, self.grad_views, strict=True
            ):
                param.uniform_(-PARAM_RANGE, PARAM_RANGE, generator=generator)
                anchor.uniform_(-DRIFT_RANGE, DRIFT_RANGE, generator=generator).add_(param)
                grad.uniform_(-GRAD_RANGE, GRAD_RANGE, generator=generator)


def exact_penalty(problem: Problem, form: str) -> tuple[Tensor, list[Tensor]]:
    """Return the anchor's penalty and gradients in float64.

    ``form``: "raw"; "effective", with an anchor of zeros; "effective, anchored".
    """
    params = [p.detach().double() for p in problem.param_views]
    anchors = [a.double() for a in problem.anchor_views]
    return _exact_penalty(params, anchors, form)


def _exact_penalty(
    params: list[Tensor], anchors: list[Tensor], form: str
) -> tuple[Tensor, list[Tensor]]:
    if form == "raw":
        return anchor_penalty_reference(params, anchors, WEIGHT)
    if form == "effective":
        anchors = [torch.zeros_like(p) for p in params]
    leaves = [p.detach().requires_grad_() for p in params]
    penalty = torch.zeros((), dtype=torch.float64, device=params[0].device)
    pairs = zip(leaves[::2], leaves[1::2], anchors[::2], anchors[1::2], strict=True)
    with torch.enable_grad():
        # ||B A - B0 A0||^2 = ||X A + B0 Y||^2 from small products; the gradients are autograd's.
        for a, b, a0, b0 in pairs:
            x, y = b - b0, a - a0
            square = ((x.T @ x) * (a @ a.T)).sum() + 2 * ((b0.T @ x) * (y @ a.T)).sum()
            square = square + ((b0.T @ b0) * (y @ y.T)).sum()
            penalty = penalty + WEIGHT * SCALE**2 * square
    return penalty.detach(), list(torch.autograd.grad(penalty, leaves))


@dataclass(frozen=True)
class ExactSteps:
    """What AdamW steps do in float64: updates of the parameters; penalty and norm of each step."""

    updates: list[Tensor]
    penalties: list[float]
    norms: list[float]


def exact_steps(problem: Problem, form: str) -> ExactSteps:
    """Take a step for each of GRAD_FACTORS from the drawn values: anchor, clip, torch's AdamW."""
    problem.reset()
    params = [nn.Parameter(p.detach().double()) for p in problem.param_views]
    anchors = [a.double() for a in problem.anchor_views]
    optimizer = torch.optim.AdamW(
        params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, foreach=False
    )
    penalties, norms = [], []
    for factor in GRAD_FACTORS:
        penalty, pulls = _exact_penalty([p.detach() for p in params], anchors, form)
        for param, grad, pull in zip(params, problem.grad_views, pulls, strict=True):
            param.grad = pull.add_(grad.double(), alpha=factor)
        norm = nn.utils.clip_grad_norm_(params, problem.max_norm)
        optimizer.step()
        penalties.append(penalty.item())
        norms.append(norm.item())
    olds = problem.param_views
    updates = [p.detach().sub_(old.detach()) for p, old in zip(params, olds, strict=True)]
    return ExactSteps(updates, penalties, norms)


def refuse_if_wrong(errors: dict[str, float], tolerances: dict[str, float]) -> float:
    """Return the largest error, or raise DisagreementError; a NaN is past every tolerance."""
    for what, error in errors.items():
        if not error <= tolerances[what]:
            raise DisagreementError(
                f"{what}: differs from the reference by {error:.1e}, at most "
                f"{tolerances[what]:.0e} is allowed: no time is reported"
            )
    return max(errors.values())
