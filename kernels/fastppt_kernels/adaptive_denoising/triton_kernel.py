"""The kernels of the adaptive denoising loss.

Errors are squared in float32 and summed in float64: the indicator's exponent multiplies what is
left of a difference of two such means by 1000, and float64 costs nothing at these sizes.
"""

import triton
import triton.language as tl


@triton.jit
def _load_block(
    pointer,
    sample,
    stride,
    offsets,
    num_elements,
    ALIGNED: tl.constexpr,  # noqa: N803
):
    """Return the elements of a sample at ``offsets`` in float32, 0 past ``num_elements``.

    Args:
        pointer: float32, bfloat16 or float16 [B, elements], side by side within a sample.
        sample: Scalar.
        stride: Of a sample, in elements.
        offsets: int32 [n].
        num_elements: int32, elements of a sample.
        ALIGNED: ``stride`` and ``num_elements`` are multiples of 16: loads may be wide.
    """
    if ALIGNED:
        # The compiler sees the factor.
        stride = stride // 16 * 16
        num_elements = num_elements // 16 * 16
    start_ptr = pointer + sample.to(tl.int64) * stride
    return tl.load(start_ptr + offsets, mask=offsets < num_elements, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_elements", "stride_p", "stride_b", "stride_t"])
def denoising_partials_kernel(
    prediction_ptr,
    base_prediction_ptr,
    target_ptr,
    partial_ptr,
    num_elements,
    stride_p,
    stride_b,
    stride_t,
    ALIGNED: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Write the sums of squared errors of both predictions over a block of a sample.

    One program a block and a sample.

    Memory traffic: each element of the three tensors is read once; 16 bytes a block are written.
    FLOPs: 6 an element.

    Args:
        prediction_ptr: float32, bfloat16 or float16 [B, elements], side by side within a sample.
        base_prediction_ptr: Alike, its elements in the same order.
        target_ptr: Alike.
        partial_ptr: float64 [B, blocks, 2]: of the prediction, of the base's; written.
        num_elements: int32, elements of a sample.
        stride_p: int32, from a sample of the prediction to the next, in elements.
        stride_b: int32, of the base's prediction.
        stride_t: int32, of the target.
        ALIGNED: ``num_elements`` and the strides are multiples of 16.
        BLOCK_SIZE: Elements a program.
    """
    block = tl.program_id(0)
    sample = tl.program_id(1)
    offsets = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    prediction = _load_block(prediction_ptr, sample, stride_p, offsets, num_elements, ALIGNED)
    base = _load_block(base_prediction_ptr, sample, stride_b, offsets, num_elements, ALIGNED)
    target = _load_block(target_ptr, sample, stride_t, offsets, num_elements, ALIGNED)
    error = prediction - target
    base_error = base - target
    out_ptr = partial_ptr + (sample * tl.num_programs(0) + block) * 2
    tl.store(out_ptr, tl.sum((error * error).to(tl.float64)))
    tl.store(out_ptr + 1, tl.sum((base_error * base_error).to(tl.float64)))


@triton.jit
def _sample_losses(
    partial_ptr,
    sample,
    num_samples,
    num_blocks,
    num_elements,
    BLOCK_SAMPLES: tl.constexpr,  # noqa: N803
    BLOCK_BLOCKS: tl.constexpr,  # noqa: N803
):
    """Return the losses of both predictions of the samples, float64 [samples]; 0 of those past B.

    Args:
        partial_ptr: As of :func:`denoising_partials_kernel`.
        sample: int32 [BLOCK_SAMPLES].
        num_samples: int32, B.
        num_blocks: int32, blocks a sample.
        num_elements: int32, elements of a sample.
        BLOCK_SAMPLES: Samples at a time.
        BLOCK_BLOCKS: Blocks at a time.
    """
    total = tl.zeros([BLOCK_SAMPLES], tl.float64)
    base_total = tl.zeros([BLOCK_SAMPLES], tl.float64)
    first = 0
    while first < num_blocks:
        block = first + tl.arange(0, BLOCK_BLOCKS)
        mask = (sample < num_samples)[:, None] & (block < num_blocks)[None, :]
        at = (sample[:, None] * num_blocks + block[None, :]) * 2
        total += tl.sum(tl.load(partial_ptr + at, mask=mask, other=0.0), 1)
        base_total += tl.sum(tl.load(partial_ptr + at + 1, mask=mask, other=0.0), 1)
        first += BLOCK_BLOCKS
    count = num_elements.to(tl.float64)
    return total / count, base_total / count


@triton.jit
def _observe_bins(
    partial_ptr,
    bin_ptr,
    ema_ptr,
    base_ema_ptr,
    wanted,
    wanted_mask,
    num_samples,
    num_blocks,
    num_elements,
    smoothing,
    BLOCK_SAMPLES: tl.constexpr,  # noqa: N803
    BLOCK_BLOCKS: tl.constexpr,  # noqa: N803
):
    """Return the new EMAs of both predictions in the bins asked for, float64 [bins].

    Args:
        partial_ptr: As of :func:`denoising_partials_kernel`.
        bin_ptr: int64 [B].
        ema_ptr: float32 [num_bins], of the tuned network; NaN where a bin was not seen yet.
        base_ema_ptr: float32 [num_bins].
        wanted: int64 [bins]: the bins asked for.
        wanted_mask: [bins]: where they exist; the EMA of others is 0.
        num_samples: int32, B.
        num_blocks: int32, blocks a sample.
        num_elements: int32, elements of a sample.
        smoothing: float32.
        BLOCK_SAMPLES: Samples at a time.
        BLOCK_BLOCKS: Blocks at a time.
    """
    count = tl.zeros(wanted.shape, tl.float64)
    total = tl.zeros(wanted.shape, tl.float64)
    base_total = tl.zeros(wanted.shape, tl.float64)
    first = 0
    while first < num_samples:
        sample = first + tl.arange(0, BLOCK_SAMPLES)
        loss, base_loss = _sample_losses(
            partial_ptr, sample, num_samples, num_blocks, num_elements, BLOCK_SAMPLES, BLOCK_BLOCKS
        )
        mask = sample < num_samples
        sample_bin = tl.load(bin_ptr + sample, mask=mask, other=0)
        inside = (wanted[:, None] == sample_bin[None, :]) & mask[None, :]
        count += tl.sum(inside.to(tl.float64), 1)
        total += tl.sum(tl.where(inside, loss[None, :], 0.0), 1)
        base_total += tl.sum(tl.where(inside, base_loss[None, :], 0.0), 1)
        first += BLOCK_SAMPLES
    old = tl.load(ema_ptr + wanted, mask=wanted_mask, other=0.0).to(tl.float64)
    base_old = tl.load(base_ema_ptr + wanted, mask=wanted_mask, other=0.0).to(tl.float64)
    # Without a sample the mean is not used, and needs no NaN to say so.
    divisor = tl.maximum(count, 1.0)
    new = _move(old, total / divisor, smoothing)
    base_new = _move(base_old, base_total / divisor, smoothing)
    return tl.where(count > 0, new, old), tl.where(count > 0, base_new, base_old)


@triton.jit
def _move(old, observed, smoothing):
    """Return (1 - smoothing) * old + smoothing * observed; where old is NaN, what was observed."""
    return tl.where(old == old, old + smoothing * (observed - old), observed)


@triton.jit(do_not_specialize=["num_samples", "num_bins", "num_blocks", "num_elements"])
def denoising_indicator_kernel(
    partial_ptr,
    bin_ptr,
    ema_ptr,
    base_ema_ptr,
    sample_weight_ptr,
    loss_ptr,
    gamma_ptr,
    coefficient_ptr,
    new_ema_ptr,
    new_base_ema_ptr,
    num_samples,
    num_bins,
    num_blocks,
    num_elements,
    temperature,
    smoothing,
    BLOCK_SAMPLES: tl.constexpr,  # noqa: N803
    BLOCK_BINS: tl.constexpr,  # noqa: N803
    BLOCK_BLOCKS: tl.constexpr,  # noqa: N803
):
    """Move the EMAs, and write gamma, the loss, and each sample's factor in the gradient.

    One program does it all. All in float64, rounded once. The gamma of a bin that does not exist
    is NaN, and so is the loss.

    Memory traffic: 16 bytes a block of a sample, and a few of each sample and bin.

    Args:
        partial_ptr: float64 [B, blocks, 2], of :func:`denoising_partials_kernel`.
        bin_ptr: int64 [B].
        ema_ptr: float32 [num_bins], of the tuned network; NaN where a bin was not seen yet.
        base_ema_ptr: float32 [num_bins], of the base.
        sample_weight_ptr: float32 [B], or None for ones.
        loss_ptr: float32 []; written.
        gamma_ptr: float32 [B]; written.
        coefficient_ptr: float32 [B], 2 / (B * elements) * sample_weight * (1 - gamma); written.
        new_ema_ptr: float32 [num_bins]; written.
        new_base_ema_ptr: float32 [num_bins]; written.
        num_samples: int32, B.
        num_bins: int32.
        num_blocks: int32, blocks a sample.
        num_elements: int32, elements of a sample.
        temperature: float32.
        smoothing: float32.
        BLOCK_SAMPLES: Samples at a time.
        BLOCK_BINS: Bins at a time.
        BLOCK_BLOCKS: Blocks at a time.
    """
    first_bin = 0
    while first_bin < num_bins:
        index = first_bin + tl.arange(0, BLOCK_BINS)
        mask = index < num_bins
        new, base_new = _observe_bins(
            partial_ptr,
            bin_ptr,
            ema_ptr,
            base_ema_ptr,
            index.to(tl.int64),
            mask,
            num_samples,
            num_blocks,
            num_elements,
            smoothing,
            BLOCK_SAMPLES,
            BLOCK_BLOCKS,
        )
        tl.store(new_ema_ptr + index, new.to(tl.float32), mask=mask)
        tl.store(new_base_ema_ptr + index, base_new.to(tl.float32), mask=mask)
        first_bin += BLOCK_BINS
    scale = 1.0 / num_samples.to(tl.float64)
    total = tl.zeros([BLOCK_SAMPLES], tl.float64)
    first = 0
    while first < num_samples:
        sample = first + tl.arange(0, BLOCK_SAMPLES)
        mask = sample < num_samples
        sample_bin = tl.load(bin_ptr + sample, mask=mask, other=0)
        exists = (sample_bin >= 0) & (sample_bin < num_bins)
        # The new EMA of the sample's own bin, from the samples again: what was stored above is
        # rounded, and other threads stored it.
        new, base_new = _observe_bins(
            partial_ptr,
            bin_ptr,
            ema_ptr,
            base_ema_ptr,
            sample_bin,
            mask & exists,
            num_samples,
            num_blocks,
            num_elements,
            smoothing,
            BLOCK_SAMPLES,
            BLOCK_BLOCKS,
        )
        kept = tl.exp(temperature * (new - base_new))
        # Not minimum(), which would drop a NaN.
        kept = tl.where(kept > 1.0, 1.0, kept)
        kept = tl.where(exists, kept, float("nan"))
        weight = kept
        if sample_weight_ptr is not None:
            weight *= tl.load(sample_weight_ptr + sample, mask=mask, other=0.0)
        loss, _ = _sample_losses(
            partial_ptr, sample, num_samples, num_blocks, num_elements, BLOCK_SAMPLES, BLOCK_BLOCKS
        )
        coefficient = 2.0 * scale / num_elements.to(tl.float64) * weight
        total += tl.where(mask, weight * loss, 0.0)
        tl.store(gamma_ptr + sample, (1.0 - kept).to(tl.float32), mask=mask)
        tl.store(coefficient_ptr + sample, coefficient.to(tl.float32), mask=mask)
        first += BLOCK_SAMPLES
    tl.store(loss_ptr, (scale * tl.sum(total)).to(tl.float32))


@triton.jit(do_not_specialize=["num_elements", "stride_p", "stride_t", "stride_g"])
def denoising_backward_kernel(
    prediction_ptr,
    target_ptr,
    coefficient_ptr,
    loss_grad_ptr,
    grad_ptr,
    num_elements,
    stride_p,
    stride_t,
    stride_g,
    ALIGNED: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
):
    """Write the gradient of the prediction: loss_grad * coefficient_b * (prediction - target).

    One program a block and a sample. Computed in float32, rounded once.

    Memory traffic: each element of prediction and target is read once, one of the gradient
    written. FLOPs: 2 an element.

    Args:
        prediction_ptr: float32, bfloat16 or float16 [B, elements], side by side within a sample.
        target_ptr: Alike, its elements in the same order.
        coefficient_ptr: float32 [B], of :func:`denoising_indicator_kernel`.
        loss_grad_ptr: float32 [].
        grad_ptr: Of the dtype of the prediction; written.
        num_elements: int32, elements of a sample.
        stride_p: int32, from a sample of the prediction to the next, in elements.
        stride_t: int32, of the target.
        stride_g: int32, of the gradient.
        ALIGNED: ``num_elements`` and the strides are multiples of 16.
        BLOCK_SIZE: Elements a program.
    """
    sample = tl.program_id(1)
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    prediction = _load_block(prediction_ptr, sample, stride_p, offsets, num_elements, ALIGNED)
    target = _load_block(target_ptr, sample, stride_t, offsets, num_elements, ALIGNED)
    factor = tl.load(loss_grad_ptr) * tl.load(coefficient_ptr + sample)
    grad = factor * (prediction - target)
    if ALIGNED:
        stride_g = stride_g // 16 * 16
        num_elements = num_elements // 16 * 16
    out_ptr = grad_ptr + sample.to(tl.int64) * stride_g + offsets
    tl.store(out_ptr, grad, mask=offsets < num_elements)
