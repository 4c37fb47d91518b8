"""The step in plain PyTorch: the fast path on the CPU, and for what the kernels do not take."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastppt_kernels.anchored_adamw import eight_bit
from fastppt_kernels.anchored_adamw.batch import Batch, wide_dtype
from fastppt_kernels.anchored_adamw.rounding import (
    COUNTER_CHUNK,
    make_key,
    random_bits,
    round_at_random,
)
from fastppt_kernels.chunks import cut_into_chunks

# Elements of a list that are worked on at a time. CPU: a parameter, its anchor, its gradient and
# their difference in a megabyte of cache, and sums short enough for float32 (one sum over 46 M
# elements is 0.2 % wrong). Elsewhere: few launches.
CPU_CHUNK = 1 << 16
DEVICE_CHUNK = 1 << 24
# Elements from which a sum of squares takes a call of its own, and no copy.
LONG = 1 << 13
# Elements of the widest vector of the fused CPU kernel, 64 bytes of float32. What is left of a
# tensor it computes one by one, and rounds otherwise.
VECTOR = 16


def plain_step_(
    batches: Sequence[Batch],
    max_grad_norm: float | None,
    extra_penalties: Sequence[Tensor],
    skip: Tensor | None,
    skip_non_finite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a step as :func:`anchored_adamw_` says, on any device and in any dtypes.

    Two passes over memory: anchor, penalty and norm in cache-sized chunks; then clip and AdamW in
    torch's fused kernel. A batch may lie on a device of its own.

    Memory traffic an element, float32: form "raw" 16 bytes, then 28 (32 with a clip); form
    "decoupled" 12, then 40 (44), as its pull waits for the norm.
    """
    device = batches[0].params[0].device
    penalties = [penalty.to(device) for penalty in extra_penalties]
    squares = []
    wide = [_widen(batch) for batch in batches]
    for batch in wide:
        penalty, square = _pull_and_square_(batch)
        squares.append(square.to(device))
        if penalty is not None:
            penalties.append(penalty.to(device))
    grad_norm = torch.stack(squares).sum().sqrt()
    divisor = None
    if max_grad_norm is not None:
        divisor = ((grad_norm + 1e-6) / max_grad_norm).clamp(min=1.0)
    skipped = None if skip is None else skip.to(device) != 0
    if skip_non_finite:
        bad = ~grad_norm.isfinite()
        skipped = bad if skipped is None else skipped | bad
    for batch, stored in zip(wide, batches, strict=True):
        _update_(batch, divisor, skipped)
        _write_back_(batch, stored)
    penalty = torch.stack(penalties).sum() if penalties else torch.zeros_like(grad_norm)
    if skipped is None:
        skipped = torch.zeros((), dtype=torch.bool, device=device)
    return penalty, grad_norm, skipped


def is_dense(tensor: Tensor) -> bool:
    """Say whether the elements fill their memory in an order that a fused kernel may walk."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _widen(batch: Batch) -> Batch:
    """Return the batch with dense parameters in float32 or float64, and gradients of their kind.

    What is so already is not copied.
    """
    params: list[Tensor] = []
    grads: list[Tensor] = []
    for param, grad, moment in zip(batch.params, batch.grads, batch.exp_avgs, strict=True):
        dtype = wide_dtype(param.dtype)
        kind = (dtype, moment.stride())
        for tensor, wide in ((param, params), (grad, grads)):
            same = (tensor.dtype, tensor.stride()) == kind
            wide.append(tensor if same else torch.empty_like(moment, dtype=dtype).copy_(tensor))
    return replace(batch, params=params, grads=grads)


def _pull_and_square_(batch: Batch) -> tuple[Tensor | None, Tensor]:
    """Return the penalty, if there is an anchor, and ||g||^2, after the pull of form "raw"."""
    device = batch.params[0].device
    weight = _beside(batch.anchor_weight, device)
    distances: list[Tensor] = []
    squares: list[Tensor] = []
    for grads, params, anchors in _cut(batch):
        if batch.form != "none":
            differences = _subtract(params, anchors)
            distances += _squares(differences)
            if batch.form == "raw":
                _add_scaled_(grads, differences, 2 * weight)
        squares += _squares(grads)
    penalty = weight * torch.stack(distances).sum() if distances else None
    return penalty, torch.stack(squares).sum()


def _decay_and_pull_(batch: Batch, skipped: Tensor | None) -> None:
    """Decay the parameters and pull them to the anchor, both of their values before the step."""
    device = batch.params[0].device
    weight = _beside(batch.anchor_weight, device)
    lr = _beside(batch.lr, device)
    if skipped is not None:
        lr = lr * (1 - skipped.to(device, torch.float32))
    for _, params, anchors in _cut(batch):
        pulls = torch._foreach_mul(_subtract(params, anchors), lr * weight)
        if skipped is not None:
            # Of a skipped step they are 0 or -0, and -0 - -0 would be 0.
            torch._foreach_add_(pulls, 0.0)
        torch._foreach_mul_(params, 1 - lr * batch.weight_decay)
        torch._foreach_sub_(params, pulls)


def _cut(batch: Batch) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Yield gradients, parameters and anchors of a cache's size; no anchors where they are zero."""
    size = CPU_CHUNK if batch.params[0].device.type == "cpu" else DEVICE_CHUNK
    for chosen in _alike(batch):
        members = [_pick(batch.grads, chosen), _pick(batch.params, chosen)]
        has_anchors = batch.form != "none" and batch.anchors[chosen[0]] is not None
        if has_anchors:
            members.append(_pick(batch.anchors, chosen))
        for chunk in cut_into_chunks(members, size, size):
            yield chunk[0], chunk[1], chunk[2] if has_anchors else []


def _subtract(params: list[Tensor], anchors: list[Tensor]) -> list[Tensor]:
    """Return theta - theta_0, in theta's dtype and on its device."""
    if not anchors:
        return params
    device, dtype = params[0].device, params[0].dtype
    beside = [
        a if a.dtype == dtype and a.device == device else a.to(device, dtype, non_blocking=True)
        for a in anchors
    ]
    return [*torch._foreach_sub(params, beside)]


def _update_(batch: Batch, divisor: Tensor | None, skipped: Tensor | None) -> None:
    """Make torch's AdamW step with the gradients over ``divisor``, and the decoupled pull."""
    if batch.form == "decoupled":
        _decay_and_pull_(batch, skipped)
    device = batch.params[0].device
    found_inf = None if skipped is None else skipped.to(device, torch.float32)
    lr = _beside(batch.lr, device)
    if found_inf is None:
        torch._foreach_add_(batch.steps, 1)
    else:
        # A list: the parser takes a lone 0-dim tensor for a number, and reads it.
        torch._foreach_add_(batch.steps, [1 - found_inf] * len(batch.steps))
    scale = None if divisor is None else divisor.to(device)
    if batch.has_codes:
        for index in range(len(batch.params)):
            _update_with_codes_(batch, index, lr, scale, found_inf)
        return
    for dtype in {p.dtype for p in batch.params}:
        chosen = [i for i, p in enumerate(batch.params) if p.dtype == dtype]
        lists = [
            _pick(tensors, chosen)
            for tensors in (batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs)
        ]
        _fused_adamw_(batch, lists, _pick(batch.steps, chosen), lr, scale, found_inf)


def _fused_adamw_(
    batch: Batch,
    lists: list[list[Tensor]],
    steps: list[Tensor],
    lr: float | Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Make torch's AdamW step, but for the step counts, with the gradients over ``scale``.

    Args:
        batch: Gives the options.
        lists: Params, grads, first and second moments, of one dtype.
        steps: The t, counted already.
        lr: Learning rate.
        scale: 0-dim, or None.
        found_inf: 0-dim, 1 where nothing is to move; or None.
    """
    beta1, beta2 = batch.betas
    is_wide = lists[0][0].dtype == torch.float64
    # The fused kernel's own scale is a float32.
    if scale is not None and is_wide:
        torch._foreach_div_(lists[1], scale)
    vectors, tails, padded = _split_tails(lists, steps)
    torch._fused_adamw_(
        vectors[0],
        vectors[1],
        vectors[2],
        vectors[3],
        [],
        vectors[4],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        # The decoupled pull has decayed already, from the values before the step.
        weight_decay=0.0 if batch.form == "decoupled" else batch.weight_decay,
        eps=batch.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if is_wide or scale is None else scale.float(),
        found_inf=found_inf,
    )
    if tails:
        torch._foreach_copy_(tails, padded)


def _update_with_codes_(
    batch: Batch, index: int, lr: float | Tensor, scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Make the step of a parameter whose moments are codes, a piece at a time.

    No more than a piece of a moment is ever there in float32.
    """
    assert batch.exp_avg_scales is not None and batch.exp_avg_sq_scales is not None
    device = batch.params[0].device
    size = CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
    maps = eight_bit.make_maps(device)
    codes = [batch.exp_avgs[index], batch.exp_avg_sqs[index]]
    scales = [batch.exp_avg_scales[index], batch.exp_avg_sq_scales[index]]
    # Pieces that begin where blocks do.
    flats = (_flatten(t).split(size) for t in (batch.params[index], *codes))
    grads = _flatten(batch.grads[index]).split(size)
    of_pieces = [each.split(size // eight_bit.BLOCK_SIZE) for each in scales]
    for param, *piece_codes, grad, first, second in zip(*flats, grads, *of_pieces, strict=True):
        moments = [
            eight_bit.dequantize(code, scale_of_code, each.values)
            for code, scale_of_code, each in zip(piece_codes, (first, second), maps, strict=True)
        ]
        lists = [[param], [grad], [moments[0]], [moments[1]]]
        _fused_adamw_(batch, lists, [batch.steps[index]], lr, scale, found_inf)
        for moment, code, scale_of_code, each in zip(
            moments, piece_codes, (first, second), maps, strict=True
        ):
            new_code, new_scale = eight_bit.quantize(moment, each.bounds)
            if found_inf is not None:
                # Codes of the value that a code stands for may be others.
                new_code = torch.where(found_inf != 0, code, new_code)
                new_scale = torch.where(found_inf != 0, scale_of_code, new_scale)
            code.copy_(new_code)
            scale_of_code.copy_(new_scale)


def _split_tails(
    lists: list[list[Tensor]], steps: list[Tensor]
) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    """Cut off what does not fill a vector, so that an element's bits do not depend on its place.

    Args:
        lists: Params, grads, first and second moments, alike in shapes and dtype.
        steps: One for each parameter.

    Returns:
        Five lists for the fused kernel: ``lists`` and ``steps``, flat where a tensor was cut, and
        rows of VECTOR elements that hold the tails; the tails, where the kernel's results are yet
        to be written; and the parts of the rows that these results are in.
    """
    odd = [i for i, p in enumerate(lists[0]) if p.numel() % VECTOR]
    if not odd or lists[0][0].device.type != "cpu":
        return [*lists, steps], [], []
    whole = [i for i, p in enumerate(lists[0]) if p.numel() % VECTOR == 0]
    cut = [lists[0][i].numel() // VECTOR * VECTOR for i in odd]
    vectors, tails, padded = [], [], []
    for position, tensors in enumerate(lists):
        flats = [_flatten(tensors[i]) for i in odd]
        ends = [flat[n:] for flat, n in zip(flats, cut, strict=True)]
        rows = [*tensors[0].new_zeros(len(odd), VECTOR).unbind()]
        parts = [row[: len(end)] for row, end in zip(rows, ends, strict=True)]
        torch._foreach_copy_(parts, ends)
        starts = [flat[:n] for flat, n in zip(flats, cut, strict=True)]
        vectors.append([*_pick(tensors, whole), *starts, *rows])
        if position != 1:
            tails += ends
            padded += parts
    odd_steps = _pick(steps, odd)
    vectors.append([*_pick(steps, whole), *odd_steps, *odd_steps])
    return vectors, tails, padded


def _write_back_(batch: Batch, stored: Batch) -> None:
    """Round the new values into the parameters that are not their own wide form, and the copies."""
    first_chunk = 0
    for param, value, step in zip(stored.params, batch.params, stored.steps, strict=True):
        if batch.rounding_seed is not None:
            _round_into_(param, value, make_key(batch.rounding_seed, step), first_chunk)
        elif param is not value:
            param.copy_(value)
        first_chunk += -(-param.numel() // COUNTER_CHUNK)
    copies = [(c, p) for c, p in zip(batch.copies, batch.params, strict=True) if c is not None]
    if copies:
        torch._foreach_copy_([c for c, _ in copies], [p for _, p in copies])


def _round_into_(param: Tensor, value: Tensor, key: Tensor, first_chunk: int) -> None:
    """Round float32 values into a parameter, up or down at random, in the order of its memory."""
    size = CPU_CHUNK if param.device.type == "cpu" else DEVICE_CHUNK
    start = first_chunk * COUNTER_CHUNK
    for target, piece in zip(_flatten(param).split(size), _flatten(value).split(size), strict=True):
        bits = random_bits(key, start, len(piece))
        target.copy_(round_at_random(piece, bits, param.dtype))
        start += len(piece)


def _flatten(tensor: Tensor) -> Tensor:
    """Return a dense tensor as the one stretch of memory that it is."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _alike(batch: Batch) -> list[list[int]]:
    """Return the indices in lists of one dtype each, with and without anchors apart."""
    lists: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index, (param, anchor) in enumerate(zip(batch.params, batch.anchors, strict=True)):
        lists.setdefault((param.dtype, anchor is None), []).append(index)
    return list(lists.values())


def _squares(tensors: list[Tensor]) -> list[Tensor]:
    """Return terms whose sum is the sum of all squares."""
    if sum(map(Tensor.numel, tensors)) >= LONG * len(tensors):
        flats = [tensor.flatten() for tensor in tensors]
    else:
        flats = [torch._C._nn.flatten_dense_tensors(tensors)]
    return [torch.dot(flat, flat) for flat in flats]


def _add_scaled_(sums: list[Tensor], terms: list[Tensor], factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        torch._foreach_add_(sums, torch._foreach_mul(terms, factor))
    else:
        torch._foreach_add_(sums, terms, alpha=factor)


def _pick(tensors: Sequence[Tensor | None], chosen: Sequence[int]) -> list[Tensor]:
    return [t for i in chosen if (t := tensors[i]) is not None]


def _beside(value: float | Tensor, device: torch.device) -> float | Tensor:
    return value.to(device) if isinstance(value, Tensor) else value
