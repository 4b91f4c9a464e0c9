"""Triton kernels for norms whose rows are not contiguous: batch norm, and any norm of channels_last input.

    channel_moments    mean and sum of squared deviations, for a tile of channels and a part of their positions
    normalize_channels    y
    channel_products   sums of dy, dy d, h, h d and h dy with d = x - mean, as in csrc/cpu/norm_channels.cpp
    grad_channels      dx
    grad_grad_channels    by_dy and by_x

Between them, triton_channel_sums.py adds up the moments and products of each row.

Element (n, c, s, q) is ``x[n * by_sample + c * by_channel + s * by_segment + q * by_position]``. A program walks
through tiles of TILE_C channels, TILE_S segments and TILE_Q positions. The offsets within a tile stay in registers, and
only scalars advance: a division for each element would cost more than all the rest.

Bytes: the forward reads x twice for its sums, the second time from L2, and once for y. The derivatives read their
operands once for the sums and once for the results; weight and bias need no further read. The parts depend on the shape
alone and are added in a fixed order, so results are reproducible to the bit.
"""

import triton
import triton.language as tl

from fastgan.ops.triton_language import rounded, typed


@triton.jit
def _channels(channels, groups, TILE_C: tl.constexpr):
    """Return the sample and the channels of this program, the row of each channel, and the number of rows."""
    tiles = tl.cdiv(channels, TILE_C)  # the tiles of all samples share the first axis; other axes of a grid are short
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles * TILE_C + tl.arange(0, TILE_C)
    rows = (tl.num_programs(0) // tiles).to(tl.int64) * groups
    return sample, c, sample * groups + c // (channels // groups), rows


@triton.jit
def _tile(c, by_channel, by_segment, by_position, TILE_S: tl.constexpr, TILE_Q: tl.constexpr):
    """Return the offsets of a tile's elements from its first, and the segment and position of its columns."""
    column = tl.arange(0, TILE_S * TILE_Q)
    s = column // TILE_Q
    q = column % TILE_Q
    at = s.to(tl.int64) * by_segment + q.to(tl.int64) * by_position
    return c.to(tl.int64)[:, None] * by_channel + at[None, :], s, q


@triton.jit
def _along(inner, TILE_Q: tl.constexpr, INDEX: tl.constexpr):
    return tl.cdiv(tl.cast(inner, INDEX), TILE_Q).to(tl.int32)


@triton.jit
def _part(segments, inner, TILE_S: tl.constexpr, TILE_Q: tl.constexpr, INDEX: tl.constexpr):
    """Return this program's range of tiles, and the segment and position where it starts. The launch leaves none out.

    Numbers of tiles have 32 bits: divisions in 64 bits would take longer than the elements of a small range.
    """
    along = _along(inner, TILE_Q, INDEX)
    tiles = tl.cdiv(segments, TILE_S) * along
    each = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, tiles)
    return begin, end, (begin // along).to(tl.int64) * TILE_S, (begin % along).to(INDEX) * TILE_Q


@triton.jit
def _inside(s, q, s0, q0, segments, inner, TILE_S: tl.constexpr):
    """Return which columns of a tile exist."""
    inside = q0 + q < inner
    if TILE_S > 1:
        inside = inside & (s < tl.minimum(segments - s0, TILE_S).to(tl.int32))
    return inside


@triton.jit
def _next(first, s0, q0, inner, by_segment, by_position, TILE_S: tl.constexpr, TILE_Q: tl.constexpr):
    """Return the offset of the next tile, its segment and its position."""
    ends = q0 + TILE_Q >= inner
    along = tl.cast(by_position, tl.int64) * TILE_Q
    first += tl.where(ends, tl.cast(by_segment, tl.int64) * TILE_S - q0 * tl.cast(by_position, tl.int64), along)
    s0 += tl.where(ends, TILE_S, 0)
    return first, s0, tl.multiple_of(tl.where(ends, 0, q0 + TILE_Q), TILE_Q)


@triton.jit
def _positions_before(tile, segments, inner, TILE_S: tl.constexpr, TILE_Q: tl.constexpr, INDEX: tl.constexpr):
    """Return the number of positions in the tiles before one."""
    along = _along(inner, TILE_Q, INDEX)
    s = (tile // along).to(tl.int64) * TILE_S
    of_tile = tl.minimum(TILE_S, tl.maximum(segments - s, 0))
    return tl.minimum(s, segments) * inner + of_tile * tl.minimum((tile % along).to(INDEX) * TILE_Q, inner)


@triton.jit
def _column(values_ptr, at, c, channels):
    """Load one value per channel as a column, which broadcasts over positions."""
    return tl.load(values_ptr + at, mask=c < channels, other=0.0)[:, None]


@triton.jit
def _parameter(values_ptr, c, channels, default, TILE_C: tl.constexpr, ACC: tl.constexpr):
    values = tl.full([TILE_C, 1], default, ACC)
    if values_ptr is not None:
        values = _column(values_ptr, c, c, channels)
    return values


@triton.jit
def channel_moments(
    x_ptr,
    moments_ptr,  # (mean, squares and count, samples, parts, channels)
    segments,
    channels,
    inner,
    by_sample,
    by_channel,
    by_segment,
    by_position,
    TILE_C: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_Q: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = moments_ptr.dtype.element_ty
    sample, c, _row, samples = _channels(channels, 1, TILE_C)
    x = typed(x_ptr, DTYPE)
    at, s, q = _tile(c, by_channel, by_segment, by_position, TILE_S, TILE_Q)
    begin, end, s0, q0 = _part(segments, inner, TILE_S, TILE_Q, INDEX)
    first = sample * by_sample + s0 * by_segment + q0.to(tl.int64) * by_position
    total = tl.zeros([TILE_C, TILE_S * TILE_Q], ACC)
    for _ in range(begin, end):
        inside = (c < channels)[:, None] & _inside(s, q, s0, q0, segments, inner, TILE_S)[None, :]
        total += tl.load(x + first + at, mask=inside, other=0.0).to(ACC)
        first, s0, q0 = _next(first, s0, q0, inner, by_segment, by_position, TILE_S, TILE_Q)
    before = _positions_before(begin, segments, inner, TILE_S, TILE_Q, INDEX)
    count = (_positions_before(end, segments, inner, TILE_S, TILE_Q, INDEX) - before).to(ACC)
    near = tl.sum(total, 1) / count
    begin, end, s0, q0 = _part(segments, inner, TILE_S, TILE_Q, INDEX)
    first = sample * by_sample + s0 * by_segment + q0.to(tl.int64) * by_position
    rest = tl.zeros([TILE_C, TILE_S * TILE_Q], ACC)
    squares = tl.zeros([TILE_C, TILE_S * TILE_Q], ACC)
    for _ in range(begin, end):
        inside = (c < channels)[:, None] & _inside(s, q, s0, q0, segments, inner, TILE_S)[None, :]
        apart = tl.where(inside, tl.load(x + first + at, mask=inside, other=0.0).to(ACC) - near[:, None], 0.0)
        rest += apart
        squares += apart * apart
        first, s0, q0 = _next(first, s0, q0, inner, by_segment, by_position, TILE_S, TILE_Q)
    off = tl.sum(rest, 1) / count  # the rounding error of `near`
    to = moments_ptr + (sample * tl.num_programs(1) + tl.program_id(1)) * channels + c
    tl.store(to, near + off, mask=c < channels)
    behind = samples * tl.num_programs(1) * channels
    tl.store(to + behind, tl.sum(squares, 1) - off * off * count, mask=c < channels)
    tl.store(to + 2 * behind, tl.zeros([TILE_C], ACC) + count, mask=c < channels)


@triton.jit
def normalize_channels(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    statistics_ptr,
    segments,
    channels,
    inner,
    groups,
    by_sample,
    by_channel,
    by_segment,
    by_position,
    TILE_C: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_Q: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    sample, c, row, rows = _channels(channels, groups, TILE_C)
    mean = _column(statistics_ptr, row, c, channels)
    scale = _column(statistics_ptr, rows + row, c, channels) * _parameter(weight_ptr, c, channels, 1.0, TILE_C, ACC)
    bias = _parameter(bias_ptr, c, channels, 0.0, TILE_C, ACC)
    at, s, q = _tile(c, by_channel, by_segment, by_position, TILE_S, TILE_Q)
    begin, end, s0, q0 = _part(segments, inner, TILE_S, TILE_Q, INDEX)
    first = sample * by_sample + s0 * by_segment + q0.to(tl.int64) * by_position
    for _ in range(begin, end):
        inside = (c < channels)[:, None] & _inside(s, q, s0, q0, segments, inner, TILE_S)[None, :]
        x = tl.load(typed(x_ptr, DTYPE) + first + at, mask=inside, other=0.0).to(ACC)
        y = (x - mean) * scale + bias
        tl.store(typed(y_ptr, DTYPE) + first + at, rounded(y, DTYPE), mask=inside)
        first, s0, q0 = _next(first, s0, q0, inner, by_segment, by_position, TILE_S, TILE_Q)


@triton.jit
def channel_products(
    h_ptr,
    dy_ptr,
    x_ptr,
    statistics_ptr,
    sums_ptr,  # (2 or 5, samples, parts, channels)
    segments,
    channels,
    inner,
    groups,
    by_sample,
    by_channel,
    by_segment,
    by_position,
    TILE_C: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_Q: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    sample, c, row, rows = _channels(channels, groups, TILE_C)
    mean = _column(statistics_ptr, row, c, channels)
    at, s, q = _tile(c, by_channel, by_segment, by_position, TILE_S, TILE_Q)
    begin, end, s0, q0 = _part(segments, inner, TILE_S, TILE_Q, INDEX)
    first = sample * by_sample + s0 * by_segment + q0.to(tl.int64) * by_position
    dy_sum = tl.zeros([TILE_C, TILE_S * TILE_Q], ACC)
    dyd_sum = tl.zeros([TILE_C, TILE_S * TILE_Q], ACC)
    h_sum = tl.zeros([TILE_C, TILE_S * TILE_Q], ACC)
    hd_sum = tl.zeros([TILE_C, TILE_S * TILE_Q], ACC)
    hdy_sum = tl.zeros([TILE_C, TILE_S * TILE_Q], ACC)
    for _ in range(begin, end):
        inside = (c < channels)[:, None] & _inside(s, q, s0, q0, segments, inner, TILE_S)[None, :]
        d = tl.load(typed(x_ptr, DTYPE) + first + at, mask=inside, other=0.0).to(ACC) - mean
        dy = tl.load(typed(dy_ptr, DTYPE) + first + at, mask=inside, other=0.0).to(ACC)
        dy_sum += dy
        dyd_sum += dy * d
        if h_ptr is not None:
            h = tl.load(typed(h_ptr, DTYPE) + first + at, mask=inside, other=0.0).to(ACC)
            h_sum += h
            hd_sum += h * d
            hdy_sum += h * dy
        first, s0, q0 = _next(first, s0, q0, inner, by_segment, by_position, TILE_S, TILE_Q)
    to = sums_ptr + (sample * tl.num_programs(1) + tl.program_id(1)) * channels + c
    step = rows // groups * tl.num_programs(1) * channels
    tl.store(to, tl.sum(dy_sum, 1), mask=c < channels)
    tl.store(to + step, tl.sum(dyd_sum, 1), mask=c < channels)
    if h_ptr is not None:
        tl.store(to + 2 * step, tl.sum(h_sum, 1), mask=c < channels)
        tl.store(to + 3 * step, tl.sum(hd_sum, 1), mask=c < channels)
        tl.store(to + 4 * step, tl.sum(hdy_sum, 1), mask=c < channels)


@triton.jit
def grad_channels(
    dy_ptr,
    x_ptr,
    statistics_ptr,
    weight_ptr,
    means_ptr,
    dx_ptr,
    segments,
    channels,
    inner,
    groups,
    by_sample,
    by_channel,
    by_segment,
    by_position,
    TILE_C: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_Q: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    sample, c, row, rows = _channels(channels, groups, TILE_C)
    mean = _column(statistics_ptr, row, c, channels)
    r = _column(statistics_ptr, rows + row, c, channels)
    g_mean = _column(means_ptr, 5 * row, c, channels)
    gx_mean = _column(means_ptr, 5 * row + 1, c, channels)
    w = _parameter(weight_ptr, c, channels, 1.0, TILE_C, ACC)
    at, s, q = _tile(c, by_channel, by_segment, by_position, TILE_S, TILE_Q)
    begin, end, s0, q0 = _part(segments, inner, TILE_S, TILE_Q, INDEX)
    first = sample * by_sample + s0 * by_segment + q0.to(tl.int64) * by_position
    for _ in range(begin, end):
        inside = (c < channels)[:, None] & _inside(s, q, s0, q0, segments, inner, TILE_S)[None, :]
        xh = (tl.load(typed(x_ptr, DTYPE) + first + at, mask=inside, other=0.0).to(ACC) - mean) * r
        dy = tl.load(typed(dy_ptr, DTYPE) + first + at, mask=inside, other=0.0).to(ACC)
        tl.store(typed(dx_ptr, DTYPE) + first + at, rounded(r * (w * dy - g_mean - xh * gx_mean), DTYPE), mask=inside)
        first, s0, q0 = _next(first, s0, q0, inner, by_segment, by_position, TILE_S, TILE_Q)


@triton.jit
def grad_grad_channels(
    h_ptr,
    h_weight_ptr,
    h_bias_ptr,
    dy_ptr,
    x_ptr,
    statistics_ptr,
    weight_ptr,
    means_ptr,
    by_dy_ptr,
    by_x_ptr,
    segments,
    channels,
    inner,
    groups,
    by_sample,
    by_channel,
    by_segment,
    by_position,
    TILE_C: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_Q: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    sample, c, row, rows = _channels(channels, groups, TILE_C)
    mean = _column(statistics_ptr, row, c, channels)
    r = _column(statistics_ptr, rows + row, c, channels)
    h_mean = _column(means_ptr, 5 * row, c, channels)
    hx_mean = _column(means_ptr, 5 * row + 1, c, channels)
    gx_mean = _column(means_ptr, 5 * row + 2, c, channels)
    e_mean = _column(means_ptr, 5 * row + 3, c, channels)
    of_xh = _column(means_ptr, 5 * row + 4, c, channels)
    w = _parameter(weight_ptr, c, channels, 1.0, TILE_C, ACC)
    hw = _parameter(h_weight_ptr, c, channels, 0.0, TILE_C, ACC)
    hb = _parameter(h_bias_ptr, c, channels, 0.0, TILE_C, ACC)
    at, s, q = _tile(c, by_channel, by_segment, by_position, TILE_S, TILE_Q)
    begin, end, s0, q0 = _part(segments, inner, TILE_S, TILE_Q, INDEX)
    first = sample * by_sample + s0 * by_segment + q0.to(tl.int64) * by_position
    for _ in range(begin, end):
        inside = (c < channels)[:, None] & _inside(s, q, s0, q0, segments, inner, TILE_S)[None, :]
        xh = (tl.load(typed(x_ptr, DTYPE) + first + at, mask=inside, other=0.0).to(ACC) - mean) * r
        dy = tl.load(typed(dy_ptr, DTYPE) + first + at, mask=inside, other=0.0).to(ACC)
        h = tl.zeros([TILE_C, TILE_S * TILE_Q], ACC)
        if h_ptr is not None:
            h = tl.load(typed(h_ptr, DTYPE) + first + at, mask=inside, other=0.0).to(ACC)
        if by_dy_ptr is not None:
            by_dy = w * r * (h - h_mean - xh * hx_mean) + hw * xh + hb
            tl.store(typed(by_dy_ptr, DTYPE) + first + at, rounded(by_dy, DTYPE), mask=inside)
        if by_x_ptr is not None:
            e = hw * dy - r * (h * gx_mean + w * dy * hx_mean)
            by_x = r * (e - e_mean - xh * of_xh)
            tl.store(typed(by_x_ptr, DTYPE) + first + at, rounded(by_x, DTYPE), mask=inside)
        first, s0, q0 = _next(first, s0, q0, inner, by_segment, by_position, TILE_S, TILE_Q)
