"""Attention alignment: problems, what float64 makes of them, ways.

A call does what a training step does: the base's map sums without a gradient, the losses of the
tuned side, and their gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.shapes import Shape
from bench.ways import Call
from fastppt_kernels import attention_alignment_loss, attention_map_sum
from fastppt_kernels.attention_alignment.reference import (
    attention_alignment_reference,
    attention_map_sum_reference,
)

# The base's queries and keys and the tuned network's differ by this part of their size, so that
# the difference of their maps has digits enough to be compared.
DRIFT = 0.5
# A joint attention's logsumexp is larger than that of its text keys, by about this.
IMAGE_KEYS = 1.0

# The losses of all layers, and the gradients of the queries, keys and logsumexps.
LossAndGrads = tuple[Tensor, Sequence[Tensor]]
# Query, key and logsumexp of a layer.
Layer = tuple[Tensor, Tensor, Tensor | None]


class AttentionProblem:
    """Queries and keys of the base and of the tuned network; shapes come as such pairs.

    [B, H, N, D] each, in the memory of [B, N, H * D] as attention processors have it. ``joint``:
    with a logsumexp over more keys than these.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        joint: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(shape: Shape) -> Tensor:
            num_batches, num_heads, num_tokens, head_dim = shape
            size = (num_batches, num_tokens, num_heads, head_dim)
            return torch.randn(size, generator=generator, device=device).transpose(1, 2)

        self.base: list[Layer] = []
        self.tuned: list[Layer] = []
        for query_shape, key_shape in zip(shapes[::2], shapes[1::2], strict=True):
            query, key = draw(query_shape), draw(key_shape)
            moved_query = query + DRIFT * draw(query_shape)
            for a_query, kept in ((query, self.base), (moved_query, self.tuned)):
                logsumexp = None
                if joint:
                    scale = query_shape[-1] ** -0.5
                    logsumexp = (a_query @ key.mT * scale).logsumexp(-1) + IMAGE_KEYS
                kept.append((a_query.to(dtype), key.to(dtype), logsumexp))
        for tensor in self.leaves:
            tensor.requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for layer in self.tuned for tensor in layer if tensor is not None]


def exact_attention(problem: AttentionProblem) -> LossAndGrads:
    total, grads = torch.zeros((), dtype=torch.float64), []
    for base, tuned in zip(problem.base, problem.tuned, strict=True):
        scale = tuned[0].shape[-1] ** -0.5
        base_map_sum = attention_map_sum_reference(*base[:2], scale, base[2])
        leaves = [None if t is None else t.detach().double().requires_grad_() for t in tuned]
        loss = attention_alignment_reference(*leaves[:2], base_map_sum, scale, leaves[2])
        grads += torch.autograd.grad(loss, [t for t in leaves if t is not None])
        total = total.to(loss.device) + loss.detach()
    return total, grads


def attention_op(problem: AttentionProblem) -> Call:
    def call() -> LossAndGrads:
        losses = []
        for base, tuned in zip(problem.base, problem.tuned, strict=True):
            with torch.no_grad():
                base_map_sum = attention_map_sum(*base[:2], logsumexp=base[2])
            loss = attention_alignment_loss(*tuned[:2], base_map_sum, logsumexp=tuned[2])
            losses.append(loss)
        total = torch.stack(losses).sum()
        return total.detach(), torch.autograd.grad(total, problem.leaves)

    return call


def attention_autograd(problem: AttentionProblem) -> Call:
    """What a trainer would write: the maps, summed over the heads."""

    def sum_maps(query: Tensor, key: Tensor, logsumexp: Tensor | None) -> Tensor:
        logits = (query @ key.mT).float() * query.shape[-1] ** -0.5
        if logsumexp is None:
            return logits.softmax(-1).sum(1)
        return (logits - logsumexp[..., None]).exp().sum(1)

    def call() -> LossAndGrads:
        losses = []
        for base, tuned in zip(problem.base, problem.tuned, strict=True):
            with torch.no_grad():
                base_map_sum = sum_maps(*base)
            difference = sum_maps(*tuned) - base_map_sum
            losses.append(difference.square().sum((1, 2)).mean() / tuned[0].shape[1])
        total = torch.stack(losses).sum()
        return total.detach(), torch.autograd.grad(total, problem.leaves)

    return call
