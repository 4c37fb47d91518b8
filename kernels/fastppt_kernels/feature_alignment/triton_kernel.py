"""The kernels of feature alignment.

Features are [B, C, N]: samples, channels, positions. A tile is [BLOCK_CHANNELS, BLOCK_POSITIONS].
Their memory has one of three layouts:
    "channels_first": the positions of a channel lie side by side (stride_w is 1);
    "channels_last": the channels of a position lie side by side (stride_c is 1);
    "strided": position n is at (n // width) * stride_h + (n % width) * stride_w.
Offsets are int64.
"""

import triton
import triton.language as tl

# Sizes and strides, which a kernel is not compiled anew for.
_GEOMETRY = ["num_channels", "num_positions", "width", "stride_b", "stride_c", "stride_h"]
_GEOMETRY += ["stride_w"]


@triton.jit
def _offsets(
    sample,
    channel,
    position,
    width,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    LAYOUT: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
):
    """Return the offsets of a tile, [channels, positions].

    Args:
        sample: Scalar.
        channel: int32 [channels].
        position: int32 [positions].
        width: int32, and the strides in elements: used as ``LAYOUT`` needs them.
        stride_b: Of a sample.
        stride_c: Of a channel.
        stride_h: Of ``width`` positions.
        stride_w: Of a position.
        LAYOUT: See above.
        ALIGNED: The strides other than 1 are multiples of 16: loads may be wide.
    """
    if ALIGNED:
        # The compiler sees the factor.
        stride_b = stride_b // 16 * 16
        stride_c = stride_c // 16 * 16
        stride_w = stride_w // 16 * 16
    start = sample.to(tl.int64) * stride_b
    if LAYOUT == "channels_last":
        channel_offset = channel.to(tl.int64)
        position_offset = position.to(tl.int64) * stride_w
    elif LAYOUT == "channels_first":
        channel_offset = channel.to(tl.int64) * stride_c
        position_offset = position.to(tl.int64)
    else:
        channel_offset = channel.to(tl.int64) * stride_c
        row = position // width
        column = position - row * width
        position_offset = row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    return start + channel_offset[:, None] + position_offset[None, :]


@triton.jit
def _tile_mask(
    channel,
    position,
    num_channels,
    num_positions,
    LAYOUT: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
):
    """Return the mask of a tile, [channels, positions]; arguments as of :func:`_offsets`."""
    if ALIGNED:
        if LAYOUT == "channels_last":
            num_channels = num_channels // 16 * 16
        else:
            num_positions = num_positions // 16 * 16
    return (channel < num_channels)[:, None] & (position < num_positions)[None, :]


@triton.jit
def _merge(count, mean, square, other_count, other_mean, other_square):
    """Return mean and sum of squared deviations of two sets together (Chan, Golub, LeVeque 1983).

    Args:
        count: float32 scalar: elements of the first set, may be 0.
        mean: float32 [rows].
        square: float32 [rows], the sum of squared deviations from ``mean``.
        other_count: The same three of the second set, which is not empty.
        other_mean: ...
        other_square: ...
    """
    share = other_count / (count + other_count)
    delta = other_mean - mean
    return mean + delta * share, square + other_square + delta * delta * count * share


@triton.jit(do_not_specialize=[*_GEOMETRY, "split_tiles"])
def feature_partials_kernel(
    feature_ptr,
    partial_ptr,
    num_channels,
    num_positions,
    split_tiles,
    width,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    LAYOUT: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
    BLOCK_POSITIONS: tl.constexpr,  # noqa: N803
):
    """Write mean and sum of squared deviations of each channel over a split of the positions.

    One program a block of channels, a split and a sample. The mean of a tile first, then the
    squares of what differs from it; tiles are merged in their order. All in float32.

    Memory traffic: each feature is read once; 8 bytes are written for a channel and split. FLOPs:
    4 a feature.

    Args:
        feature_ptr: float32, bfloat16 or float16 [B, C, N], as ``LAYOUT`` says.
        partial_ptr: float32 [B, splits, 2, C]: mean, sum of squared deviations; written.
        num_channels: int32, C.
        num_positions: int32, N.
        split_tiles: int32, tiles along the positions of a split; the last split may have fewer.
        width: int32; as the strides, see above.
        stride_b: int32.
        stride_c: int32.
        stride_h: int32.
        stride_w: int32.
        LAYOUT: See above.
        ALIGNED: All strides that are not 1, and the size along which the stride is 1, are
            multiples of 16.
        BLOCK_CHANNELS: Channels a tile.
        BLOCK_POSITIONS: Positions a tile.
    """
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    split = tl.program_id(1)
    sample = tl.program_id(2)
    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(num_positions, BLOCK_POSITIONS))
    mean = tl.zeros([BLOCK_CHANNELS], tl.float32)
    square = tl.zeros([BLOCK_CHANNELS], tl.float32)
    tile = first
    while tile < last:
        # A multiple of the block's size, as the compiler must see for wide loads.
        start = tile * BLOCK_POSITIONS
        position = start + tl.arange(0, BLOCK_POSITIONS)
        offsets = _offsets(
            sample,
            channel,
            position,
            width,
            stride_b,
            stride_c,
            stride_h,
            stride_w,
            LAYOUT,
            ALIGNED,
        )
        mask = _tile_mask(channel, position, num_channels, num_positions, LAYOUT, ALIGNED)
        value = tl.load(feature_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tile_count = tl.minimum(num_positions - start, BLOCK_POSITIONS).to(tl.float32)
        tile_mean = tl.sum(value, 1) / tile_count
        deviation = tl.where(mask, value - tile_mean[:, None], 0.0)
        tile_square = tl.sum(deviation * deviation, 1)
        count = ((tile - first) * BLOCK_POSITIONS).to(tl.float32)
        mean, square = _merge(count, mean, square, tile_count, tile_mean, tile_square)
        tile += 1
    row = sample.to(tl.int64) * tl.num_programs(1) + split
    out_ptr = partial_ptr + row * 2 * num_channels
    tl.store(out_ptr + channel, mean, mask=channel < num_channels)
    tl.store(out_ptr + num_channels + channel, square, mask=channel < num_channels)


@triton.jit(
    do_not_specialize=["num_rows", "num_channels", "num_positions", "split_length", "num_splits"]
)
def feature_merge_kernel(
    partial_ptr,
    base_mean_ptr,
    base_std_ptr,
    mean_ptr,
    std_ptr,
    mean_loss_ptr,
    std_loss_ptr,
    num_rows,
    num_channels,
    num_positions,
    split_length,
    num_splits,
    eps,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_SPLITS: tl.constexpr,  # noqa: N803
):
    """Merge the splits into mean and std, and write the losses against the base.

    A row is a channel of a sample. The splits are merged at once, by count, mean and sum of squares
    (Chan, Golub, LeVeque 1983); with a base one program does it all, so that the losses are summed
    in one order.

    Memory traffic: 8 bytes a row and split are read, 8 a row written, 8 more read with a base.

    Args:
        partial_ptr: float32 [B, splits, 2, C], of :func:`feature_partials_kernel`.
        base_mean_ptr: float32 [B, C], or None: no losses.
        base_std_ptr: float32 [B, C]; None as ``base_mean_ptr`` is.
        mean_ptr: float32 [B, C]; written.
        std_ptr: float32 [B, C]; written.
        mean_loss_ptr: float32 []; written. None as ``base_mean_ptr`` is.
        std_loss_ptr: float32 []; written. None as ``base_mean_ptr`` is.
        num_rows: int32, B * C.
        num_channels: int32, C.
        num_positions: int32, N.
        split_length: int32, positions of a split.
        num_splits: int32, at most BLOCK_SPLITS.
        eps: float32, added to the variance.
        BLOCK_ROWS: Rows at a time.
        BLOCK_SPLITS: Splits that there may be.
    """
    step = tl.num_programs(0) * BLOCK_ROWS
    start = tl.program_id(0) * BLOCK_ROWS
    split = tl.arange(0, BLOCK_SPLITS)
    begin = tl.minimum(split * split_length, num_positions)
    end = tl.minimum((split + 1) * split_length, num_positions)
    # Of the splits that are not there: 0.
    part_count = (end - begin).to(tl.float32)[:, None]
    count = num_positions.to(tl.float32)
    mean_squares = tl.zeros([BLOCK_ROWS], tl.float32)
    std_squares = tl.zeros([BLOCK_ROWS], tl.float32)
    while start < num_rows:
        row = start + tl.arange(0, BLOCK_ROWS)
        row_mask = row < num_rows
        sample = row // num_channels
        channel = row - sample * num_channels
        mask = (split < num_splits)[:, None] & row_mask[None, :]
        at = (sample.to(tl.int64) * num_splits)[None, :] + split[:, None]
        at = at * 2 * num_channels + channel[None, :]
        part_mean = tl.load(partial_ptr + at, mask=mask, other=0.0)
        part_square = tl.load(partial_ptr + num_channels + at, mask=mask, other=0.0)
        mean = tl.sum(part_count * part_mean, 0) / count
        delta = part_mean - mean[None, :]
        square = tl.sum(part_square + part_count * delta * delta, 0)
        std = tl.sqrt_rn(square / count + eps)
        tl.store(mean_ptr + row, mean, mask=row_mask)
        tl.store(std_ptr + row, std, mask=row_mask)
        if base_mean_ptr is not None:
            mean_delta = mean - tl.load(base_mean_ptr + row, mask=row_mask, other=0.0)
            std_delta = std - tl.load(base_std_ptr + row, mask=row_mask, other=0.0)
            mean_squares += tl.where(row_mask, mean_delta * mean_delta, 0.0)
            std_squares += tl.where(row_mask, std_delta * std_delta, 0.0)
        start += step
    if base_mean_ptr is not None:
        num_samples = (num_rows // num_channels).to(tl.float32)
        tl.store(mean_loss_ptr, tl.sum(mean_squares) / num_samples)
        tl.store(std_loss_ptr, tl.sum(std_squares) / num_samples)


@triton.jit(
    do_not_specialize=[
        *_GEOMETRY,
        *("stride_ib", "stride_ic", "stride_ih", "stride_iw"),
        *("stride_gb", "stride_gc", "stride_gh", "stride_gw"),
    ]
)
def feature_backward_kernel(
    feature_ptr,
    incoming_ptr,
    feature_grad_ptr,
    mean_ptr,
    std_ptr,
    base_mean_ptr,
    base_std_ptr,
    mean_grad_ptr,
    std_grad_ptr,
    num_channels,
    num_positions,
    width,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    LAYOUT: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
    BLOCK_POSITIONS: tl.constexpr,  # noqa: N803
):
    """Write the gradient of the features: g + (dmean + dstd * (x - mean) / std) / N.

    With a base, dmean = 2 / B * mean_loss_grad * (mean - base_mean), and dstd alike; without, they
    are given. One program a tile. Computed in float32, rounded once.

    Memory traffic: each feature, and g where there is one, is read once, and the gradient written
    once; the statistics of a channel, 24 bytes, come from the cache after the first. FLOPs: 3 a
    feature, 4 with g.

    Args:
        feature_ptr: float32, bfloat16 or float16 [B, C, N], as ``LAYOUT`` says.
        incoming_ptr: The g, of that dtype, shape and ``LAYOUT``; or None: zeros.
        feature_grad_ptr: Of that dtype, shape and ``LAYOUT``; written.
        mean_ptr: float32 [B, C].
        std_ptr: float32 [B, C].
        base_mean_ptr: float32 [B, C], or None.
        base_std_ptr: float32 [B, C]; None as ``base_mean_ptr`` is.
        mean_grad_ptr: float32 [] with a base: the gradient of mean_loss; [B, C] without.
        std_grad_ptr: float32, alike.
        num_channels: int32, C.
        num_positions: int32, N.
        width: int32; as the strides of the features, see above.
        stride_b: int32.
        stride_c: int32.
        stride_h: int32.
        stride_w: int32.
        stride_ib: int32; as the next three, a stride of g.
        stride_ic: int32.
        stride_ih: int32.
        stride_iw: int32.
        stride_gb: int32; as the next three, a stride of the gradient.
        stride_gc: int32.
        stride_gh: int32.
        stride_gw: int32.
        LAYOUT: Of all, see above.
        ALIGNED: Of all, as in :func:`feature_partials_kernel`.
        BLOCK_CHANNELS: Channels a tile.
        BLOCK_POSITIONS: Positions a tile.
    """
    position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    sample = tl.program_id(2)
    row = sample.to(tl.int64) * num_channels + channel
    row_mask = channel < num_channels
    mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
    std = tl.load(std_ptr + row, mask=row_mask, other=1.0)
    if base_mean_ptr is not None:
        factor = 2.0 / tl.num_programs(2).to(tl.float32)
        mean_delta = mean - tl.load(base_mean_ptr + row, mask=row_mask, other=0.0)
        std_delta = std - tl.load(base_std_ptr + row, mask=row_mask, other=0.0)
        mean_grad = factor * tl.load(mean_grad_ptr) * mean_delta
        std_grad = factor * tl.load(std_grad_ptr) * std_delta
    else:
        mean_grad = tl.load(mean_grad_ptr + row, mask=row_mask, other=0.0)
        std_grad = tl.load(std_grad_ptr + row, mask=row_mask, other=0.0)
    count = num_positions.to(tl.float32)
    shift = mean_grad / count
    scale = std_grad / (count * std)
    offsets = _offsets(
        sample, channel, position, width, stride_b, stride_c, stride_h, stride_w, LAYOUT, ALIGNED
    )
    mask = _tile_mask(channel, position, num_channels, num_positions, LAYOUT, ALIGNED)
    value = tl.load(feature_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = shift[:, None] + scale[:, None] * (value - mean[:, None])
    if incoming_ptr is not None:
        incoming_offsets = _offsets(
            sample,
            channel,
            position,
            width,
            stride_ib,
            stride_ic,
            stride_ih,
            stride_iw,
            LAYOUT,
            ALIGNED,
        )
        grad += tl.load(incoming_ptr + incoming_offsets, mask=mask, other=0.0).to(tl.float32)
    grad_offsets = _offsets(
        sample,
        channel,
        position,
        width,
        stride_gb,
        stride_gc,
        stride_gh,
        stride_gw,
        LAYOUT,
        ALIGNED,
    )
    tl.store(feature_grad_ptr + grad_offsets, grad, mask=mask)
