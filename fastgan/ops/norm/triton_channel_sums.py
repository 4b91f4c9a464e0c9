"""Triton kernels that add up what the kernels in triton_channels.py have stored per channel.

row_statistics     the statistics of each row, from the moments
row_means          the means that the derivatives need per row, from the products; and the sums per channel for
                   weight and bias
"""

import triton
import triton.language as tl


@triton.jit
def row_statistics(
    moments_ptr,
    statistics_ptr,  # (mean, rstd and perhaps variance, rows)
    positions,
    parts,
    channels,
    groups,
    EPS: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = moments_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    of_row = channels // groups
    mean_ptr = moments_ptr + row // groups * parts * channels + row % groups * of_row
    squares_ptr = mean_ptr + (rows // groups).to(tl.int64) * parts * channels
    count_ptr = squares_ptr + (rows // groups).to(tl.int64) * parts * channels
    size = tl.cast(positions, ACC) * of_row
    total = tl.zeros([BLOCK], ACC)
    for m0 in range(0, parts * of_row, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        at = (m // of_row).to(tl.int64) * channels + m % of_row
        inside = m < parts * of_row
        count = tl.load(count_ptr + at, mask=inside, other=0.0)
        total += count * tl.load(mean_ptr + at, mask=inside, other=0.0)
    near = tl.sum(total, 0) / size  # approximate: a GPU divides by its inexact reciprocal
    rest = tl.zeros([BLOCK], ACC)
    squares = tl.zeros([BLOCK], ACC)
    for m0 in range(0, parts * of_row, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        at = (m // of_row).to(tl.int64) * channels + m % of_row
        inside = m < parts * of_row
        count = tl.load(count_ptr + at, mask=inside, other=0.0)
        apart = tl.load(mean_ptr + at, mask=inside, other=0.0) - near
        own = tl.load(squares_ptr + at, mask=inside, other=0.0)
        rest += tl.where(inside, count * apart, 0.0)
        squares += tl.where(inside, own + count * apart * apart, 0.0)
    off = tl.sum(rest, 0) / size
    both = tl.maximum(tl.sum(squares, 0) - off * off * size, 0.0)
    tl.store(statistics_ptr + row, near + off)
    tl.store(statistics_ptr + rows + row, 1.0 / tl.sqrt(both / size + EPS))
    if VARIANCE:
        tl.store(statistics_ptr + 2 * rows + row, both / (size - 1.0))


@triton.jit
def _over_parts(sums_ptr, c, of_row, parts, channels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for part0 in range(0, parts, BLOCK_P):
        part = part0 + tl.arange(0, BLOCK_P)
        inside = (c < of_row)[:, None] & (part < parts)[None, :]
        total += tl.load(sums_ptr + part.to(tl.int64)[None, :] * channels + c[:, None], mask=inside, other=0.0)
    return tl.sum(total, 1)


@triton.jit
def row_means(
    sums_ptr,
    statistics_ptr,
    weight_ptr,
    h_weight_ptr,
    means_ptr,  # (rows, 5): <g>, <g xh>; <H>, <H xh>, <g xh>, <e>, <e xh> + r c
    of_weight_ptr,  # (samples, channels): dweight or by_weight
    of_bias_ptr,
    positions,
    parts,
    channels,
    groups,
    SECOND: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    of_row = channels // groups
    first = row % groups * of_row
    of_sample = sums_ptr + row // groups * parts * channels + first
    step = (rows // groups).to(tl.int64) * parts * channels
    r = tl.load(statistics_ptr + rows + row)
    size = tl.cast(positions, ACC) * of_row
    g_sum = tl.zeros([BLOCK_C], ACC)
    gx_sum = tl.zeros([BLOCK_C], ACC)
    h_sum = tl.zeros([BLOCK_C], ACC)
    hx_sum = tl.zeros([BLOCK_C], ACC)
    hg_sum = tl.zeros([BLOCK_C], ACC)
    k_sum = tl.zeros([BLOCK_C], ACC)
    kx_sum = tl.zeros([BLOCK_C], ACC)
    for c0 in range(0, of_row, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        w = tl.full([BLOCK_C], 1.0, ACC)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + first + c, mask=c < of_row, other=0.0)
        dy = _over_parts(of_sample, c, of_row, parts, channels, BLOCK_C, BLOCK_P)
        dyx = r * _over_parts(of_sample + step, c, of_row, parts, channels, BLOCK_C, BLOCK_P)
        g_sum += w * dy
        gx_sum += w * dyx
        if SECOND:
            if H:
                h_sum += _over_parts(of_sample + 2 * step, c, of_row, parts, channels, BLOCK_C, BLOCK_P)
                hx_sum += r * _over_parts(of_sample + 3 * step, c, of_row, parts, channels, BLOCK_C, BLOCK_P)
                hg_sum += w * _over_parts(of_sample + 4 * step, c, of_row, parts, channels, BLOCK_C, BLOCK_P)
            if h_weight_ptr is not None:
                hw = tl.load(h_weight_ptr + first + c, mask=c < of_row, other=0.0)
                k_sum += hw * dy
                kx_sum += hw * dyx
        else:
            to = row // groups * channels + first + c
            if of_weight_ptr is not None:
                tl.store(of_weight_ptr + to, dyx, mask=c < of_row)
            if of_bias_ptr is not None:
                tl.store(of_bias_ptr + to, dy, mask=c < of_row)
    g = tl.sum(g_sum, 0) / size
    gx = tl.sum(gx_sum, 0) / size
    if not SECOND:
        tl.store(means_ptr + 5 * row, g)
        tl.store(means_ptr + 5 * row + 1, gx)
    else:
        h = tl.sum(h_sum, 0) / size
        hx = tl.sum(hx_sum, 0) / size
        both = tl.sum(hg_sum, 0) / size - h * g - hx * gx
        e = tl.sum(k_sum, 0) / size - r * (h * gx + g * hx)
        ex = tl.sum(kx_sum, 0) / size - 2.0 * r * hx * gx
        tl.store(means_ptr + 5 * row, h)
        tl.store(means_ptr + 5 * row + 1, hx)
        tl.store(means_ptr + 5 * row + 2, gx)
        tl.store(means_ptr + 5 * row + 3, e)
        tl.store(means_ptr + 5 * row + 4, ex + r * both)
        if of_weight_ptr is not None:
            for c0 in range(0, of_row, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)
                dy = _over_parts(of_sample, c, of_row, parts, channels, BLOCK_C, BLOCK_P)
                dyx = r * _over_parts(of_sample + step, c, of_row, parts, channels, BLOCK_C, BLOCK_P)
                hdy = _over_parts(of_sample + 4 * step, c, of_row, parts, channels, BLOCK_C, BLOCK_P)
                to = row // groups * channels + first + c
                tl.store(of_weight_ptr + to, r * (hdy - h * dy - hx * dyx), mask=c < of_row)
