"""The step: which path it takes, and the launches of its kernels."""

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastppt_kernels.anchored_adamw.batch import Batch
from fastppt_kernels.anchored_adamw.plain import is_dense, plain_step_
from fastppt_kernels.launch import (
    KernelConfiguration,
    cached_table,
    chunk_table,
    device_of,
    have_codes,
    use_triton,
)

# Elements a program: 8 a thread, two wide loads from each tensor.
CHUNK_SIZE = 2048
NUM_WARPS = 8
# Partials that the one program of the reduction reads at a time.
REDUCE_SIZE = 1024
# How the kernels call the forms; triton_kernel.py reads it.
PULLS = {"none": 0, "raw": 1, "decoupled": 2}


class Launcher:
    """What an optimizer keeps on the device between steps, so that its addresses stay."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], tuple[float, Tensor]] = {}
        self._widened: dict[tuple[int, int], Tensor] = {}
        self._aligned: dict[tuple[int, int], Tensor] = {}

    def widen(self, number: int, index: int, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the gradient contiguous and in ``dtype``: itself, or a copy in a kept buffer.

        Args:
            number: Of the group; with ``index``, what the buffer is known by.
            index: Of the parameter in the group.
            grad: Not written.
            dtype: At least as wide as the gradient's.
        """
        if grad.dtype == dtype and grad.is_contiguous():
            return grad
        kept = self._widened.get((number, index))
        if kept is None or (kept.shape, kept.dtype, kept.device) != (
            grad.shape,
            dtype,
            grad.device,
        ):
            kept = torch.empty(grad.shape, dtype=dtype, device=grad.device)
            self._widened[number, index] = kept
        return kept.copy_(grad)

    def align(self, number: int, index: int, grad: Tensor, param: Tensor) -> Tensor:
        """Return the gradient walked as its parameter is: itself, or a copy in a kept buffer.

        Args:
            number: Of the batch; with ``index``, what the buffer is known by.
            index: Of the parameter in the batch.
            grad: Not written.
            param: Gives the strides.
        """
        if grad.stride() == param.stride():
            return grad
        kept = self._aligned.get((number, index))
        if kept is None or (kept.stride(), kept.dtype, kept.device) != (
            param.stride(),
            grad.dtype,
            param.device,
        ):
            kept = torch.empty_like(param, dtype=grad.dtype)
            self._aligned[number, index] = kept
        return kept.copy_(grad)

    def place(self, number: int, name: str, value: float | Tensor, device: torch.device) -> Tensor:
        """Return the option as a 0-dim float32 tensor on the device.

        Args:
            number: Of the batch; with ``name``, what the option is known by.
            name: Of the option.
            value: A float is written to the device only when it is another than at the last step.
                A float32 tensor there is returned itself.
            device: Where the kernels run.
        """
        if isinstance(value, Tensor):
            return value.detach().to(device, torch.float32)
        last, kept = self._kept.get((number, name), (None, None))
        if kept is None or kept.device != device:
            last, kept = None, torch.empty((), device=device)
        if last == value:
            return kept
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A graph's write happens at its replays: what is kept for steps outside stays apart.
            return torch.full((), value, device=device)
        self._kept[number, name] = (value, kept.fill_(value))
        return kept


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

    Rounding: in float32 (float64 for float64 parameters); each stored value is rounded once.
        Sums within a chunk in float32, over chunks in a fixed order.

    Memory traffic: an element of a float32 parameter with an anchor takes 12 bytes, then 32
        (4, then 28 without).
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
        have_codes([*b.params, *b.grads, *b.exp_avgs, *b.exp_avg_sqs, *b.copies])
        and (b.form == "none" or have_codes(b.anchors))
        and {m.dtype for m in (*b.exp_avgs, *b.exp_avg_sqs)} == {torch.float32}
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
    tables = [_table_of(batch) for batch in batches]
    num_chunks = sum(len(table) for table in tables)
    num_params = sum(len(batch.params) for batch in batches)
    partials = torch.empty(2, num_chunks, device=device)
    corrections = torch.empty(num_params, 2, device=device)
    result = torch.empty(3, device=device)
    skipped = torch.empty((), dtype=torch.uint8, device=device)
    may_skip = skip is not None or skip_non_finite
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
    options: dict[str, Any] = {"BLOCK_SIZE": CHUNK_SIZE, "num_warps": NUM_WARPS}
    with device_of(first):
        first_chunk = 0
        for batch, table, weight in zip(batches, tables, weights, strict=True):
            if len(table):
                kernels.anchored_adamw_square_kernel[(len(table),)](
                    table,
                    weight,
                    partials,
                    first_chunk,
                    num_chunks,
                    PULL=PULLS[batch.form],
                    **options,
                )
            first_chunk += len(table)
        kernels.anchored_adamw_reduce_kernel[(1,)](
            partials,
            extra,
            flag,
            _step_table(batches),
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
        for number, (batch, table) in enumerate(zip(batches, tables, strict=True)):
            beta1, beta2 = batch.betas
            if len(table):
                kernels.anchored_adamw_update_kernel[(len(table),)](
                    table,
                    launcher.place(number, "lr", batch.lr, device),
                    weights[number],
                    corrections,
                    result,
                    skipped if may_skip else None,
                    first_param,
                    float(beta2),
                    1.0 - beta1,
                    1.0 - beta2,
                    float(batch.eps),
                    float(batch.weight_decay),
                    PULL=PULLS[batch.form],
                    HAS_COPIES=any(copy is not None for copy in batch.copies),
                    **options,
                )
            first_param += len(batch.params)
    return result[0], result[1], skipped.view(torch.bool)


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


def _table_of(batch: Batch) -> Tensor:
    """Return the table of chunks of the batch, int64 [chunks, 9]."""
    holes: list[Tensor | None] = [None] * len(batch.params)
    anchors = batch.anchors if batch.form != "none" else holes
    moments = (batch.exp_avgs, batch.exp_avg_sqs)
    return chunk_table([batch.params, anchors, batch.grads, *moments, batch.copies], CHUNK_SIZE)


def _step_table(batches: Sequence[Batch]) -> Tensor:
    """Return the table of step counts, int64 [parameters, 3], as the reduction reads it."""
    steps = tuple(step.data_ptr() for batch in batches for step in batch.steps)
    betas = tuple(batch.betas for batch in batches for _ in batch.steps)

    def build() -> Tensor:
        bits = [[_log_bits(beta1), _log_bits(beta2)] for beta1, beta2 in betas]
        return torch.cat([torch.tensor(steps)[:, None], torch.tensor(bits)], dim=1)

    return cached_table(("steps", steps, betas), build, batches[0].params[0].device)


def _log_bits(beta: float) -> int:
    """Return the bits of log(beta) in float64, as an integer."""
    log = math.log(beta) if beta > 0 else -math.inf
    bits: int = struct.unpack("<q", struct.pack("<d", log))[0]
    return bits


def kernel_configurations() -> list[KernelConfiguration]:
    """Return every way in which the launches compile."""
    flags = (False, True)
    return [
        *(_square_configuration(pull) for pull in PULLS.values()),
        *(_reduce_configuration(*given) for given in product(flags, repeat=4)),
        *(_update_configuration(*given) for given in product(PULLS.values(), flags, flags)),
    ]


def _square_configuration(pull: int) -> KernelConfiguration:
    from fastppt_kernels.anchored_adamw.triton_kernel import anchored_adamw_square_kernel

    return KernelConfiguration(
        name="anchored_adamw_square",
        kernel=anchored_adamw_square_kernel,
        signature={
            "table_ptr": "*i64",
            "weight_ptr": "*fp32",
            "partial_ptr": "*fp32",
            "first_chunk": "i32",
            "num_chunks": "i32",
            "PULL": "constexpr",
            "BLOCK_SIZE": "constexpr",
        },
        constexprs={"PULL": pull, "BLOCK_SIZE": CHUNK_SIZE},
        num_warps=NUM_WARPS,
    )


def _reduce_configuration(
    has_extra: bool, has_skip: bool, has_clip: bool, skip_non_finite: bool
) -> KernelConfiguration:
    from fastppt_kernels.anchored_adamw.triton_kernel import anchored_adamw_reduce_kernel

    pointers: dict[str, Any] = {} if has_extra else {"extra_penalty_ptr": None}
    pointers |= {} if has_skip else {"skip_ptr": None}
    flags = {"HAS_CLIP": has_clip, "SKIP_NON_FINITE": skip_non_finite}
    return KernelConfiguration(
        name="anchored_adamw_reduce",
        kernel=anchored_adamw_reduce_kernel,
        signature={
            "partial_ptr": "*fp32",
            "extra_penalty_ptr": "*fp32" if has_extra else "constexpr",
            "skip_ptr": "*u8" if has_skip else "constexpr",
            "step_table_ptr": "*i64",
            "correction_ptr": "*fp32",
            "result_ptr": "*fp32",
            "skipped_ptr": "*u8",
            "max_grad_norm": "fp32",
            "num_chunks": "i32",
            "num_params": "i32",
            "HAS_CLIP": "constexpr",
            "SKIP_NON_FINITE": "constexpr",
            "BLOCK_SIZE": "constexpr",
        },
        constexprs=pointers | flags | {"BLOCK_SIZE": REDUCE_SIZE},
        num_warps=NUM_WARPS,
    )


def _update_configuration(pull: int, has_copies: bool, may_skip: bool) -> KernelConfiguration:
    from fastppt_kernels.anchored_adamw.triton_kernel import anchored_adamw_update_kernel

    pointers: dict[str, Any] = {} if may_skip else {"skipped_ptr": None}
    return KernelConfiguration(
        name="anchored_adamw_update",
        kernel=anchored_adamw_update_kernel,
        signature={
            "table_ptr": "*i64",
            "lr_ptr": "*fp32",
            "weight_ptr": "*fp32",
            "correction_ptr": "*fp32",
            "result_ptr": "*fp32",
            "skipped_ptr": "*u8" if may_skip else "constexpr",
            "first_param": "i32",
            "beta2": "fp32",
            "one_minus_beta1": "fp32",
            "one_minus_beta2": "fp32",
            "eps": "fp32",
            "weight_decay": "fp32",
            "PULL": "constexpr",
            "HAS_COPIES": "constexpr",
            "BLOCK_SIZE": "constexpr",
        },
        constexprs=pointers | {"PULL": pull, "HAS_COPIES": has_copies, "BLOCK_SIZE": CHUNK_SIZE},
        num_warps=NUM_WARPS,
    )
