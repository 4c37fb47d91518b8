"""The launches of feature alignment: memory layouts, how the work is cut, configurations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.launch import (
    ALIGNED_ELEMENTS,
    POINTER_TYPES,
    KernelConfiguration,
    device_of,
)

# Channels and positions a tile: 4096 features, wide loads along the memory.
TILES = {"channels_first": (4, 1024), "channels_last": (64, 64), "strided": (4, 1024)}
# Rows (channels of samples) that the merge reads at a time, and the most splits of each.
MERGE_ROWS, MAX_SPLITS = 256, 16
NUM_WARPS = 8
# Positions are split until there are this many programs, some for each multiprocessor of a large
# GPU. By the shape alone, so that every device sums in one order.
WANTED_PROGRAMS = 512


@dataclass(frozen=True)
class Strides:
    """Where a [B, C, N] tensor's elements are; position n is at row n // width, column n % width.

    Attributes:
        width: Positions a row; N where one stride is enough.
        b: Stride of a sample, in elements.
        c: Of a channel.
        h: Of a row.
        w: Of a column.
    """

    width: int
    b: int
    c: int
    h: int
    w: int


def read_strides(*tensors: Tensor) -> list[Strides]:
    """Return the strides of [B, C, ...] tensors of one shape, with one width for all.

    Those of a dimension of size 1 are 0 or 1.

    Raises:
        ValueError: The dimensions after the second need more than two strides.
    """
    shape = tensors[0].shape
    space = _merge_space(tensors)
    if len(space) > 2:
        raise ValueError(
            f"features: got strides {tensors[0].stride()} for shape {tuple(shape)}, "
            "want positions that at most two strides reach; pass features.contiguous()"
        )
    nothing = [(1, [0] * len(tensors)), (1, [1] * len(tensors))]
    (_, strides_h), (width, strides_w) = [*nothing, *space][-2:]
    return [
        Strides(
            width,
            tensor.stride(0) if shape[0] > 1 else 0,
            tensor.stride(1) if shape[1] > 1 else 1,
            stride_h,
            stride_w,
        )
        for tensor, stride_h, stride_w in zip(tensors, strides_h, strides_w, strict=True)
    ]


def _merge_space(tensors: Sequence[Tensor]) -> list[tuple[int, list[int]]]:
    """Return sizes of the dimensions after the second, and the stride of each tensor in them.

    What lies side by side for all of them is one dimension; one of size 1 is none.
    """
    space: list[tuple[int, list[int]]] = []
    for dim in range(2, tensors[0].dim()):
        size, strides = tensors[0].shape[dim], [t.stride(dim) for t in tensors]
        if size == 1:
            continue
        if space and space[-1][1] == [size * stride for stride in strides]:
            space[-1] = (space[-1][0] * size, strides)
        else:
            space.append((size, strides))
    return space


def lies_like(tensor: Tensor, other: Tensor) -> bool:
    """Say whether reading the tensor beside the other, of its shape, goes along both memories.

    A slice of the channels, as a concatenation gives it to its parts in a backward pass, does.
    """
    if tensor.stride() == other.stride():
        return True
    if len(_merge_space([tensor])) > 1 or len(_merge_space([other])) > 1:
        return False
    layout, other_layout = (choose_layout(t, read_strides(t))[0] for t in (tensor, other))
    return layout == other_layout != "strided"


def choose_layout(features: Tensor, strides: list[Strides]) -> tuple[str, bool]:
    """Return LAYOUT and ALIGNED of a launch.

    Args:
        features: [B, C, ...]; only its shape is read.
        strides: Of all tensors of that shape that the launch reads or writes.
    """
    num_channels, num_positions = features.shape[1], features.shape[2:].numel()
    if strides[0].width == num_positions and all(s.w == 1 for s in strides):
        sizes = [num_positions, *(s.c for s in strides)]
        layout = "channels_first"
    elif strides[0].width == num_positions and all(s.c == 1 for s in strides):
        sizes = [num_channels, *(s.w for s in strides)]
        layout = "channels_last"
    else:
        return "strided", False
    sizes += [s.b for s in strides]
    return layout, all(size % ALIGNED_ELEMENTS == 0 for size in sizes)


def cut_positions(num_positions: int, layout: str, num_programs: int) -> tuple[int, int]:
    """Return the length and the number of the splits of the positions.

    Args:
        num_positions: N.
        layout: LAYOUT.
        num_programs: Programs that one split makes.
    """
    tile = TILES[layout][1]
    wanted = min(max(WANTED_PROGRAMS // num_programs, 1), MAX_SPLITS)
    length = math.ceil(math.ceil(num_positions / tile) / wanted) * tile
    return length, math.ceil(num_positions / length)


def launch_statistics(
    features: Tensor, base: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, ...]:
    """Return mean and std [B, C], and with a base mean_loss and std_loss, in two launches.

    Args:
        features: [B, C, ...], float32, bfloat16 or float16.
        base: base_mean and base_std, float32 [B, C].
        eps: What is added to the variance.
    """
    from fastppt_kernels.feature_alignment.triton_kernel import (
        feature_merge_kernel,
        feature_partials_kernel,
    )

    num_samples, num_channels = features.shape[:2]
    num_positions = features.shape[2:].numel()
    (strides,) = read_strides(features)
    layout, aligned = choose_layout(features, [strides])
    block_channels, block_positions = TILES[layout]
    channel_blocks = math.ceil(num_channels / block_channels)
    length, num_splits = cut_positions(num_positions, layout, channel_blocks * num_samples)
    shape = (num_samples, num_splits, 2, num_channels)
    partials = torch.empty(shape, dtype=torch.float32, device=features.device)
    mean, std = (partials.new_empty(num_samples, num_channels) for _ in range(2))
    base_mean, base_std = (t.contiguous() for t in base) if base else (None, None)
    mean_loss, std_loss = (partials.new_empty(()) if base else None for _ in range(2))
    num_rows = num_samples * num_channels
    with device_of(features):
        feature_partials_kernel[(channel_blocks, num_splits, num_samples)](
            features,
            partials,
            num_channels,
            num_positions,
            length // block_positions,
            strides.width,
            strides.b,
            strides.c,
            strides.h,
            strides.w,
            LAYOUT=layout,
            ALIGNED=aligned,
            BLOCK_CHANNELS=block_channels,
            BLOCK_POSITIONS=block_positions,
            num_warps=NUM_WARPS,
        )
        feature_merge_kernel[(1 if base else math.ceil(num_rows / MERGE_ROWS),)](
            partials,
            base_mean,
            base_std,
            mean,
            std,
            mean_loss,
            std_loss,
            num_rows,
            num_channels,
            num_positions,
            length,
            num_splits,
            eps,
            BLOCK_ROWS=MERGE_ROWS,
            BLOCK_SPLITS=MAX_SPLITS,
            num_warps=NUM_WARPS,
        )
    if mean_loss is None or std_loss is None:
        return mean, std
    return mean, std, mean_loss, std_loss


def launch_backward(
    features: Tensor,
    mean: Tensor,
    std: Tensor,
    base: tuple[Tensor, Tensor] | None,
    mean_grad: Tensor,
    std_grad: Tensor,
    incoming: Tensor | None,
) -> Tensor:
    """Return the gradient of the features, of their memory layout, in one launch.

    Args:
        features: [B, C, ...], float32, bfloat16 or float16.
        mean: float32 [B, C].
        std: float32 [B, C].
        base: base_mean and base_std, float32 [B, C].
        mean_grad: float32: the gradient of mean_loss with a base, of mean [B, C] without.
        std_grad: float32, alike.
        incoming: [B, C, ...], what the gradient is added to; None for zeros. Copied where it does
            not lie like the gradient, or is of another dtype.
    """
    from fastppt_kernels.feature_alignment.triton_kernel import feature_backward_kernel

    num_samples, num_channels = features.shape[:2]
    num_positions = features.shape[2:].numel()
    grad = torch.empty_like(features)
    if incoming is not None and not (incoming.dtype == grad.dtype and lies_like(incoming, grad)):
        incoming = torch.empty_like(grad).copy_(incoming)
    added = grad if incoming is None else incoming
    strides, added_strides, grad_strides = read_strides(features, added, grad)
    layout, aligned = choose_layout(features, [strides, added_strides, grad_strides])
    block_channels, block_positions = TILES[layout]
    base_mean, base_std = (t.contiguous() for t in base) if base else (None, None)
    grid = (
        math.ceil(num_positions / block_positions),
        math.ceil(num_channels / block_channels),
        num_samples,
    )
    with device_of(features):
        feature_backward_kernel[grid](
            features,
            incoming,
            grad,
            mean,
            std,
            base_mean,
            base_std,
            mean_grad.contiguous(),
            std_grad.contiguous(),
            num_channels,
            num_positions,
            strides.width,
            strides.b,
            strides.c,
            strides.h,
            strides.w,
            added_strides.b,
            added_strides.c,
            added_strides.h,
            added_strides.w,
            grad_strides.b,
            grad_strides.c,
            grad_strides.h,
            grad_strides.w,
            LAYOUT=layout,
            ALIGNED=aligned,
            BLOCK_CHANNELS=block_channels,
            BLOCK_POSITIONS=block_positions,
            num_warps=NUM_WARPS,
        )
    return grad


_INTEGERS = ("num_channels", "num_positions", "split_tiles", "width")
_STRIDES = ("stride_b", "stride_c", "stride_h", "stride_w")
_INCOMING_STRIDES = ("stride_ib", "stride_ic", "stride_ih", "stride_iw")
_GRAD_STRIDES = ("stride_gb", "stride_gc", "stride_gh", "stride_gw")


def kernel_configurations() -> list[KernelConfiguration]:
    """Return every way in which the three launches compile."""
    from fastppt_kernels.feature_alignment.triton_kernel import (
        feature_backward_kernel,
        feature_partials_kernel,
    )

    configurations = []
    for dtype, pointer in POINTER_TYPES.items():
        for layout, aligned in [
            ("channels_first", True),
            ("channels_first", False),
            ("channels_last", True),
            ("channels_last", False),
            ("strided", False),
        ]:
            constexprs: dict[str, Any] = {"LAYOUT": layout, "ALIGNED": aligned}
            constexprs["BLOCK_CHANNELS"], constexprs["BLOCK_POSITIONS"] = TILES[layout]
            signature = {"feature_ptr": pointer, "partial_ptr": "*fp32"}
            signature |= dict.fromkeys(_INTEGERS + _STRIDES, "i32")
            configurations.append(
                KernelConfiguration(
                    f"feature_partials, {dtype}",
                    feature_partials_kernel,
                    signature | dict.fromkeys(constexprs, "constexpr"),
                    constexprs,
                    NUM_WARPS,
                )
            )
            # The gradient of the statistics alone, of the losses, and of the losses added to g.
            for base, incoming in (
                ("constexpr", "constexpr"),
                ("*fp32", "constexpr"),
                ("*fp32", pointer),
            ):
                signature = {"feature_ptr": pointer, "incoming_ptr": incoming}
                signature["feature_grad_ptr"] = pointer
                signature |= dict.fromkeys(("mean_ptr", "std_ptr"), "*fp32")
                signature |= dict.fromkeys(("base_mean_ptr", "base_std_ptr"), base)
                signature |= dict.fromkeys(("mean_grad_ptr", "std_grad_ptr"), "*fp32")
                integers = [n for n in _INTEGERS if n != "split_tiles"]
                integers += [*_STRIDES, *_INCOMING_STRIDES, *_GRAD_STRIDES]
                signature |= dict.fromkeys(integers, "i32")
                configurations.append(
                    KernelConfiguration(
                        f"feature_backward, {dtype}",
                        feature_backward_kernel,
                        signature | dict.fromkeys(constexprs, "constexpr"),
                        _without_pointers(signature) | constexprs,
                        NUM_WARPS,
                    )
                )
    return configurations + [_merge_configuration(base) for base in ("*fp32", "constexpr")]


def _merge_configuration(base: str) -> KernelConfiguration:
    from fastppt_kernels.feature_alignment.triton_kernel import feature_merge_kernel

    signature = {"partial_ptr": "*fp32", "base_mean_ptr": base, "base_std_ptr": base}
    signature |= {"mean_ptr": "*fp32", "std_ptr": "*fp32"}
    signature |= {"mean_loss_ptr": base, "std_loss_ptr": base}
    integers = ("num_rows", "num_channels", "num_positions", "split_length", "num_splits")
    signature |= dict.fromkeys(integers, "i32") | {"eps": "fp32"}
    constexprs = {"BLOCK_ROWS": MERGE_ROWS, "BLOCK_SPLITS": MAX_SPLITS}
    return KernelConfiguration(
        "feature_merge",
        feature_merge_kernel,
        signature | dict.fromkeys(constexprs, "constexpr"),
        _without_pointers(signature) | constexprs,
        NUM_WARPS,
    )


def _without_pointers(signature: dict[str, str]) -> dict[str, Any]:
    """Return the constexprs of the pointers that are not given."""
    return dict.fromkeys(name for name, kind in signature.items() if kind == "constexpr")
