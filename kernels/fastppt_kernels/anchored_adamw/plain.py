"""The step in plain PyTorch: the fast path on the CPU, and for what the kernels do not take."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastppt_kernels.anchored_adamw.batch import Batch
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


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a parameter of ``dtype`` is updated in, also that of its moments."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        kind = (moment.dtype, moment.stride())
        for tensor, wide in ((param, params), (grad, grads)):
            same = (tensor.dtype, tensor.stride()) == kind
            wide.append(tensor if same else torch.empty_like(moment).copy_(tensor))
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
    """Return theta - theta_0, in theta's dtype."""
    if not anchors:
        return params
    dtype = params[0].dtype
    return [*torch._foreach_sub(params, [a if a.dtype == dtype else a.to(dtype) for a in anchors])]


def _update_(batch: Batch, divisor: Tensor | None, skipped: Tensor | None) -> None:
    """Make torch's AdamW step with the gradients over ``divisor``, and the decoupled pull."""
    if batch.form == "decoupled":
        _decay_and_pull_(batch, skipped)
    beta1, beta2 = batch.betas
    device = batch.params[0].device
    found_inf = None if skipped is None else skipped.to(device, torch.float32)
    lr = _beside(batch.lr, device)
    if found_inf is None:
        torch._foreach_add_(batch.steps, 1)
    else:
        # A list: the parser takes a lone 0-dim tensor for a number, and reads it.
        torch._foreach_add_(batch.steps, [1 - found_inf] * len(batch.steps))
    scale = None if divisor is None else divisor.to(device)
    for dtype in {p.dtype for p in batch.params}:
        chosen = [i for i, p in enumerate(batch.params) if p.dtype == dtype]
        lists = [
            _pick(tensors, chosen)
            for tensors in (batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs)
        ]
        # The fused kernel's own scale is a float32.
        if scale is not None and dtype == torch.float64:
            torch._foreach_div_(lists[1], scale)
        vectors, tails, padded = _split_tails(lists, _pick(batch.steps, chosen))
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
            grad_scale=None if dtype == torch.float64 or scale is None else scale.float(),
            found_inf=found_inf,
        )
        if tails:
            torch._foreach_copy_(tails, padded)


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
        flats = [tensors[i].as_strided((tensors[i].numel(),), (1,)) for i in odd]
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
    for param, value in zip(stored.params, batch.params, strict=True):
        if param is not value:
            param.copy_(value)
    copies = [(c, p) for c, p in zip(batch.copies, batch.params, strict=True) if c is not None]
    if copies:
        torch._foreach_copy_([c for c, _ in copies], [p for _, p in copies])


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
