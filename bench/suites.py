"""What is timed: the suites, their ways, the work they count, and how a result is checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import shapes, ways
from bench.problems import (
    BASELINE_TOLERANCES,
    GRAD_FACTORS,
    TOLERANCES,
    ExactSteps,
    Problem,
    exact_penalty,
    exact_steps,
    refuse_if_wrong,
)
from bench.shapes import Shape
from bench.ways import Way
from fastppt_kernels.testing import worst_error

COMPILE = "torch.compile"
ARENA = ", arena"
BYTES = 4  # float32

Errors = dict[str, float]


@dataclass(frozen=True)
class Workload:
    """A list of tensors by the name that a reader knows it by."""

    name: str
    shapes: list[Shape]

    @property
    def num_elements(self) -> int:
        return shapes.count_elements(self.shapes)


@dataclass(frozen=True, eq=False)
class Suite:
    """One thing to do, in one form, and the ways to do it.

    Attributes:
        name: "anchor", "lora anchor" or "optimizer".
        form: "raw", "effective", or "effective, anchored".
        accesses: Reads and writes of an element that cannot be avoided.
        makers: From a way's name to what makes it on a problem. Ours comes first. A name that ends
            in ARENA gets a problem whose tensors lie in one arena.
        wanted: Returns what float64 makes of a problem.
        errors: Runs a way on a problem and returns how far it is off.
    """

    name: str
    form: str
    accesses: int
    makers: Mapping[str, Callable[[Problem], Way]]
    wanted: Callable[[Problem], object]
    errors: Callable[[Problem, Way, object], Errors]

    def ways(self, *, compiled: bool) -> list[str]:
        return [name for name in self.makers if compiled or not name.startswith(COMPILE)]

    def is_ours(self, way: str) -> bool:
        return way.removesuffix(ARENA) == next(iter(self.makers)).removesuffix(ARENA)

    def check(self, name: str, problem: Problem, way: Way, wanted: object) -> float:
        """Return the way's largest error; raise DisagreementError if it is too large."""
        tolerances = TOLERANCES if self.is_ours(name) else BASELINE_TOLERANCES
        return refuse_if_wrong(self.errors(problem, way, wanted), tolerances)

    def num_bytes(self, workload: Workload) -> int:
        """Return the fewest bytes that one call reads and writes."""
        return BYTES * self.accesses * workload.num_elements


def list_workload(name: str) -> Workload:
    """Return a workload by a name such as "SDXL, rank 4", "SD1.5 full" or "10 tensors"."""
    model, _, rank = name.partition(", rank ")
    if rank:
        lists = {
            "SDXL": shapes.list_sdxl_adapters,
            "SD3-M": shapes.list_sd3_adapters,
            "SD1.5": shapes.list_sd15_adapters,
        }
        return Workload(name, lists[model](int(rank)))
    if name == "SD1.5 full":
        return Workload(name, shapes.list_sd15_unet())
    return Workload(name, shapes.list_scaling(int(name.removesuffix(" tensors"))))


SCALING = tuple(f"{count} tensors" for count in shapes.SCALING_COUNTS)


def anchor_errors(problem: Problem, way: Way, wanted: tuple[Tensor, list[Tensor]]) -> Errors:
    """Compare a penalty, and what was added to the gradients, with the reference."""
    problem.reset()
    old = [grad.double() for grad in problem.grad_views]
    penalty = way.call()
    added = [g.double() - before for g, before in zip(problem.grad_views, old, strict=True)]
    return {
        "penalty": abs(float(penalty) / float(wanted[0]) - 1),
        "gradients": worst_error(added, wanted[1]),
    }


def step_errors(problem: Problem, way: Way, wanted: ExactSteps) -> Errors:
    """Compare the steps' penalties and norms, and the updates of the parameters."""
    way.rewind()
    problem.reset()
    grads = [grad.clone() for grad in problem.grads]
    old = [param.detach().clone() for param in problem.param_views]
    penalties, norms = [], []
    for factor in GRAD_FACTORS:
        torch._foreach_copy_(problem.grads, grads)
        torch._foreach_mul_(problem.grads, factor)
        penalty, norm = way.call()
        penalties.append(float(penalty))
        norms.append(float(norm))
    new = [param.detach() for param in problem.param_views]
    updates = [n.double() - o.double() for n, o in zip(new, old, strict=True)]
    return {
        "penalty": _worst_ratio(penalties, wanted.penalties),
        "gradient norm": _worst_ratio(norms, wanted.norms),
        "updates": worst_error(updates, wanted.updates),
    }


def _worst_ratio(given: list[float], wanted: list[float]) -> float:
    ratios = [abs(g / w - 1) for g, w in zip(given, wanted, strict=True)]
    # max() would drop a NaN that is not first.
    return sum(ratios) if any(ratio != ratio for ratio in ratios) else max(ratios)


def _plain(call: Callable[[Problem], ways.Call]) -> Callable[[Problem], Way]:
    return lambda problem: Way(call(problem))


def _compiled(call: Callable[[Problem], ways.Call]) -> Callable[[Problem], Way]:
    return lambda problem: Way(torch.compile(call(problem)))


def _adamw(anchor: Callable[[Problem], ways.Call], **kind: bool) -> Callable[[Problem], Way]:
    return lambda problem: ways.anchor_then_adamw(problem, anchor, **kind)


ANCHOR = Suite(
    name="anchor",
    form="raw",
    accesses=4,  # read parameter, anchor and gradient; write the gradient
    makers={
        "anchor_penalty_": _plain(ways.op),
        "foreach": _plain(ways.foreach),
        "autograd loop": _plain(ways.autograd_loop),
        "torch.compile of foreach": _compiled(ways.foreach),
    },
    wanted=partial(exact_penalty, form="raw"),
    errors=anchor_errors,
)
LORA_ANCHOR = Suite(
    name="lora anchor",
    form="effective",
    accesses=3,  # as above, without an anchor; a pair's products fit into a cache
    makers={
        "lora_anchor_penalty_": _plain(ways.lora_op),
        "batched products": _plain(ways.lora_batched),
        "autograd loop": _plain(ways.lora_autograd_loop),
        "torch.compile of batched products": _compiled(ways.lora_batched),
    },
    wanted=partial(exact_penalty, form="effective"),
    errors=anchor_errors,
)
LORA_ANCHOR_ANCHORED = Suite(
    name="lora anchor",
    form="effective, anchored",
    accesses=4,
    makers={
        "lora_anchor_penalty_": _plain(partial(ways.lora_op, anchored=True)),
        "batched products": _plain(partial(ways.lora_batched, anchored=True)),
        "torch.compile of batched products": _compiled(partial(ways.lora_batched, anchored=True)),
    },
    wanted=partial(exact_penalty, form="effective, anchored"),
    errors=anchor_errors,
)
OPTIMIZER = Suite(
    name="optimizer",
    form="raw",
    # The norm must be known before the first parameter is written: read parameter, anchor and
    # gradient for it; then read these and both moments, and write parameter and moments.
    accesses=3 + 5 + 3,
    makers={
        "AnchoredAdamW" + ARENA: partial(ways.anchored_adamw, form="raw"),
        "AnchoredAdamW": partial(ways.anchored_adamw, form="raw"),
        "foreach + AdamW(fused)" + ARENA: _adamw(ways.foreach, fused=True),
        "foreach + AdamW(fused)": _adamw(ways.foreach, fused=True),
        "foreach + AdamW(foreach)": _adamw(ways.foreach, foreach=True),
        "autograd loop + AdamW(foreach)": _adamw(ways.autograd_loop, foreach=True),
        "torch.compile of foreach + AdamW(foreach)": _adamw(
            ways.foreach, foreach=True, compiled=True
        ),
    },
    wanted=partial(exact_steps, form="raw"),
    errors=step_errors,
)
OPTIMIZER_EFFECTIVE = Suite(
    name="optimizer",
    form="effective",
    # The anchor is zeros. The products need the parameter once before all of that.
    accesses=1 + 2 + 4 + 3,
    makers={
        "AnchoredAdamW" + ARENA: partial(ways.anchored_adamw, form="effective"),
        "AnchoredAdamW": partial(ways.anchored_adamw, form="effective"),
        "batched products + AdamW(fused)" + ARENA: _adamw(ways.lora_batched, fused=True),
        "batched products + AdamW(fused)": _adamw(ways.lora_batched, fused=True),
        "batched products + AdamW(foreach)": _adamw(ways.lora_batched, foreach=True),
        "autograd loop + AdamW(foreach)": _adamw(ways.lora_autograd_loop, foreach=True),
        "torch.compile of batched products + AdamW(foreach)": _adamw(
            ways.lora_batched, foreach=True, compiled=True
        ),
    },
    wanted=partial(exact_steps, form="effective"),
    errors=step_errors,
)
