"""Triton kernels for norms with contiguous rows. The formulas are in csrc/cpu/norm.cpp.

    normalize_rows    y and the statistics
    grad_rows         dx
    grad_grad_rows    by_dy, by_x, and the means of H and H xh of each row, for affine_sums
    affine_sums       dweight and dbias, or by_weight; a program handles a tile of channels and a range of samples

One program handles a row (STAGE "whole"). If few rows are long, several programs share each: one launch writes the sums
of every part ("sums"), and after these are added, another writes the results ("results"). The statistics of shared rows
come from channel_moments and row_statistics.

Bytes: a row is read once for its sums (twice for its variance about its own mean) and once for the results, from L2 as
long as the rows in flight fit there. Weight and bias need one more read of the operands. There are no atomics, and
every sum is added in a fixed order, so results are reproducible to the bit.
"""

import triton
import triton.language as tl

from fastgan.ops.triton_language import rounded, typed


@triton.jit
def _part(size, STAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's range of a row, in whole blocks. Only the last range ends at ``size``."""
    begin = 0
    end = size
    if STAGE != "whole":
        each = tl.cdiv(tl.cdiv(size, BLOCK), tl.num_programs(1)) * BLOCK
        begin = tl.program_id(1) * each
        end = tl.minimum(begin + each, size)
    return begin, end


@triton.jit
def _keep(sums_ptr, which: tl.constexpr, row, value):
    """Store a sum of this program's part in (sums, rows, parts)."""
    tl.store(sums_ptr + (which * tl.num_programs(0).to(tl.int64) + row) * tl.num_programs(1) + tl.program_id(1), value)


@triton.jit
def _kept(sums_ptr, which: tl.constexpr, row):
    """Load a sum from (sums, rows)."""
    return tl.load(sums_ptr + which * tl.num_programs(0).to(tl.int64) + row)


@triton.jit
def normalize_rows(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    size,
    channels,
    inner,
    groups,
    EPS: tl.constexpr,
    STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_row = typed(x_ptr, DTYPE) + row * size
    y_row = typed(y_ptr, DTYPE) + row * size
    first = row % groups * channels
    begin, end = _part(size, STAGE, BLOCK)
    if STAGE == "results":
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
    else:
        total = tl.zeros([BLOCK], ACC)
        for m0 in range(begin, end, BLOCK):
            m = m0 + tl.arange(0, BLOCK)
            total += tl.load(x_row + m, mask=m < size, other=0.0).to(ACC)
        near = tl.sum(total, 0) / size
        rest = tl.zeros([BLOCK], ACC)
        squares = tl.zeros([BLOCK], ACC)
        for m0 in range(begin, end, BLOCK):
            m = m0 + tl.arange(0, BLOCK)
            apart = tl.where(m < size, tl.load(x_row + m, mask=m < size, other=0.0).to(ACC) - near, 0.0)
            rest += apart
            squares += apart * apart
        off = tl.sum(rest, 0) / size  # the rounding error of `near`
        mean = near + off
        rstd = 1.0 / tl.sqrt(tl.maximum(tl.sum(squares, 0) / size - off * off, 0.0) + EPS)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    for m0 in range(begin, end, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        y = (tl.load(x_row + m, mask=m < size, other=0.0).to(ACC) - mean) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + first + m // inner, mask=m < size, other=0.0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + first + m // inner, mask=m < size, other=0.0)
        tl.store(y_row + m, rounded(y, DTYPE), mask=m < size)


@triton.jit
def grad_rows(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    sums_ptr,
    size,
    channels,
    inner,
    groups,
    STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    dy_row = typed(dy_ptr, DTYPE) + row * size
    x_row = typed(x_ptr, DTYPE) + row * size
    first = row % groups * channels
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    begin, end = _part(size, STAGE, BLOCK)
    if STAGE == "results":
        g_total = _kept(sums_ptr, 0, row)
        gx_total = _kept(sums_ptr, 1, row)
    else:
        g_sum = tl.zeros([BLOCK], ACC)
        gx_sum = tl.zeros([BLOCK], ACC)
        for m0 in range(begin, end, BLOCK):
            m = m0 + tl.arange(0, BLOCK)
            xh = (tl.load(x_row + m, mask=m < size, other=0.0).to(ACC) - mean) * rstd
            g = tl.load(dy_row + m, mask=m < size, other=0.0).to(ACC)
            if weight_ptr is not None:
                g *= tl.load(weight_ptr + first + m // inner, mask=m < size, other=0.0)
            g_sum += g
            gx_sum += g * xh
        g_total = tl.sum(g_sum, 0)
        gx_total = tl.sum(gx_sum, 0)
    if STAGE == "sums":
        _keep(sums_ptr, 0, row, g_total)
        _keep(sums_ptr, 1, row, gx_total)
    else:
        g_mean = g_total / size
        gx_mean = gx_total / size
        for m0 in range(begin, end, BLOCK):
            m = m0 + tl.arange(0, BLOCK)
            xh = (tl.load(x_row + m, mask=m < size, other=0.0).to(ACC) - mean) * rstd
            g = tl.load(dy_row + m, mask=m < size, other=0.0).to(ACC)
            if weight_ptr is not None:
                g *= tl.load(weight_ptr + first + m // inner, mask=m < size, other=0.0)
            tl.store(
                typed(dx_ptr, DTYPE) + row * size + m, rounded(rstd * (g - g_mean - xh * gx_mean), DTYPE), mask=m < size
            )


@triton.jit
def grad_grad_rows(
    h_ptr,
    h_weight_ptr,
    h_bias_ptr,
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    by_dy_ptr,
    by_x_ptr,
    h_means_ptr,
    sums_ptr,
    size,
    channels,
    inner,
    groups,
    STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    dy_row = typed(dy_ptr, DTYPE) + row * size
    x_row = typed(x_ptr, DTYPE) + row * size
    first = row % groups * channels
    mean = tl.load(mean_ptr + row)
    r = tl.load(rstd_ptr + row)
    begin, end = _part(size, STAGE, BLOCK)
    if STAGE == "results":
        h_total = _kept(sums_ptr, 0, row)
        hx_total = _kept(sums_ptr, 1, row)
        g_total = _kept(sums_ptr, 2, row)
        gx_total = _kept(sums_ptr, 3, row)
        hg_total = _kept(sums_ptr, 4, row)
        k_total = _kept(sums_ptr, 5, row)
        kx_total = _kept(sums_ptr, 6, row)
    else:
        h_sum = tl.zeros([BLOCK], ACC)
        hx_sum = tl.zeros([BLOCK], ACC)
        g_sum = tl.zeros([BLOCK], ACC)
        gx_sum = tl.zeros([BLOCK], ACC)
        hg_sum = tl.zeros([BLOCK], ACC)
        k_sum = tl.zeros([BLOCK], ACC)
        kx_sum = tl.zeros([BLOCK], ACC)
        for m0 in range(begin, end, BLOCK):
            m = m0 + tl.arange(0, BLOCK)
            xh = (tl.load(x_row + m, mask=m < size, other=0.0).to(ACC) - mean) * r
            dy = tl.load(dy_row + m, mask=m < size, other=0.0).to(ACC)
            g = dy
            if weight_ptr is not None:
                g = dy * tl.load(weight_ptr + first + m // inner, mask=m < size, other=0.0)
            g_sum += g
            gx_sum += g * xh
            if h_ptr is not None:
                h = tl.load(typed(h_ptr, DTYPE) + row * size + m, mask=m < size, other=0.0).to(ACC)
                h_sum += h
                hx_sum += h * xh
                hg_sum += h * g
            if h_weight_ptr is not None:
                k = dy * tl.load(h_weight_ptr + first + m // inner, mask=m < size, other=0.0)
                k_sum += k
                kx_sum += k * xh
        h_total = tl.sum(h_sum, 0)
        hx_total = tl.sum(hx_sum, 0)
        g_total = tl.sum(g_sum, 0)
        gx_total = tl.sum(gx_sum, 0)
        hg_total = tl.sum(hg_sum, 0)
        k_total = tl.sum(k_sum, 0)
        kx_total = tl.sum(kx_sum, 0)
    if STAGE == "sums":
        _keep(sums_ptr, 0, row, h_total)
        _keep(sums_ptr, 1, row, hx_total)
        _keep(sums_ptr, 2, row, g_total)
        _keep(sums_ptr, 3, row, gx_total)
        _keep(sums_ptr, 4, row, hg_total)
        _keep(sums_ptr, 5, row, k_total)
        _keep(sums_ptr, 6, row, kx_total)
    else:
        h_mean = h_total / size
        hx_mean = hx_total / size
        g_mean = g_total / size
        gx_mean = gx_total / size
        c = hg_total / size - h_mean * g_mean - hx_mean * gx_mean
        e_mean = k_total / size - r * (h_mean * gx_mean + g_mean * hx_mean)
        ex_mean = kx_total / size - 2.0 * r * hx_mean * gx_mean
        if h_means_ptr is not None:  # noqa: SIM102 (a compile-time condition; the inner one is not)
            if begin == 0:
                tl.store(h_means_ptr + 2 * row, h_mean)
                tl.store(h_means_ptr + 2 * row + 1, hx_mean)
        for m0 in range(begin, end, BLOCK):
            m = m0 + tl.arange(0, BLOCK)
            xh = (tl.load(x_row + m, mask=m < size, other=0.0).to(ACC) - mean) * r
            dy = tl.load(dy_row + m, mask=m < size, other=0.0).to(ACC)
            g = dy
            by_dy = tl.zeros([BLOCK], ACC)
            e = tl.zeros([BLOCK], ACC)
            if h_ptr is not None:
                h = tl.load(typed(h_ptr, DTYPE) + row * size + m, mask=m < size, other=0.0).to(ACC)
                by_dy = r * (h - h_mean - xh * hx_mean)
                e = -r * h * gx_mean
            if weight_ptr is not None:
                w = tl.load(weight_ptr + first + m // inner, mask=m < size, other=0.0)
                g = dy * w
                by_dy *= w
            e -= r * g * hx_mean
            if h_weight_ptr is not None:
                hw = tl.load(h_weight_ptr + first + m // inner, mask=m < size, other=0.0)
                by_dy += hw * xh
                e += hw * dy
            if h_bias_ptr is not None:
                by_dy += tl.load(h_bias_ptr + first + m // inner, mask=m < size, other=0.0)
            if by_dy_ptr is not None:
                tl.store(typed(by_dy_ptr, DTYPE) + row * size + m, rounded(by_dy, DTYPE), mask=m < size)
            if by_x_ptr is not None:
                by_x = r * (e - e_mean - xh * ex_mean) - r * r * c * xh
                tl.store(typed(by_x_ptr, DTYPE) + row * size + m, rounded(by_x, DTYPE), mask=m < size)


@triton.jit
def _statistic(values_ptr, at, c, channels, ONE_ROW: tl.constexpr):
    return tl.load(values_ptr + at) if ONE_ROW else tl.load(values_ptr + at, mask=c < channels, other=0.0)[:, None]


@triton.jit
def affine_sums(
    dy_ptr,
    x_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    h_means_ptr,
    weight_sums_ptr,
    bias_sums_ptr,
    samples,
    channels,
    inner,
    of_row,
    SECOND: tl.constexpr,  # True: by_weight; False: dweight and dbias
    ONE_ROW: tl.constexpr,  # a sample is a row, so that its statistics are scalars
    TILE_C: tl.constexpr,
    TILE_Q: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sum over samples and positions for a tile of the ``channels`` of a sample. A row has ``of_row`` channels."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    part = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(1)
    c = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    begin = samples * part // parts
    end = samples * (part + 1) // parts
    rows = channels // of_row
    row = begin * rows
    if not ONE_ROW:
        row += c // of_row
    first = begin * channels * inner
    column = c.to(tl.int64)[:, None] * inner
    weight_sum = tl.zeros([TILE_C, TILE_Q], ACC)
    bias_sum = tl.zeros([TILE_C, TILE_Q], ACC)
    for _ in range(begin, end):
        mean = _statistic(mean_ptr, row, c, channels, ONE_ROW)
        rstd = _statistic(rstd_ptr, row, c, channels, ONE_ROW)
        if SECOND:
            h_mean = _statistic(h_means_ptr, 2 * row, c, channels, ONE_ROW)
            hx_mean = _statistic(h_means_ptr, 2 * row + 1, c, channels, ONE_ROW)
        for q0 in range(0, inner, TILE_Q):
            q = q0 + tl.arange(0, TILE_Q)[None, :]
            at = first + column + q
            inside = (c < channels)[:, None] & (q < inner)
            dy = tl.load(typed(dy_ptr, DTYPE) + at, mask=inside, other=0.0).to(ACC)
            xh = (tl.load(typed(x_ptr, DTYPE) + at, mask=inside, other=0.0).to(ACC) - mean) * rstd
            if SECOND:
                h = tl.load(typed(h_ptr, DTYPE) + at, mask=inside, other=0.0).to(ACC)
                weight_sum += dy * rstd * (h - h_mean - xh * hx_mean)
            else:
                weight_sum += dy * xh
                bias_sum += dy
        row += rows
        first += tl.cast(channels, tl.int64) * inner
    to = part * channels + c
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + to, tl.sum(weight_sum, 1), mask=c < channels)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + to, tl.sum(bias_sum, 1), mask=c < channels)
