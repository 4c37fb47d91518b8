"""What is timed: the suites, their ways, the work they count, and how a result is checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import attention, features, shapes, ways
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
        make_problem: Makes a problem of shapes, a device and a seed.
        element_bytes: Of what is read and written.
        flops: Counts the operations of a workload, forward and backward; None: not counted.
    """

    name: str
    form: str
    accesses: int
    makers: Mapping[str, Callable[[Problem], Way]]
    wanted: Callable[[Problem], object]
    errors: Callable[[Problem, Way, object], Errors]
    make_problem: Callable[..., Any] = Problem
    element_bytes: int = BYTES
    flops: Callable[[list[Shape]], int] | None = None

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
        return self.element_bytes * self.accesses * workload.num_elements

    def num_flops(self, workload: Workload) -> int | None:
        """Return how many operations one call needs, or None where nobody counted."""
        return None if self.flops is None else self.flops(workload.shapes)


def list_workload(name: str) -> Workload:
    """Return a workload by a name such as "SDXL, rank 4", "SD1.5 full" or "10 tensors"."""
    for named in (shapes.FEATURES, shapes.LATENTS, shapes.ATTENTIONS, shapes.PROJECTIONS):
        if name in named:
            return Workload(name, named[name])
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
FEATURE_WORKLOADS = tuple(shapes.FEATURES)
LATENT_WORKLOADS = tuple(shapes.LATENTS)


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


def loss_errors(
    problem: object,
    way: Way,
    wanted: tuple[Tensor, Sequence[Tensor]],
    narrow: str = "narrow gradients",
) -> Errors:
    """Compare a loss and its gradients with the reference.

    ``narrow``: the tolerance of gradients that are not float32.
    """
    loss, grads = way.call()
    kind = "gradients" if grads[0].dtype == torch.float32 else narrow
    return {
        "loss": abs(float(loss) / float(wanted[0]) - 1),
        kind: worst_error(grads, wanted[1]),
    }


def _worst_ratio(given: list[float], wanted: list[float]) -> float:
    ratios = [abs(g / w - 1) for g, w in zip(given, wanted, strict=True)]
    # max() would drop a NaN that is not first.
    return sum(ratios) if any(ratio != ratio for ratio in ratios) else max(ratios)


def _plain(call: Callable[[Problem], ways.Call]) -> Callable[[Problem], Way]:
    return lambda problem: Way(call(problem))


def _compiled(call: Callable[[Problem], ways.Call]) -> Callable[[Problem], Way]:
    return lambda problem: Way(torch.compile(call(problem)))


def _flops_an_element(flops: int) -> Callable[[list[Shape]], int]:
    return lambda listed: flops * shapes.count_elements(listed)


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
OPTIMIZER_HOST = Suite(
    name="optimizer",
    form="raw, anchors on the host",
    # As above: two of them come over the bus.
    accesses=3 + 5 + 3,
    makers={
        "AnchoredAdamW" + ARENA: partial(ways.anchored_adamw, form="raw", anchor_storage="host"),
        "AnchoredAdamW, anchors on the device" + ARENA: partial(ways.anchored_adamw, form="raw"),
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


def _feature_suite(form: str, **kind: Any) -> Suite:
    var_mean = partial(features.feature_autograd, statistics=features.var_mean)
    two_means = partial(features.feature_autograd, statistics=features.two_means)
    incoming = "incoming" in kind
    return Suite(
        name="feature alignment",
        form=form,
        # Read the base's features and the tuned ones; then read these again, and what flows in,
        # write the gradient.
        accesses=1 + 1 + 2 + incoming,
        makers=({"align_features": _plain(features.align_op)} if incoming else {})
        | {
            "feature_alignment_loss": _plain(features.feature_op),
            "mean, mean of squares": _plain(two_means),
            "var_mean": _plain(var_mean),
            "torch.compile of mean, mean of squares": _compiled(two_means),
            "torch.compile of var_mean": _compiled(var_mean),
        },
        wanted=features.exact_features,
        errors=loss_errors,
        make_problem=partial(features.FeatureProblem, **kind),
        element_bytes=2 if "dtype" in kind else BYTES,
        # Statistics of both, the gradient, and its addition.
        flops=_flops_an_element(4 + 4 + 3 + incoming),
    )


def _denoising_suite(form: str, **kind: Any) -> Suite:
    return Suite(
        name="adaptive denoising",
        form=form,
        # Read both predictions and the target; then read two of these, write the gradient.
        accesses=3 + 3,
        makers={
            "adaptive_denoising_loss": _plain(features.denoising_op),
            "autograd": _plain(features.denoising_autograd),
            "torch.compile of autograd": _compiled(features.denoising_autograd),
        },
        wanted=features.exact_denoising,
        errors=loss_errors,
        make_problem=partial(features.DenoisingProblem, **kind),
        element_bytes=2 if "dtype" in kind else BYTES,
        # Squared errors of both predictions, and the gradient.
        flops=_flops_an_element(6 + 2),
    )


def _attention_suite(form: str, **kind: Any) -> Suite:
    return Suite(
        name="attention alignment",
        form=form,
        # Read the base's queries and keys and the tuned ones; then read these again, write their
        # gradients. What of the maps' sums goes to memory is left out: a layer's fits in a cache.
        accesses=1 + 1 + 2,
        makers={
            "attention_alignment_loss": attention.attention_op,
            "materialised maps": attention.attention_autograd,
            "torch.compile of materialised maps": _compiled(
                lambda problem: attention.attention_autograd(problem).call
            ),
        },
        wanted=attention.exact_attention,
        errors=loss_errors,
        make_problem=partial(attention.AttentionProblem, **kind),
        element_bytes=2 if "dtype" in kind else BYTES,
        flops=attention.count_alignment_flops,
    )


def _joint_attention_suite(form: str, **kind: Any) -> Suite:
    return Suite(
        name="joint attention",
        form=form,
        # Read the base's queries, keys and values, write the output; the same of the tuned ones;
        # then read these four and the output's gradient, write three gradients.
        accesses=4 + 4 + 8,
        makers={
            "joint_attention": attention.joint_attention_op,
            "materialised maps": attention.joint_attention_autograd,
            "torch.compile of flex_attention": attention.joint_attention_flex,
        },
        wanted=attention.exact_joint_attention,
        errors=partial(loss_errors, narrow="narrow gradients of attention"),
        make_problem=partial(attention.JointAttentionProblem, **kind),
        element_bytes=2 if "dtype" in kind else BYTES,
        flops=attention.count_joint_flops,
    )


ATTENTION_ALIGNMENT = _attention_suite("float32")
ATTENTION_ALIGNMENT_JOINT = _attention_suite("float32, logsumexp given", joint=True)
ATTENTION_ALIGNMENT_BF16 = _attention_suite("bfloat16", dtype=torch.bfloat16)
ATTENTION_ALIGNMENT_FP16 = _attention_suite("float16", dtype=torch.float16)
ATTENTION_ALIGNMENT_JOINT_BF16 = _attention_suite(
    "bfloat16, logsumexp given", dtype=torch.bfloat16, joint=True
)
JOINT_ATTENTION = _joint_attention_suite("float32")
JOINT_ATTENTION_BF16 = _joint_attention_suite("bfloat16", dtype=torch.bfloat16)
JOINT_ATTENTION_FP16 = _joint_attention_suite("float16", dtype=torch.float16)
FEATURE_ALIGNMENT = _feature_suite("float32")
FEATURE_ALIGNMENT_CHANNELS_LAST = _feature_suite("float32, channels_last", channels_last=True)
FEATURE_ALIGNMENT_BF16 = _feature_suite("bfloat16", dtype=torch.bfloat16)
FEATURE_ALIGNMENT_BF16_CHANNELS_LAST = _feature_suite(
    "bfloat16, channels_last", dtype=torch.bfloat16, channels_last=True
)
FEATURE_ALIGNMENT_ADDED = _feature_suite("float32, added to a gradient", incoming=True)
FEATURE_ALIGNMENT_BF16_ADDED = _feature_suite(
    "bfloat16, added to a gradient", dtype=torch.bfloat16, incoming=True
)
ADAPTIVE_DENOISING = _denoising_suite("float32")
ADAPTIVE_DENOISING_BF16 = _denoising_suite("bfloat16", dtype=torch.bfloat16)
