"""Normalisation in Triton, a program a row; the formulas and their derivation are in csrc/cpu/norm.cpp.

    _normalise        y, mean, rstd
    _grad_rows        dx
    _grad_grad_rows   by_dy, by_x, and the means of H and H xh of each row, from which
    _affine_sums      dweight and dbias, or by_weight: a program has a tile of channels and a range of samples

Bytes: a row is read once for its sums (twice for its variance, about its own mean) and once for the results, from L2
while rows in flight fit there; what weight and bias want is one more read of the operands. No atomics, and every sum
is added in one order: the same bits every time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.backends import TRITON_INTERPRETS
from fastgan.ops.norm.layout import Layout

_INTERPRETED = tl.constexpr(TRITON_INTERPRETS)
_BLOCK = 1024
_PROGRAMS = 512  # of _affine_sums that are enough for any GPU


@triton.jit
def _of(pointer, DTYPE: tl.constexpr):
    # Ahead of time every address is declared with the accumulation dtype; in a launch this does nothing.
    return pointer.to(tl.pointer_type(DTYPE))


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        # Triton's interpreter truncates to bfloat16 where hardware rounds to the nearest.
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _normalise(
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
    x_row = _of(x_ptr, DTYPE) + row * size
    y_row = _of(y_ptr, DTYPE) + row * size
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
    off = tl.sum(rest, 0) / size  # what rounding took from `near`
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
        tl.store(y_row + m, _rounded(y, DTYPE), mask=m < size)


@triton.jit
def _grad_rows(
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
    dy_row = _of(dy_ptr, DTYPE) + row * size
    x_row = _of(x_ptr, DTYPE) + row * size
    dx_row = _of(dx_ptr, DTYPE) + row * size
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
        tl.store(dx_row + m, _rounded(rstd * (g - g_mean - xh * gx_mean), DTYPE), mask=m < size)


@triton.jit
def _grad_grad_rows(
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
    dy_row = _of(dy_ptr, DTYPE) + row * size
    x_row = _of(x_ptr, DTYPE) + row * size
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
            h = tl.load(_of(h_ptr, DTYPE) + row * size + m, mask=m < size, other=0.0).to(ACC)
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
            h = tl.load(_of(h_ptr, DTYPE) + row * size + m, mask=m < size, other=0.0).to(ACC)
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
            tl.store(_of(by_dy_ptr, DTYPE) + row * size + m, _rounded(by_dy, DTYPE), mask=m < size)
        if by_x_ptr is not None:
            by_x = r * (e - e_mean - xh * ex_mean) - r * r * c * xh
            tl.store(_of(by_x_ptr, DTYPE) + row * size + m, _rounded(by_x, DTYPE), mask=m < size)


@triton.jit
def _affine_sums(
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
    SECOND: tl.constexpr,  # by_weight, otherwise dweight and dbias
    TILE_C: tl.constexpr,
    TILE_Q: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sums over samples and positions for a tile of all ``channels`` of a sample, ``of_row`` of which are a row."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    c = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    begin = samples * part // parts
    end = samples * (part + 1) // parts
    rows = channels // of_row
    row = begin.to(tl.int64) * rows + c // of_row
    column = begin.to(tl.int64) * channels + c
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
            dy = tl.load(_of(dy_ptr, DTYPE) + at, mask=inside, other=0.0).to(ACC)
            xh = (tl.load(_of(x_ptr, DTYPE) + at, mask=inside, other=0.0).to(ACC) - mean) * rstd
            if SECOND:
                h = tl.load(_of(h_ptr, DTYPE) + at, mask=inside, other=0.0).to(ACC)
                weight_sum += dy * rstd * (h - h_mean - xh * hx_mean)
            else:
                weight_sum += dy * xh
                bias_sum += dy
        row += rows
        column += channels
    to = part.to(tl.int64) * channels + c
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + to, tl.sum(weight_sum, 1), mask=c < channels)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + to, tl.sum(bias_sum, 1), mask=c < channels)


_SIZES = dict.fromkeys(("size", "channels", "inner", "groups"), "i32")
_AFFINE_SIZES = dict.fromkeys(("samples", "channels", "inner", "of_row"), "i32")


def _addresses(*names: str) -> dict[str, str]:
    return {f"{name}_ptr": "*A" for name in names}


# What compiles ahead of time: each kernel that is launched, its arguments ("*A": to the accumulation dtype)
# and the values that its constants take together, without DTYPE, the input's dtype.
AOT: list[tuple[Any, dict[str, str], list[dict[str, Any]]]] = [
    (
        _normalise,
        _addresses("x", "weight", "bias", "y", "mean", "rstd") | _SIZES,
        [{"EPS": 1e-5, "BLOCK": _BLOCK}, {"EPS": 1e-5, "BLOCK": _BLOCK, "weight_ptr": None, "bias_ptr": None}],
    ),
    (
        _grad_rows,
        _addresses("dy", "x", "mean", "rstd", "weight", "dx") | _SIZES,
        [{"BLOCK": _BLOCK}, {"BLOCK": _BLOCK, "weight_ptr": None}],
    ),
    (
        _grad_grad_rows,
        _addresses("h", "h_weight", "h_bias", "dy", "x", "mean", "rstd", "weight", "by_dy", "by_x", "h_means") | _SIZES,
        [
            {"BLOCK": _BLOCK},
            {"BLOCK": _BLOCK, "h_weight_ptr": None, "h_bias_ptr": None},
            {"BLOCK": _BLOCK, "h_ptr": None, "weight_ptr": None, "h_means_ptr": None},
        ],
    ),
    (
        _affine_sums,
        _addresses("dy", "x", "h", "mean", "rstd", "h_means", "weight_sums", "bias_sums") | _AFFINE_SIZES,
        [
            {"SECOND": False, "TILE_C": 256, "TILE_Q": 1, "h_ptr": None, "h_means_ptr": None},
            {"SECOND": True, "TILE_C": 2, "TILE_Q": 512, "bias_sums_ptr": None},
        ],
    ),
]

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    layout: Layout,
    eps: float,
) -> None:
    with _on(x):
        _normalise[(layout.rows,)](x, weight, bias, y, mean, rstd, *_sizes(layout), EPS=eps, **_constants(x))


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    layout: Layout,
) -> None:
    with _on(x):
        if dx is not None:
            _grad_rows[(layout.rows,)](dy, x, mean, rstd, weight, dx, *_sizes(layout), **_constants(x))
        if dweight is not None or dbias is not None:
            _sum_over_samples(dy, x, None, mean, rstd, None, dweight, dbias, layout)


def double_backward(
    h: Tensor | None,
    h_weight: Tensor | None,
    h_bias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    by_dy: Tensor | None,
    by_x: Tensor | None,
    by_weight: Tensor | None,
    layout: Layout,
) -> None:
    h_means = None if by_weight is None else mean.new_empty(layout.rows, 2)
    operands = h, h_weight, h_bias, dy, x, mean, rstd, weight, by_dy, by_x, h_means
    with _on(x):
        _grad_grad_rows[(layout.rows,)](*operands, *_sizes(layout), **_constants(x))
        if by_weight is not None:
            _sum_over_samples(dy, x, h, mean, rstd, h_means, by_weight, None, layout)


def _sum_over_samples(
    dy: Tensor,
    x: Tensor,
    h: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    h_means: Tensor | None,
    weight_sums: Tensor | None,
    bias_sums: Tensor | None,
    layout: Layout,
) -> None:
    channels, samples = layout.channels * layout.groups, layout.rows // layout.groups
    tile_q = min(512, triton.next_power_of_2(layout.inner))
    tile_c = max(1, 256 // tile_q)
    tiles = triton.cdiv(channels, tile_c)
    parts = min(samples, triton.cdiv(_PROGRAMS, tiles))  # by the shape alone, for the same bits on any GPU
    sums = [None if s is None else mean.new_empty(parts, channels) for s in (weight_sums, bias_sums)]
    sizes = samples, channels, layout.inner, layout.channels
    constants = {"SECOND": h is not None, "TILE_C": tile_c, "TILE_Q": tile_q, "DTYPE": _TYPES[x.dtype]}
    _affine_sums[(tiles, parts)](dy, x, h, mean, rstd, h_means, *sums, *sizes, **constants)
    for partial, result in zip(sums, (weight_sums, bias_sums), strict=True):
        if partial is not None and result is not None:
            torch.sum(partial, 0, out=result.view(-1))


def _sizes(layout: Layout) -> tuple[int, int, int, int]:
    return layout.channels * layout.inner, layout.channels, layout.inner, layout.groups


def _constants(x: Tensor) -> dict[str, Any]:
    return {"BLOCK": _BLOCK, "DTYPE": _TYPES[x.dtype]}


def _on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
