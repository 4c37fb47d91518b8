"""The step: which path it takes, and the launches of its kernels."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.anchored_adamw import staging
from fastppt_kernels.anchored_adamw.batch import Batch
from fastppt_kernels.anchored_adamw.eight_bit import make_map_table
from fastppt_kernels.anchored_adamw.launcher import Launcher
from fastppt_kernels.anchored_adamw.plain import is_dense, plain_step_
from fastppt_kernels.anchored_adamw.rounding import COUNTER_CHUNK
from fastppt_kernels.anchored_adamw.staging import AnchorStream, Plan, make_plan
from fastppt_kernels.anchored_adamw.tables import batch_table, step_table
from fastppt_kernels.launch import device_of, have_codes, use_triton

# Elements a program: 8 a thread, two wide loads from each tensor. Whole blocks of 8-bit moments.
CHUNK_SIZE = COUNTER_CHUNK
NUM_WARPS = 8
# Partials that the one program of the reduction reads at a time.
REDUCE_SIZE = 1024
# How the kernels call the forms; triton_kernel.py reads it.
PULLS = {"none": 0, "raw": 1, "decoupled": 2}


def anchored_adamw_(
    batches: Sequence[Batch],
    max_grad_norm: float | None = None,
    *,
    extra_penalties: Sequence[Tensor] = (),
    skip: Tensor | None = None,
    skip_non_finite: bool = False,
    launcher: Launcher | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step of AdamW in place, with the pull to the anchor and the clip.

    d = theta - theta_0,   penalty = sum over batches of anchor_weight ||d||^2
    form "raw":  g += 2 anchor_weight d
    grad_norm = ||g|| over all batches,   g *= min(1, max_grad_norm / (grad_norm + 1e-6))
    t += 1,   m += (1 - beta1)(g - m),   v = beta2 v + (1 - beta2) g^2
    theta -= lr weight_decay theta + lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    form "decoupled":  theta -= lr anchor_weight d as well

    Source: as ``anchored_adamw_reference``, its specification.

    Args:
        batches: At least one; none without parameters. See :class:`Batch` for what is written;
            gradients may be, and hold nothing of use afterwards.
        max_grad_norm: The largest norm; None: no clip. A norm of NaN makes all NaN, an infinite
            one zeros, as torch's clip does, unless ``skip_non_finite``.
        extra_penalties: 0-dim tensors, added to the penalty: of pulls that are in the gradients
            already.
        skip: 0-dim tensor; where it is not 0, parameters, moments, steps and copies stay.
        skip_non_finite: They stay as well where grad_norm is NaN or infinite, be it that the sum
            of the squares of finite gradients is more than its dtype holds.
        launcher: Keeps float options on the device between steps; None: they are written anew.

    Returns:
        penalty, grad_norm, and, as a bool, whether the step was skipped; 0-dim, on the device of
        the first parameter.

    On a GPU two launches for each group and one for all, whatever the number of tensors; on the
    CPU, and for float64 or parameters that are not dense, plain PyTorch.

    Anchors in host memory are copied to the device twice a step, beside the kernels of the pieces
    before, through two buffers of at most 16 MiB; the results are those of anchors on the device,
    bit for bit.

    Rounding: in float32 (float64 for float64 parameters); each stored value is rounded once, up or
        down at random where a batch has a ``rounding_seed``. Sums within a chunk in float32, over
        chunks in a fixed order.

    Memory traffic: an element of a float32 parameter with an anchor takes 12 bytes, then 32
        (4, then 28 without); one of a bfloat16 parameter with gradient and anchor in bfloat16 and
        moments in 8 bits takes 6, then 12.
    """
    if _fit_kernels(batches):
        launcher = Launcher() if launcher is None else launcher
        return _launch_(batches, max_grad_norm, extra_penalties, skip, skip_non_finite, launcher)
    return plain_step_(batches, max_grad_norm, extra_penalties, skip, skip_non_finite)


def _fit_kernels(batches: Sequence[Batch]) -> bool:
    """Say whether kernels run where the tensors are, and take their dtypes and strides."""
    params = [p for batch in batches for p in batch.params]
    if not use_triton(params[0]) or len({p.device for p in params}) > 1:
        return False
    return all(
        have_codes([*b.params, *b.grads, *b.copies])
        and (b.form == "none" or have_codes(b.anchors))
        and {m.dtype for m in (*b.exp_avgs, *b.exp_avg_sqs)}
        == {torch.uint8 if b.has_codes else torch.float32}
        and _walk_alike(b.params, b.exp_avgs)
        for b in batches
    )


def _walk_alike(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Say whether each pair, walked as one stretch of memory, meets the same elements."""
    if all(map(Tensor.is_contiguous, tensors)) and all(map(Tensor.is_contiguous, others)):
        return True
    pairs = zip(tensors, others, strict=True)
    return all(is_dense(t) and t.stride() == o.stride() for t, o in pairs)


def _launch_(
    batches: Sequence[Batch],
    max_grad_norm: float | None,
    extra_penalties: Sequence[Tensor],
    skip: Tensor | None,
    skip_non_finite: bool,
    launcher: Launcher,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastppt_kernels.anchored_adamw import triton_kernel as kernels

    first = batches[0].params[0]
    device = first.device
    batches = [_align_gradients(number, batch, launcher) for number, batch in enumerate(batches)]
    plans = [_plan_of(batch) for batch in batches]
    num_bytes = max((plan.num_bytes for plan in plans if plan is not None), default=0)
    stream = launcher.stream_of(device, num_bytes) if num_bytes else None
    tables = [
        batch_table(batch, CHUNK_SIZE, plan, stream)
        for batch, plan in zip(batches, plans, strict=True)
    ]
    num_chunks = sum(len(table) for table in tables)
    num_params = sum(len(batch.params) for batch in batches)
    partials = torch.empty(2, num_chunks, device=device)
    corrections = torch.empty(num_params, 2, device=device)
    result = torch.empty(3, device=device)
    skipped = torch.empty((), dtype=torch.uint8, device=device)
    flag = None
    if skip is not None:
        flag = (skip if skip.dtype == torch.bool else skip != 0).to(device).view(torch.uint8)
    extra = None
    if extra_penalties:
        given = [penalty.to(device, torch.float32) for penalty in extra_penalties]
        extra = given[0] if len(given) == 1 else torch.stack(given).sum()
    weights = [
        launcher.place(number, "anchor_weight", batch.anchor_weight, device)
        for number, batch in enumerate(batches)
    ]
    steps = step_table(batches)
    moves = skipped if skip is not None or skip_non_finite else None
    with device_of(first):
        if stream is not None:
            stream.begin()
        first_chunk = 0
        for batch, plan, table, weight in zip(batches, plans, tables, weights, strict=True):
            square = partial(
                _launch_square, batch, table, weight, partials, first_chunk, num_chunks
            )
            _launch_rows(batch, plan, stream, len(table), square)
            first_chunk += len(table)
        kernels.anchored_adamw_reduce_kernel[(1,)](
            partials,
            extra,
            flag,
            steps,
            corrections,
            result,
            skipped,
            0.0 if max_grad_norm is None else float(max_grad_norm),
            num_chunks,
            num_params,
            HAS_CLIP=max_grad_norm is not None,
            SKIP_NON_FINITE=skip_non_finite,
            BLOCK_SIZE=REDUCE_SIZE,
            num_warps=NUM_WARPS,
        )
        first_param = 0
        for number, (batch, plan, table) in enumerate(zip(batches, plans, tables, strict=True)):
            lr = launcher.place(number, "lr", batch.lr, device)
            read = (lr, weights[number], corrections, result, moves, steps)
            update = partial(_launch_update, batch, table, read, first_param)
            _launch_rows(batch, plan, stream, len(table), update)
            first_param += len(batch.params)
    return result[0], result[1], skipped.view(torch.bool)


def _plan_of(batch: Batch) -> Plan | None:
    """Return how the batch's anchors come to the device; None where they lie there."""
    if not batch.streams_anchors:
        return None
    sizes = tuple(map(Tensor.numel, batch.params))
    widths = tuple(0 if anchor is None else anchor.element_size() for anchor in batch.anchors)
    return make_plan(sizes, widths, CHUNK_SIZE, staging.BUFFER_BYTES)


def _launch_rows(
    batch: Batch,
    plan: Plan | None,
    stream: AnchorStream | None,
    num_rows: int,
    launch: Callable[[int, int], None],
) -> None:
    """Launch over all rows of the batch's table: at once, or as their anchors come."""
    if plan is not None and stream is not None:
        stream.run(plan, batch.anchors, launch)
    elif num_rows:
        launch(0, num_rows)


def _launch_square(
    batch: Batch,
    table: Tensor,
    weight: Tensor,
    partials: Tensor,
    first_chunk: int,
    num_chunks: int,
    first_row: int,
    num_rows: int,
) -> None:
    from fastppt_kernels.anchored_adamw import triton_kernel as kernels

    kernels.anchored_adamw_square_kernel[(num_rows,)](
        table,
        weight,
        partials,
        first_row,
        table.shape[1],
        first_chunk,
        num_chunks,
        PULL=PULLS[batch.form],
        BLOCK_SIZE=CHUNK_SIZE,
        num_warps=NUM_WARPS,
    )


def _launch_update(
    batch: Batch,
    table: Tensor,
    read: tuple[Tensor | None, ...],
    first_param: int,
    first_row: int,
    num_rows: int,
) -> None:
    from fastppt_kernels.anchored_adamw import triton_eight_bit_kernel, triton_update_kernel

    beta1, beta2 = batch.betas
    rounds = batch.rounding_seed is not None
    arguments = (
        table,
        *read,
        first_row,
        first_param,
        batch.rounding_seed if rounds else 0,
        float(beta2),
        1.0 - beta1,
        1.0 - beta2,
        float(batch.eps),
        float(batch.weight_decay),
    )
    options: dict[str, Any] = {
        "PULL": PULLS[batch.form],
        "HAS_COPIES": any(copy is not None for copy in batch.copies),
        "ROUND_AT_RANDOM": rounds,
        "BLOCK_SIZE": CHUNK_SIZE,
        "num_warps": NUM_WARPS,
    }
    if batch.has_codes:
        triton_eight_bit_kernel.anchored_adamw_eight_bit_kernel[(num_rows,)](
            *arguments, make_map_table(table.device), **options
        )
    else:
        triton_update_kernel.anchored_adamw_update_kernel[(num_rows,)](*arguments, **options)


def _align_gradients(number: int, batch: Batch, launcher: Launcher) -> Batch:
    """Return the batch with gradients that are walked as their parameters are, copied if need be.

    The caller keeps it until the launches: a table holds addresses alone.
    """
    if _walk_alike(batch.grads, batch.params):
        return batch
    grads = [
        launcher.align(number, index, grad, param)
        for index, (param, grad) in enumerate(zip(batch.params, batch.grads, strict=True))
    ]
    return replace(batch, grads=grads)
