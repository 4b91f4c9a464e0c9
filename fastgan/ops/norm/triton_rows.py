"""Triton kernels for norms with contiguous rows, one program per row. The formulas are in csrc/cpu/norm.cpp.

    normalize_rows    y and the statistics
    grad_rows         dx
    grad_grad_rows    by_dy, by_x, and the means of H and H xh of each row, for affine_sums
    affine_sums       dweight and dbias, or by_weight; a program handles a tile of channels and a range of samples

Bytes: a row is read once for its sums (twice for its variance about its own mean) and once for the results, from L2 as
long as the rows in flight fit there. Weight and bias need one more read of the operands. There are no atomics, and
every sum is added in a fixed order, so results are reproducible to the bit.
"""

import triton
import triton.language as tl

from fastgan.ops.triton_language import rounded, typed


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
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_row = typed(x_ptr, DTYPE) + row * size
    y_row = typed(y_ptr, DTYPE) + row * size
    first = row % groups * channels
    total = tl.zeros([BLOCK], ACC)
    for m0 in range(0, size, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        total += tl.load(x_row + m, mask=m < size, other=0.0).to(ACC)
    near = tl.sum(total, 0) / size
    rest = tl.zeros([BLOCK], ACC)
    squares = tl.zeros([BLOCK], ACC)
    for m0 in range(0, size, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        apart = tl.where(m < size, tl.load(x_row + m, mask=m < size, other=0.0).to(ACC) - near, 0.0)
        rest += apart
        squares += apart * apart
    off = tl.sum(rest, 0) / size  # the rounding error of `near`
    mean = near + off
    rstd = 1.0 / tl.sqrt(tl.maximum(tl.sum(squares, 0) / size - off * off, 0.0) + EPS)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for m0 in range(0, size, BLOCK):
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
    size,
    channels,
    inner,
    groups,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    dy_row = typed(dy_ptr, DTYPE) + row * size
    x_row = typed(x_ptr, DTYPE) + row * size
    dx_row = typed(dx_ptr, DTYPE) + row * size
    first = row % groups * channels
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    g_sum = tl.zeros([BLOCK], ACC)
    gx_sum = tl.zeros([BLOCK], ACC)
    for m0 in range(0, size, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        xh = (tl.load(x_row + m, mask=m < size, other=0.0).to(ACC) - mean) * rstd
        g = tl.load(dy_row + m, mask=m < size, other=0.0).to(ACC)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + first + m // inner, mask=m < size, other=0.0)
        g_sum += g
        gx_sum += g * xh
    g_mean = tl.sum(g_sum, 0) / size
    gx_mean = tl.sum(gx_sum, 0) / size
    for m0 in range(0, size, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        xh = (tl.load(x_row + m, mask=m < size, other=0.0).to(ACC) - mean) * rstd
        g = tl.load(dy_row + m, mask=m < size, other=0.0).to(ACC)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + first + m // inner, mask=m < size, other=0.0)
        tl.store(dx_row + m, rounded(rstd * (g - g_mean - xh * gx_mean), DTYPE), mask=m < size)


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
    size,
    channels,
    inner,
    groups,
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
    h_sum = tl.zeros([BLOCK], ACC)
    hx_sum = tl.zeros([BLOCK], ACC)
    g_sum = tl.zeros([BLOCK], ACC)
    gx_sum = tl.zeros([BLOCK], ACC)
    hg_sum = tl.zeros([BLOCK], ACC)
    k_sum = tl.zeros([BLOCK], ACC)
    kx_sum = tl.zeros([BLOCK], ACC)
    for m0 in range(0, size, BLOCK):
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
    h_mean = tl.sum(h_sum, 0) / size
    hx_mean = tl.sum(hx_sum, 0) / size
    g_mean = tl.sum(g_sum, 0) / size
    gx_mean = tl.sum(gx_sum, 0) / size
    c = tl.sum(hg_sum, 0) / size - h_mean * g_mean - hx_mean * gx_mean
    e_mean = tl.sum(k_sum, 0) / size - r * (h_mean * gx_mean + g_mean * hx_mean)
    ex_mean = tl.sum(kx_sum, 0) / size - 2.0 * r * hx_mean * gx_mean
    if h_means_ptr is not None:
        tl.store(h_means_ptr + 2 * row, h_mean)
        tl.store(h_means_ptr + 2 * row + 1, hx_mean)
    for m0 in range(0, size, BLOCK):
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
    row = begin * rows + c // of_row
    column = begin * channels + c
    weight_sum = tl.zeros([TILE_C, TILE_Q], ACC)
    bias_sum = tl.zeros([TILE_C, TILE_Q], ACC)
    for _ in range(begin, end):
        mean = tl.load(mean_ptr + row, mask=c < channels, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=c < channels, other=0.0)[:, None]
        if SECOND:
            h_mean = tl.load(h_means_ptr + 2 * row, mask=c < channels, other=0.0)[:, None]
            hx_mean = tl.load(h_means_ptr + 2 * row + 1, mask=c < channels, other=0.0)[:, None]
        for q0 in range(0, inner, TILE_Q):
            q = q0 + tl.arange(0, TILE_Q)[None, :]
            at = column[:, None] * inner + q
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
        column += channels
    to = part * channels + c
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + to, tl.sum(weight_sum, 1), mask=c < channels)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + to, tl.sum(bias_sum, 1), mask=c < channels)
