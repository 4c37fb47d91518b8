"""Adapted projections: problems, what float64 makes of them, ways.

A call does what a training step does with each group of projections of one input: forward, then
backward from given gradients of the outputs, to the adapters and to the input.

Shape legend: M rows, I input width, O output width, r rank, n linears of one input.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import peft
import torch
from torch import Tensor, nn

from bench.shapes import Shape
from bench.suites import COMPILE, Errors, Suite
from bench.ways import Way
from fastppt.families.attention import Projections
from fastppt.trainables.joint_lora import JointLora
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables_config import LoraConfig
from fastppt_kernels.testing import worst_error

OURS, PEFT = "joint LoRA", "peft"
# Adapters' size beside the weights': far from nothing, so that an error of theirs shows.
UP = 0.5
LAYERS, LAYER = "SDXL projections", "SDXL projections, a block"
MINI_LAYERS = "mini-sdxl projections"

# Outputs a group, [n, M, O]; then the gradients of the inputs, the downs and the ups.
Outcome = tuple[list[Tensor], list[Tensor]]


class LoraProblem:
    """Groups of linears of one input; of each come inputs, weights, downs, ups and outputs.

    [M, I], [n, O, I], [n*r, I], [n, O, r] and [n, M, O]. Adapters are in float32, the rest is in
    ``dtype``; the scale is 1.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = torch.device(device), dtype

        def draw(shapes: Sequence[Shape]) -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=device) for shape in shapes]

        self.inputs = [x.to(dtype).requires_grad_() for x in draw(shapes[0::5])]
        self.weights = [w.mul_(w.shape[2] ** -0.5).to(dtype) for w in draw(shapes[1::5])]
        # Values that bfloat16 has too, so that a cast of theirs is not an error of a way.
        self.downs = [a.mul_(a.shape[1] ** -0.5).bfloat16().float() for a in draw(shapes[2::5])]
        self.ups = [b.mul_(UP * b.shape[2] ** -0.5).bfloat16().float() for b in draw(shapes[3::5])]
        self.grads = [g.to(dtype) for g in draw(shapes[4::5])]

    def linears(self, group: int) -> tuple[nn.Linear, ...]:
        """Return new linears around the weights of a group."""
        linears = []
        for weight in self.weights[group]:
            linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linears.append(linear)
        return tuple(linears)


def exact_lora(problem: LoraProblem) -> Outcome:
    outputs, grads = [], [[], [], []]
    tensors = zip(
        problem.inputs, problem.weights, problem.downs, problem.ups, problem.grads, strict=True
    )
    for inputs, weights, down, up, upstream in tensors:
        leaves = [t.detach().double().requires_grad_() for t in (inputs, down, up)]
        x, a, b = leaves
        output = x @ weights.double().mT + (x @ a.unflatten(0, (len(b), -1)).mT) @ b.mT
        outputs.append(output.detach())
        for found, grad in zip(
            grads, torch.autograd.grad(output, leaves, upstream.double()), strict=True
        ):
            found.append(grad)
    return outputs, [grad for kind in grads for grad in kind]


class _ByAutograd:
    """The same adapters, with the formula's gradients."""

    def __init__(self, adapter: JointLora) -> None:
        self.switch, self._formula = adapter.switch, adapter.formula

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return self._formula(inputs, weight, bias)


def joint_lora(problem: LoraProblem, *, by_autograd: bool = False, one_by_one: bool = False) -> Way:
    """Ours. ``one_by_one``: each linear by itself, as if it shared its input with no other."""
    groups: list[list[Projections]] = []
    for group in range(len(problem.inputs)):
        linears = problem.linears(group)
        names = tuple(f"{group}.{place}" for place in range(len(linears)))
        parts = zip(names, linears, strict=True)
        groups.append(
            [Projections((name,), (linear,)) for name, linear in parts]
            if one_by_one
            else [Projections(names, linears)]
        )
    rank = problem.ups[0].shape[2]
    flat = [part for group in groups for part in group]
    adapters = LoraAdapters(flat, LoraConfig(rank=rank), seed=0, device=problem.device)
    pairs = iter(adapters.pairs)
    for down, up in zip(problem.downs, problem.ups, strict=True):
        for one_down, one_up in zip(down.split(rank), up, strict=True):
            pair = next(pairs)
            pair.down.copy_(one_down)
            pair.up.copy_(one_up)
    if by_autograd:
        for part in flat:
            part.adapter = _ByAutograd(part.adapter)
    arena = adapters.arena
    downs, ups = zip(*grads_by_name(adapters).values(), strict=True)

    def call() -> Outcome:
        # The optimizer does both in passes that it makes anyway.
        arena.grad.zero_()
        arena.refresh()
        outputs = []
        for parts, inputs, upstream in zip(groups, problem.inputs, problem.grads, strict=True):
            inputs.grad = None
            projected = [output for part in parts for output in part(inputs)]
            torch.autograd.backward(projected, upstream.unbind())
            outputs.append(projected)
        return outputs, [x.grad for x in problem.inputs] + [*downs, *ups]

    return Way(call)


def grads_by_name(adapters: LoraAdapters) -> dict[str, tuple[Tensor, Tensor]]:
    """Return views of the flat gradient at the pairs' own places."""

    def grad(view: Tensor) -> Tensor:
        return adapters.arena.grad.as_strided(view.shape, view.stride(), view.storage_offset())

    return {pair.name: (grad(pair.down), grad(pair.up)) for pair in adapters.pairs}


def peft_layers(problem: LoraProblem) -> Way:
    """What diffusers' scripts have: peft's layers, under autocast where the network is narrow."""
    rank = problem.ups[0].shape[2]
    groups: list[nn.ModuleDict] = []
    for group, (down, up) in enumerate(zip(problem.downs, problem.ups, strict=True)):
        linears = {f"to_{place}": linear for place, linear in enumerate(problem.linears(group))}
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(linears))
        layers = peft.inject_adapter_in_model(config, nn.ModuleDict(linears))
        for layer, one_down, one_up in zip(layers.values(), down.split(rank), up, strict=True):
            layer.lora_A["default"].weight.data = one_down.clone()
            layer.lora_B["default"].weight.data = one_up.clone()
        groups.append(layers)
    layers = [layer for group in groups for layer in group.values()]
    leaves = [layer.lora_A["default"].weight for layer in layers]
    leaves += [layer.lora_B["default"].weight for layer in layers]
    narrow = problem.dtype != torch.float32
    context = partial(torch.autocast, problem.device.type, problem.dtype) if narrow else nullcontext

    def call() -> Outcome:
        for leaf in (*leaves, *problem.inputs):
            leaf.grad = None
        outputs = []
        with context():
            for group, inputs in zip(groups, problem.inputs, strict=True):
                outputs.append([layer(inputs) for layer in group.values()])
        for projected, upstream in zip(outputs, problem.grads, strict=True):
            torch.autograd.backward(projected, upstream.unbind())
        return outputs, [leaf.grad for leaf in (*problem.inputs, *leaves)]

    return Way(call)


def lora_errors(problem: LoraProblem, way: Way, wanted: Outcome) -> Errors:
    """Compare outputs and gradients with the reference."""
    outputs, grads = way.call()
    wanted_outputs, wanted_grads = wanted
    rank, num_groups = problem.ups[0].shape[2], len(problem.inputs)
    of_inputs, of_adapters = wanted_grads[:num_groups], wanted_grads[num_groups:]
    downs = [part for down in of_adapters[:num_groups] for part in down.split(rank)]
    ups = [part for up in of_adapters[num_groups:] for part in up]
    kind = "gradients" if problem.dtype == torch.float32 else "narrow gradients of projections"
    given = [*(torch.stack(list(group)) for group in outputs), *grads]
    # Not the larger of two: max() would drop a NaN that is not first.
    return {kind: worst_error(given, [*wanted_outputs, *of_inputs, *downs, *ups])}


def count_lora_flops(shapes: Sequence[Shape]) -> int:
    """Count the products: forward, and the gradients of the input and of the adapters."""
    total = 0
    for (rows, width), (count, outputs, _), (ranks, _) in zip(
        shapes[0::5], shapes[1::5], shapes[2::5], strict=True
    ):
        low_rank = 2 * rows * (ranks * width + ranks * outputs)
        total += 2 * (2 * rows * count * outputs * width) + 3 * low_rank
    return total


def lora_suite(form: str, dtype: torch.dtype) -> Suite:
    def compiled_lora(problem: LoraProblem) -> Way:
        return Way(torch.compile(joint_lora(problem, by_autograd=True).call))

    def compiled_peft(problem: LoraProblem) -> Way:
        return Way(torch.compile(peft_layers(problem).call))

    return Suite(
        name="lora",
        form=form,
        # Each at least once forward and once backward, an output's gradient in its place.
        accesses=2,
        makers={
            OURS: joint_lora,
            "joint LoRA, a linear at a time": partial(joint_lora, one_by_one=True),
            "joint LoRA by autograd": partial(joint_lora, by_autograd=True),
            PEFT: peft_layers,
            f"{COMPILE} of joint LoRA by autograd": compiled_lora,
            f"{COMPILE} of peft": compiled_peft,
        },
        wanted=exact_lora,
        errors=lora_errors,
        make_problem=partial(LoraProblem, dtype=dtype),
        element_bytes=dtype.itemsize,
        flops=count_lora_flops,
    )


LORA = lora_suite("float32", torch.float32)
LORA_BF16 = lora_suite("bfloat16", torch.bfloat16)
