"""The anchor penalty over SDXL's LoRA adapters: the op, the autograd loop, and torch._foreach."""

import pytest
import torch
from torch import Tensor

from fastppt_kernels import anchor_penalty_, lora_anchor_penalty_
from fastppt_kernels.anchor_penalty.reference import anchor_penalty_reference
from fastppt_kernels.lora_anchor_penalty.reference import lora_anchor_penalty_reference

WEIGHT = 1e-2
CONTEXT_WIDTH = 2048
# Width of SDXL's transformer blocks, and how many there are of it.
BLOCKS = {640: 10, 1280: 60}

# More OpenMP threads than free cores make this many times slower.
torch.set_num_threads(1)


def list_sdxl_adapters(rank: int) -> list[tuple[int, int]]:
    """Return the shapes of a down and an up for each projection of each attention."""
    shapes = []
    for width, num_blocks in BLOCKS.items():
        for key_width in (width, CONTEXT_WIDTH):  # attn1, attn2
            for in_width in (width, key_width, key_width, width):  # to_q, to_k, to_v, to_out
                shapes += [(rank, in_width), (width, rank)] * num_blocks
    return shapes


def make_lists(rank: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return parameters that require gradients, their anchors and their gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = list_sdxl_adapters(rank)
    params = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    anchors = [p.detach() + 1e-2 * torch.randn(p.shape, generator=generator) for p in params]
    grads = [torch.zeros(s) for s in shapes]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params, anchors, grads


def autograd_loop(params, anchors, grads, weight):
    """What a trainer would write: a term of the loss."""
    penalty = weight * sum((p - a).square().sum() for p, a in zip(params, anchors, strict=True))
    penalty.backward()
    return penalty.detach()


@torch.no_grad()
def foreach(params, anchors, grads, weight):
    """What a careful trainer would write."""
    differences = torch._foreach_sub(params, anchors)
    torch._foreach_add_(grads, differences, alpha=2 * weight)
    return weight * torch.stack(torch._foreach_norm(differences)).square().sum()


def refuse_if_wrong(penalty, wanted_penalty, updates, wanted, tolerance=1e-4) -> float:
    """Return the largest relative error; fail, and so report no time, above the tolerance."""
    errors = [((u - w).norm() / w.norm()).item() for u, w in zip(updates, wanted, strict=True)]
    error = max(*errors, abs(penalty.item() / wanted_penalty.item() - 1))
    assert error < tolerance, f"disagrees with the reference by {error:.1e}: no time is reported"
    return error


def note(benchmark, tensors: int, num_bytes: int, error: float) -> None:
    benchmark.extra_info |= {
        "tensors": tensors,
        "bytes moved": num_bytes,
        "error against the reference": error,
        "torch": torch.__version__,
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("way", [anchor_penalty_, foreach, autograd_loop])
@pytest.mark.parametrize("rank", [1, 4])
def test_anchor_penalty(benchmark, way, rank):
    benchmark.group = f"anchor, raw form, SDXL, rank {rank}"
    params, anchors, grads = make_lists(rank)
    wanted_penalty, wanted = anchor_penalty_reference(params, anchors, WEIGHT)
    penalty = way(params, anchors, grads, WEIGHT)
    error = refuse_if_wrong(penalty, wanted_penalty, [g.double() for g in grads], wanted)
    # Read param, anchor and gradient; write the gradient.
    note(benchmark, len(params), 4 * sum(p.nbytes for p in params), error)
    benchmark.pedantic(way, (params, anchors, grads, WEIGHT), rounds=15, warmup_rounds=3)


def autograd_effective_loop(downs, ups, scales, down_grads, up_grads, weight, **anchors):
    """||s B A||^2 from Grams, so that the loop does not form B A either."""
    penalty = weight * sum(
        scale**2 * ((up.T @ up) * (down @ down.T)).sum()
        for down, up, scale in zip(downs, ups, scales, strict=True)
    )
    penalty.backward()
    return penalty.detach()


def exact_penalty(downs, ups, scales, **anchors):
    """Return the op's penalty in float64."""
    downs, ups = ([t.detach().double() for t in ts] for ts in (downs, ups))
    return lora_anchor_penalty_(downs, ups, scales, None, None, WEIGHT, **anchors)


@pytest.mark.parametrize(
    ("way", "anchored"),
    [
        (lora_anchor_penalty_, False),
        (autograd_effective_loop, False),
        (lora_anchor_penalty_, True),
    ],
    ids=["op", "autograd loop", "op with anchors"],
)
@pytest.mark.parametrize("rank", [1, 4])
def test_lora_anchor_penalty(benchmark, way, anchored, rank):
    benchmark.group = f"anchor, effective form, SDXL, rank {rank}"
    params, anchors, grads = make_lists(rank)
    scales = [1.0] * (len(params) // 2)
    options = {"anchor_downs": anchors[::2], "anchor_ups": anchors[1::2]} if anchored else {}
    arguments = (params[::2], params[1::2], scales, grads[::2], grads[1::2], WEIGHT)
    penalty = way(*arguments, **options)
    # The reference forms B A, which takes seconds for all pairs: it judges the gradients of a
    # sample, and on that sample the float64 op, which then judges the penalty of all pairs.
    sample = range(0, len(scales), 40)
    picked = [[t[i] for i in sample] for t in arguments[:3]]
    picked_anchors = {name: [t[i] for i in sample] for name, t in options.items()}
    wanted_sample, *wanted = lora_anchor_penalty_reference(*picked, WEIGHT, **picked_anchors)
    exact_sample = exact_penalty(*picked, **picked_anchors)
    torch.testing.assert_close(exact_sample, wanted_sample, rtol=1e-9, atol=0)
    updates = [ts[i].double() for ts in arguments[3:5] for i in sample]
    wanted_penalty = exact_penalty(*arguments[:3], **options)
    error = refuse_if_wrong(penalty, wanted_penalty, updates, wanted[0] + wanted[1])
    note(benchmark, len(params), (4 if anchored else 3) * sum(p.nbytes for p in params), error)
    benchmark.pedantic(way, arguments, options, rounds=7, warmup_rounds=2)
