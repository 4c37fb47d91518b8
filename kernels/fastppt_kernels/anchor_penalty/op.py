"""The anchor penalty: checks, the launch of its kernels, and the PyTorch path."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastppt_kernels.checks import (
    check_distinct,
    check_lengths,
    check_shapes,
    check_tensors,
    check_weight,
)
from fastppt_kernels.chunks import cut_into_chunks
from fastppt_kernels.launch import (
    KernelConfiguration,
    chunk_table,
    device_of,
    have_codes,
    split_weight,
    use_triton,
    weight_arguments,
)

# Elements a program: 12 wide loads in flight for each of its 256 threads.
CHUNK_SIZE = 4096
NUM_WARPS = 8
# Partial sums that the one program of the reduction reads at a time.
PARTIALS_SIZE = 4096
# On the CPU, measured on SDXL's adapters: elements of a chunk, whose differences stay in the cache;
# and the mean elements of a tensor below which differences are copied into one tensor for their
# sum of squares (a quarter faster than norms at rank 1, a tenth at rank 4, slower at rank 32).
CPU_CHUNK_SIZE = 1 << 16
SMALL_TENSOR = 1 << 14


def anchor_penalty_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    grads: Sequence[Tensor] | None,
    weight: float | Tensor,
) -> Tensor:
    """Add the anchor's gradient to ``grads`` in place and return the penalty.

    penalty = weight * sum_i ||param_i - anchor_i||^2,   grad_i += 2 * weight * (param_i - anchor_i)

    Source: Preserve and Personalize (arXiv 2505.19519), Algorithm 1, line 9.

    Args:
        params: Contiguous tensors of any shapes and floating-point dtypes, all on one device.
            Not written.
        anchors: One contiguous tensor for each parameter, of its shape and device; None means
            zeros and reads nothing. Not written.
        grads: One contiguous tensor for each parameter, of its shape and device; written.
            None: only the penalty is computed.
        weight: A float, or a 0-dim tensor on the device of ``params`` (a captured graph sees its
            new values; a float is baked in).

    Returns:
        0-dim tensor on the device of ``params``: float64 if any tensor given is float64, else
        float32. Reading it on the host synchronises. Empty lists give a float32 zero on the CPU.

    Raises:
        ValueError: Lists of different length; a tensor of another shape or device than its
            partner, not contiguous or not floating-point, or a gradient given twice (named by its
            index); a weight that is neither a float nor such a tensor.

    Rounding: differences and sums are taken in float32 (float64 if any tensor given is float64).
        A float16 or bfloat16 gradient is widened, added to and rounded once. Sums are taken in
        one order: two runs are equal bit by bit.

    Memory traffic: 4 reads or writes an element (3 when the anchor is None; 2 and 1 without
        ``grads``), which is the floor; a GPU reads 40 bytes of table and writes 4 for each chunk
        of 4096 elements besides (0.1 %). Temporaries stay in the cache on the CPU. FLOPs: 5 an
        element, 0.3 a byte: memory is the limit everywhere.
    """
    lists: dict[str, Sequence[Tensor | None]] = {"params": params, "anchors": anchors}
    if grads is not None:
        lists["grads"] = grads
    check_lengths(dict(lists))
    dtypes = check_tensors(lists, holes=["anchors"])
    check_shapes("params", params, {k: v for k, v in lists.items() if k != "params"})
    check_distinct("grads", grads)
    check_weight(weight, params)
    if not params:
        return torch.zeros(())
    if use_triton(params[0]) and all(map(have_codes, (params, anchors, grads or ()))):
        return launch_anchor_penalty_(params, anchors, grads, weight)
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    # A call into torch costs a sixth less than under no_grad.
    with torch.inference_mode():
        penalty = _foreach_anchor_penalty_(
            params, anchors, grads, weight, dtype, casts=dtypes != {dtype}
        )
    # Outside of it, so that autograd may use it.
    return penalty.clone()


def _foreach_anchor_penalty_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    grads: Sequence[Tensor] | None,
    weight: float | Tensor,
    dtype: torch.dtype,
    *,
    casts: bool,
) -> Tensor:
    """Do the work of :func:`anchor_penalty_` in PyTorch and ``dtype``; ``casts``: not all have it.

    On the CPU arithmetic is cheap and a visit of a tensor costs a microsecond: there are three
    (difference, sum of squares, gradient), and the difference is still in the cache at the later.
    """
    # CPU: no sum is too long for float32 (one over 46 M elements is 0.2 % wrong), and differences
    # stay in the cache. Elsewhere: few launches.
    size = CPU_CHUNK_SIZE if params[0].device.type == "cpu" else 1 << 24
    squares: list[Tensor] = []
    for has_anchors, members in _batches(params, anchors, grads):
        for chunk in cut_into_chunks(members, size, size // 4):
            sides = chunk[: 1 + has_anchors]
            if casts:
                sides = [[t.to(dtype) for t in tensors] for tensors in sides]
            squares += _anchor_chunk_(sides, None if grads is None else chunk[-1], weight)
    return (weight * torch.stack(squares).sum()).to(dtype)


def _anchor_chunk_(
    sides: list[list[Tensor]], grads: list[Tensor] | None, weight: float | Tensor
) -> list[Tensor]:
    """Add to ``grads``; return sums of squares. ``sides``: params, and anchors if there are any."""
    # A function of its own: its differences are gone before the next chunk's take their place.
    differences = [*torch._foreach_sub(*sides)] if len(sides) == 2 else sides[0]
    if differences[0].device.type != "cpu":
        squares = [torch.stack(torch._foreach_norm(differences)).square_().sum()]
    elif len(differences) * SMALL_TENSOR > CPU_CHUNK_SIZE:
        flat = torch._C._nn.flatten_dense_tensors(differences)
        squares = [torch.dot(flat, flat)]
        del flat
    else:
        squares = [torch.dot(flat, flat) for flat in [d.view(-1) for d in differences]]
    if grads is None:
        return squares
    if isinstance(weight, Tensor):
        torch._foreach_add_(grads, torch._foreach_mul(differences, 2 * weight))
    else:
        torch._foreach_add_(grads, differences, alpha=2 * weight)
    return squares


def launch_anchor_penalty_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    grads: Sequence[Tensor] | None,
    weight: float | Tensor,
) -> Tensor:
    """Do the work of :func:`anchor_penalty_` in two launches, whatever the number of tensors."""
    from fastppt_kernels.anchor_penalty.triton_kernel import anchor_penalty_kernel

    device = params[0].device
    if not any(map(Tensor.numel, params)):
        return torch.zeros((), device=device)
    holes: list[None] = [None] * len(params)
    table = chunk_table([params, anchors, grads or holes], CHUNK_SIZE)
    partials = torch.empty(len(table), dtype=torch.float32, device=device)
    weight_tensor, weight_value = split_weight(weight)
    with device_of(params[0]):
        anchor_penalty_kernel[(len(table),)](
            table,
            partials,
            weight_tensor if grads is not None else None,
            weight_value,
            HAS_GRADS=grads is not None,
            BLOCK_SIZE=CHUNK_SIZE,
            num_warps=NUM_WARPS,
        )
    return launch_weighted_sum(partials, weight)


def launch_weighted_sum(partials: Tensor, weight: float | Tensor) -> Tensor:
    """Return weight * the sum of ``partials`` (float32, contiguous), always in one order."""
    from fastppt_kernels.anchor_penalty.triton_kernel import weighted_sum_kernel

    total = torch.empty((), dtype=torch.float32, device=partials.device)
    weight_tensor, weight_value = split_weight(weight)
    with device_of(partials):
        weighted_sum_kernel[(1,)](
            partials,
            total,
            weight_tensor,
            weight_value,
            partials.numel(),
            BLOCK_SIZE=PARTIALS_SIZE,
            num_warps=NUM_WARPS,
        )
    return total


def kernel_configurations() -> list[KernelConfiguration]:
    """Return every way in which the two launches compile."""
    from fastppt_kernels.anchor_penalty.triton_kernel import (
        anchor_penalty_kernel,
        weighted_sum_kernel,
    )

    configurations = []
    for has_grads, weight_type in ((True, "fp32"), (True, "*fp32"), (False, "fp32")):
        pointer, signature = weight_arguments(weight_type)
        configurations.append(
            KernelConfiguration(
                "anchor_penalty",
                anchor_penalty_kernel,
                {"table_ptr": "*i64", "partial_ptr": "*fp32"}
                | signature
                | {"HAS_GRADS": "constexpr", "BLOCK_SIZE": "constexpr"},
                pointer | {"HAS_GRADS": has_grads, "BLOCK_SIZE": CHUNK_SIZE},
                NUM_WARPS,
            )
        )
    for weight_type in ("fp32", "*fp32"):
        pointer, signature = weight_arguments(weight_type)
        configurations.append(
            KernelConfiguration(
                "weighted_sum",
                weighted_sum_kernel,
                {"partial_ptr": "*fp32", "sum_ptr": "*fp32"}
                | signature
                | {"num_partials": "i32", "BLOCK_SIZE": "constexpr"},
                pointer | {"BLOCK_SIZE": PARTIALS_SIZE},
                NUM_WARPS,
            )
        )
    return configurations


def _batches(
    params: Sequence[Tensor], anchors: Sequence[Tensor | None], grads: Sequence[Tensor] | None
) -> Iterator[tuple[bool, list[list[Tensor]]]]:
    """Yield whether there are anchors, and params, anchors if so, and grads, without holes."""
    present = [t for t in anchors if t is not None]
    if len(present) == len(params):
        yield True, [[*params], present, *([] if grads is None else [[*grads]])]
        return
    for has_anchors in (True, False):
        chosen = [i for i, anchor in enumerate(anchors) if (anchor is not None) == has_anchors]
        lists = [params, *([] if grads is None else [grads])]
        picked = [[tensors[i] for i in chosen] for tensors in lists]
        yield has_anchors, [picked[0], *([present] if has_anchors else []), *picked[1:]]
