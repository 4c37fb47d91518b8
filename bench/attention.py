"""Attention alignment, alone and with the joint attention: problems, float64's results, ways.

A call does what a training step does: the base's map sums without a gradient, the losses of the
tuned side, and their gradient. What a call takes of memory is counted without the gradients.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from bench.shapes import Shape
from bench.ways import Way
from fastppt_kernels import (
    attention_alignment_loss,
    attention_map_sum,
    joint_attention,
    joint_attention_map_sum,
)
from fastppt_kernels.attention_alignment.reference import (
    attention_alignment_reference,
    attention_map_sum_reference,
)
from fastppt_kernels.joint_attention.reference import joint_attention_reference

# The base's queries and keys and the tuned network's differ by this part of their size, so that
# the difference of their maps has digits enough to be compared.
DRIFT = 0.5
# A joint attention's logsumexp is larger than that of its text keys, by about this.
IMAGE_KEYS = 1.0

# The losses of all layers, and the gradients of the queries, keys and logsumexps.
LossAndGrads = tuple[Tensor, Sequence[Tensor]]
# Query, key and logsumexp of a layer.
Layer = tuple[Tensor, Tensor, Tensor | None]
QueryKeyValue = tuple[Tensor, Tensor, Tensor]


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


def attention_op(problem: AttentionProblem) -> Way:
    def losses() -> list[Tensor]:
        losses = []
        for base, tuned in zip(problem.base, problem.tuned, strict=True):
            with torch.no_grad():
                base_map_sum = attention_map_sum(*base[:2], logsumexp=base[2])
            loss = attention_alignment_loss(*tuned[:2], base_map_sum, logsumexp=tuned[2])
            losses.append(loss)
        return losses

    return _way(problem.leaves, losses)


def attention_autograd(problem: AttentionProblem) -> Way:
    """What a trainer would write: the maps, summed over the heads."""

    def sum_maps(query: Tensor, key: Tensor, logsumexp: Tensor | None) -> Tensor:
        logits = (query @ key.mT).float() * query.shape[-1] ** -0.5
        if logsumexp is None:
            return logits.softmax(-1).sum(1)
        return (logits - logsumexp[..., None]).exp().sum(1)

    def losses() -> list[Tensor]:
        losses = []
        for base, tuned in zip(problem.base, problem.tuned, strict=True):
            with torch.no_grad():
                base_map_sum = sum_maps(*base)
            difference = sum_maps(*tuned) - base_map_sum
            losses.append(difference.square().sum((1, 2)).mean() / tuned[0].shape[1])
        return losses

    return _way(problem.leaves, losses)


class JointAttentionProblem:
    """Queries, keys and values of the base and of the tuned network, image tokens before text.

    [B, H, N, D] each, contiguous, as a joint attention's are that were concatenated. ``shapes``
    come as pairs of an image query and a text key, as those of :class:`AttentionProblem`.
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
        self.base: list[QueryKeyValue] = []
        self.tuned: list[QueryKeyValue] = []
        self.nums_text = [shape[2] for shape in shapes[1::2]]
        # What the rest of the network pulls at each output with, and its weight of each loss: so
        # large that both gradients are of one size, and a fault in either shows.
        self.output_grads: list[Tensor] = []
        self.loss_grads: list[Tensor] = []
        for image_shape, num_text in zip(shapes[::2], self.nums_text, strict=True):
            num_batches, num_heads, num_image, head_dim = image_shape
            shape = (num_batches, num_heads, num_image + num_text, head_dim)
            drawn = torch.randn((5, *shape), generator=generator, device=device)
            query, key, value, drift, output_grad = drawn.unbind()
            base = tuple(t.to(dtype) for t in (query, key, value))
            moved = tuple(t.to(dtype) for t in (query + DRIFT * drift, key, value))
            self.base.append(base)
            self.tuned.append(tuple(tensor.clone().requires_grad_() for tensor in moved))
            self.output_grads.append(output_grad.to(dtype))
            self.loss_grads.append(torch.full((), shape[2] ** 1.5, device=device))

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for layer in self.tuned for tensor in layer]


# From query, key and value to the output, and to the map sum or the loss.
Side = Callable[..., tuple[Tensor, Tensor]]


def exact_joint_attention(problem: JointAttentionProblem) -> LossAndGrads:
    total, grads = torch.zeros((), dtype=torch.float64), []
    layers = zip(
        problem.base,
        problem.tuned,
        problem.nums_text,
        problem.loss_grads,
        problem.output_grads,
        strict=True,
    )
    for base, tuned, num_text, *pulls in layers:
        num_image, scale = base[0].shape[2] - num_text, base[0].shape[3] ** -0.5
        query, key, _ = (tensor.double() for tensor in base)
        maps = (query[:, :, :num_image] @ key.mT * scale).softmax(-1)
        leaves = [tensor.detach().double().requires_grad_() for tensor in tuned]
        output, loss = joint_attention_reference(
            *leaves, num_text, maps[..., num_image:].sum(1), scale
        )
        grads += torch.autograd.grad([loss, output], leaves, [pull.double() for pull in pulls])
        total = total.to(loss.device) + loss.detach()
    return total, grads


def joint_attention_op(problem: JointAttentionProblem) -> Way:
    def base_side(*inputs: Tensor, num_text: int) -> tuple[Tensor, Tensor]:
        return joint_attention_map_sum(*inputs, num_text_tokens=num_text)

    def tuned_side(*inputs: Tensor, num_text: int, base: Tensor) -> tuple[Tensor, Tensor]:
        return joint_attention(*inputs, num_text_tokens=num_text, base_map_sum=base)

    return _joint_way(problem, base_side, tuned_side)


def joint_attention_flex(problem: JointAttentionProblem) -> Way:
    """FlexAttention, whose Triton backend returns a differentiable logsumexp, and our loss on it.

    Compiled, for else it makes all maps; it has no backward on the CPU.
    """
    attend = torch.compile(flex_attention, dynamic=False)

    def split(query: Tensor, key: Tensor, value: Tensor, num_text: int) -> tuple[Tensor, Layer]:
        output, aux = attend(query, key, value, return_aux=AuxRequest(lse=True))
        num_image = query.shape[2] - num_text
        image, text = query[:, :, :num_image], key[:, :, num_image:]
        return output, (image, text, aux.lse[:, :, :num_image])

    def base_side(*inputs: Tensor, num_text: int) -> tuple[Tensor, Tensor]:
        output, (query, key, logsumexp) = split(*inputs, num_text)
        return output, attention_map_sum(query, key, logsumexp=logsumexp)

    def tuned_side(*inputs: Tensor, num_text: int, base: Tensor) -> tuple[Tensor, Tensor]:
        output, (query, key, logsumexp) = split(*inputs, num_text)
        return output, attention_alignment_loss(query, key, base, logsumexp=logsumexp)

    return _joint_way(problem, base_side, tuned_side)


def joint_attention_autograd(problem: JointAttentionProblem) -> Way:
    """What a trainer would write: all maps, and of them the block that is compared."""

    def base_side(
        query: Tensor, key: Tensor, value: Tensor, *, num_text: int
    ) -> tuple[Tensor, Tensor]:
        maps = ((query @ key.mT).float() * query.shape[-1] ** -0.5).softmax(-1)
        num_image = query.shape[2] - num_text
        return maps.to(value.dtype) @ value, maps[:, :, :num_image, num_image:].sum(1)

    def tuned_side(*inputs: Tensor, num_text: int, base: Tensor) -> tuple[Tensor, Tensor]:
        output, map_sum = base_side(*inputs, num_text=num_text)
        return output, (map_sum - base).square().sum((1, 2)).mean() / inputs[0].shape[1]

    return _joint_way(problem, base_side, tuned_side)


def count_maps(shapes: Sequence[Shape]) -> int:
    """Return the elements of the maps [B, H, Q, K] of all layers."""
    pairs = zip(shapes[::2], shapes[1::2], strict=True)
    return sum(prod(query[:3]) * key[2] for query, key in pairs)


def count_alignment_flops(shapes: Sequence[Shape]) -> int:
    """Return the operations of the products of the maps.

    The base's and the tuned network's, in the backward the tuned again (for none is stored), dQ
    and dK.
    """
    pairs = zip(shapes[::2], shapes[1::2], strict=True)
    return sum(5 * 2 * count_maps(pair) * pair[0][3] for pair in pairs)


def count_joint_flops(shapes: Sequence[Shape]) -> int:
    """Return the operations of the products of the joint attentions and of their text blocks.

    Q K^T and P V of the base and of the tuned network, in the backward Q K^T again, dP, dQ, dK, dV.
    """
    flops = count_alignment_flops(shapes)
    for image, text in zip(shapes[::2], shapes[1::2], strict=True):
        num_batches, num_heads, num_image, head_dim = image
        flops += 9 * 2 * num_batches * num_heads * (num_image + text[2]) ** 2 * head_dim
    return flops


def _joint_way(problem: JointAttentionProblem, base_side: Side, tuned_side: Side) -> Way:
    def losses_and_outputs() -> list[Tensor]:
        losses, outputs = [], []
        for base, tuned, num_text in zip(
            problem.base, problem.tuned, problem.nums_text, strict=True
        ):
            with torch.no_grad():
                _, base_map_sum = base_side(*base, num_text=num_text)
            output, loss = tuned_side(*tuned, num_text=num_text, base=base_map_sum)
            losses.append(loss)
            outputs.append(output)
        return losses + outputs

    return _way(problem.leaves, losses_and_outputs, [*problem.loss_grads, *problem.output_grads])


def _way(
    leaves: list[Tensor], forward: Callable[[], list[Tensor]], pulls: list[Tensor] | None = None
) -> Way:
    """Return the way of a forward.

    Args:
        leaves: What gets a gradient.
        forward: Returns the losses of the layers; with ``pulls``, the outputs of as many after.
        pulls: The gradients of what it returns; None: ones.
    """

    def call() -> LossAndGrads:
        results = forward()
        losses = results if pulls is None else results[: len(results) // 2]
        return torch.stack(losses).sum().detach(), torch.autograd.grad(results, leaves, pulls)

    def call_letting_go() -> None:
        def let_go(leaf: Tensor) -> None:
            leaf.grad = None

        hooks = [leaf.register_post_accumulate_grad_hook(let_go) for leaf in leaves]
        torch.autograd.backward(forward(), pulls)
        for hook in hooks:
            hook.remove()

    return Way(call, letting_go=call_letting_go)
