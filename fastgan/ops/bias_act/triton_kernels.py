"""Bias and activation in Triton. The formulas are in csrc/cpu/bias_act_piecewise.cpp and bias_act_smooth.cpp.

    _activate          y, and one bit per element if the derivatives need no more
    _backward          S (g + k) from the bits, or m f'(x + b) g for a smooth function
    _double_backward   by_dy, by_x

A derivative program handles a tile of channels and a range of the outer dimension. If channel sums are requested, the
channels are those of the bias, and a second launch adds the partial sums in a fixed order. Otherwise memory is treated
as rows of one tile each. Bytes: each operand is read once, and each result is written once.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.bias_act.layout import Layout, Options
from fastgan.ops.library import accumulation_dtype
from fastgan.ops.triton_language import DTYPES, addresses, device_of, rounded, typed

_BLOCK = 1024
_PROGRAMS = 2048  # of a sum over channels: enough that the warps in flight hide the latency of memory


@triton.jit
def _log1p(w):
    above = 1.0 + w  # the quotient below corrects its rounding error (Kahan)
    exact = tl.where(above == 1.0, 1.0, above - 1.0)
    return tl.where(above == 1.0, w, tl.log(above) * (w / exact))


@triton.jit
def _normal(u, HALF: tl.constexpr):
    """Return the distribution function of the normal distribution and exp(-u^2 / 2)."""
    e = tl.exp(-0.5 * u * u)
    if HALF:
        # A polynomial in t, with a relative error of 8.3e-6 for all u: 2 % of a unit of float16. erf takes 24
        # instructions, more than memory leaves time for in half precision.
        t = 1.0 / (1.0 + 0.3 * tl.abs(u))
        q = 0.21603089813806747 - 0.0770960366230271 * t
        q = 0.14419046091415216 + t * (q * t - 0.0169389225284019)
        below = e * t * (0.12007406133630777 + t * (0.11374361157976845 + t * q))
        p = tl.where(u < 0.0, below, 1.0 - below)
    else:
        p = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
    return p, e


@triton.jit
def _smooth(u, ACTIVATION: tl.constexpr, HALF: tl.constexpr):
    """Return the value, the first and the second derivative. The compiler removes those that are not used."""
    if ACTIVATION == "tanh_of_y":
        f = u
        first = 1.0 - u * u
        second = -2.0 * u
    elif ACTIVATION == "sigmoid_of_y":
        f = u
        first = u * (1.0 - u)
        second = 1.0 - 2.0 * u
    elif ACTIVATION == "tanh":
        e = tl.exp(-2.0 * tl.abs(u))
        r = 1.0 / (1.0 + e)
        magnitude = tl.where(
            tl.abs(u) < 0.02, tl.abs(u) * (1.0 - u * u * (1.0 / 3.0 - u * u * (2.0 / 15.0))), (1.0 - e) * r
        )
        f = tl.where(u < 0.0, -magnitude, magnitude)
        first = 4.0 * e * r * r
        second = -2.0 * f * first
    elif ACTIVATION == "gelu":
        p, e = _normal(u, HALF)
        density = 0.3989422804014327 * e
        f = u * p
        first = p + u * density
        second = density * (2.0 - u * u)
    else:
        w = u
        w1 = 1.0
        if ACTIVATION == "gelu_tanh":
            cubic = 0.044715 * u * u
            w = 1.5957691216057308 * u * (1.0 + cubic)
            w1 = 1.5957691216057308 * (1.0 + 3.0 * cubic)
        e = tl.exp(-tl.abs(w))
        r = 1.0 / (1.0 + e)
        s = tl.where(w < 0.0, e * r, r)
        slope = e * r * r
        if ACTIVATION == "softplus":  # u itself above 20
            f = tl.where(u > 20.0, u, tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(e))
            first = tl.where(u > 20.0, 1.0, s)
            second = tl.where(u > 20.0, 0.0, slope)
        elif ACTIVATION == "sigmoid":
            f = s
            first = slope
            second = slope * (1.0 - 2.0 * s)
        else:
            # silu and gelu_tanh: u sigmoid(w)
            f = u * s
            first = s + u * slope * w1
            second = slope * w1 * (2.0 + u * w1 * (1.0 - 2.0 * s))
            if ACTIVATION == "gelu_tanh":
                second += u * slope * (6.0 * 1.5957691216057308 * 0.044715) * u
    return f, first, second


@triton.jit
def _scale(f, GAIN: tl.constexpr, CLAMP: tl.constexpr):
    """Return the gain where gain * f is not clamped, and 0 elsewhere."""
    scale = tl.full(f.shape, GAIN, f.dtype)
    if CLAMP is not None:
        scale = tl.where(tl.abs(GAIN * f) <= tl.full(f.shape, CLAMP, f.dtype), scale, 0.0)
    return scale


@triton.jit
def _plus(u, values_ptr, at, inner, channels, valid):
    """Add the value of its channel to each element of u, if there are values."""
    if values_ptr is not None:
        u += tl.load(values_ptr + at // inner % channels, mask=valid, other=0.0)
    return u


@triton.jit
def _plus_in_rows(u, values_ptr, row, bit, inner, channels, size, EIGHT: tl.constexpr):
    """The same for rows of eight elements. EIGHT: they have "one" channel or "successive" ones, or "any"."""
    if values_ptr is not None:
        if EIGHT == "one":
            u += tl.load(values_ptr + row * 8 // inner % channels, mask=row * 8 < size, other=0.0)[:, None]
        elif EIGHT == "successive":
            c = (row * 8 % channels)[:, None] + bit
            u += tl.load(values_ptr + c, mask=(row * 8 < size)[:, None], other=0.0)
        else:
            at = row[:, None] * 8 + bit
            u = _plus(u, values_ptr, at, inner, channels, at < size)
    return u


@triton.jit
def _plus_in_tile(u, values_ptr, c, at, inner, channels, valid, BY_CHANNEL: tl.constexpr):
    """The same for a tile, whose first axis has the channels ``c`` if BY_CHANNEL: a division for each element less."""
    if BY_CHANNEL:
        if values_ptr is not None:
            u += tl.load(values_ptr + c, mask=c < channels, other=0.0)[:, None]
    else:
        u = _plus(u, values_ptr, at, inner, channels, valid)
    return u


@triton.jit
def _columns(outer_tiled, channels_tiled, INDEX: tl.constexpr, TILE_C: tl.constexpr):
    """Return the channels of this program, its range of the outer dimension, and the offset of the first column."""
    c = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    part = tl.program_id(1).to(tl.int64)
    begin = outer_tiled * part // tl.num_programs(1)
    end = outer_tiled * (part + 1) // tl.num_programs(1)
    return c, begin, end, begin.to(INDEX) * channels_tiled + c


@triton.jit
def _places(column, c, q0, channels_tiled, inner_tiled, size, TILE_Q: tl.constexpr):
    """Return the offsets of a tile's elements and the mask of valid ones."""
    q = q0 + tl.arange(0, TILE_Q)[None, :]
    at = column[:, None] * inner_tiled + q
    return at, (c < channels_tiled)[:, None] & (q < inner_tiled) & (at < size)


@triton.jit
def _keep_sums(sums_ptr, total, c, channels_tiled, INDEX: tl.constexpr):
    if sums_ptr is not None:
        to = sums_ptr + tl.program_id(1).to(INDEX) * channels_tiled + c
        tl.store(to, tl.sum(total, 1), mask=c < channels_tiled)


@triton.jit
def _activate(
    x_ptr,
    bias_ptr,
    y_ptr,
    signs_ptr,
    inside_ptr,
    size,
    channels,
    inner,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    INDEX: tl.constexpr,
    EIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    row = tl.program_id(0).to(INDEX) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)[None, :]
    at = row[:, None] * 8 + bit
    u = tl.load(typed(x_ptr, DTYPE) + at, mask=at < size, other=0.0).to(ACC)
    u = _plus_in_rows(u, bias_ptr, row, bit, inner, channels, size, EIGHT)
    if ACTIVATION == "linear":
        y = u * GAIN
    elif ACTIVATION == "relu":
        y = tl.where(u <= 0.0, 0.0, u * GAIN)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(u <= 0.0, u * (GAIN * SLOPE), u * GAIN)
    else:
        f, _first, _second = _smooth(u, ACTIVATION, DTYPE.primitive_bitwidth == 16)
        y = f * GAIN
    if signs_ptr is not None:
        signs = tl.sum(tl.where(u <= 0.0, 0, 1 << bit), 1)
        tl.store(signs_ptr + row, signs.to(tl.uint8), mask=row * 8 < size)
    if CLAMP is not None:
        limit = tl.full(y.shape, CLAMP, y.dtype)  # a bare constant would be compared in float32
        if inside_ptr is not None:
            inside = tl.sum(tl.where(tl.abs(y) <= limit, 1 << bit, 0), 1)
            tl.store(inside_ptr + row, inside.to(tl.uint8), mask=row * 8 < size)
        y = tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))
    tl.store(typed(y_ptr, DTYPE) + at, rounded(y, DTYPE), mask=at < size)


@triton.jit
def _bit(bits_ptr, at, valid):
    return (tl.load(bits_ptr + (at >> 3), mask=valid, other=0).to(tl.int32) >> (at & 7).to(tl.int32)) & 1


@triton.jit
def _backward(
    g_ptr,
    k_ptr,
    x_ptr,
    bias_ptr,
    signs_ptr,
    inside_ptr,
    out_ptr,
    sums_ptr,
    size,
    channels,
    inner,
    outer_tiled,
    channels_tiled,
    inner_tiled,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    INDEX: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_Q: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    c, begin, end, column = _columns(outer_tiled, channels_tiled, INDEX, TILE_C)
    total = tl.zeros([TILE_C, TILE_Q], ACC)
    for _ in range(begin, end):
        for q0 in range(0, inner_tiled, TILE_Q):
            at, valid = _places(column, c, q0, channels_tiled, inner_tiled, size, TILE_Q)
            out = tl.zeros([TILE_C, TILE_Q], ACC)
            if g_ptr is not None:
                out += tl.load(typed(g_ptr, DTYPE) + at, mask=valid, other=0.0).to(ACC)
            out = _plus_in_tile(out, k_ptr, c, at, inner, channels, valid, BY_CHANNEL)
            if x_ptr is not None:
                u = tl.load(typed(x_ptr, DTYPE) + at, mask=valid, other=0.0).to(ACC)
                u = _plus_in_tile(u, bias_ptr, c, at, inner, channels, valid, BY_CHANNEL)
                f, first, _second = _smooth(u, ACTIVATION, DTYPE.primitive_bitwidth == 16)
                out *= _scale(f, GAIN, CLAMP) * first
            elif signs_ptr is not None:
                below = 0.0 if ACTIVATION == "relu" else out * (GAIN * SLOPE)
                out = tl.where(_bit(signs_ptr, at, valid) != 0, out * GAIN, below)
            else:
                out *= GAIN
            if inside_ptr is not None:
                out = tl.where(_bit(inside_ptr, at, valid) != 0, out, 0.0)
            if out_ptr is not None:
                tl.store(typed(out_ptr, DTYPE) + at, rounded(out, DTYPE), mask=valid)
            total += tl.where(valid, out, 0.0)
        column += channels_tiled
    _keep_sums(sums_ptr, total, c, channels_tiled, INDEX)


@triton.jit
def _double_backward(
    h_ptr,
    k_ptr,
    dy_ptr,
    x_ptr,
    bias_ptr,
    by_dy_ptr,
    by_x_ptr,
    sums_ptr,
    size,
    channels,
    inner,
    outer_tiled,
    channels_tiled,
    inner_tiled,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    INDEX: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_Q: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    c, begin, end, column = _columns(outer_tiled, channels_tiled, INDEX, TILE_C)
    total = tl.zeros([TILE_C, TILE_Q], ACC)
    for _ in range(begin, end):
        for q0 in range(0, inner_tiled, TILE_Q):
            at, valid = _places(column, c, q0, channels_tiled, inner_tiled, size, TILE_Q)
            given = tl.zeros([TILE_C, TILE_Q], ACC)
            if h_ptr is not None:
                given += tl.load(typed(h_ptr, DTYPE) + at, mask=valid, other=0.0).to(ACC)
            given = _plus_in_tile(given, k_ptr, c, at, inner, channels, valid, BY_CHANNEL)
            u = tl.load(typed(x_ptr, DTYPE) + at, mask=valid, other=0.0).to(ACC)
            u = _plus_in_tile(u, bias_ptr, c, at, inner, channels, valid, BY_CHANNEL)
            f, first, second = _smooth(u, ACTIVATION, DTYPE.primitive_bitwidth == 16)
            given *= _scale(f, GAIN, CLAMP)
            if by_dy_ptr is not None:
                tl.store(typed(by_dy_ptr, DTYPE) + at, rounded(first * given, DTYPE), mask=valid)
            by_x = second * given * tl.load(typed(dy_ptr, DTYPE) + at, mask=valid, other=0.0).to(ACC)
            if by_x_ptr is not None:
                tl.store(typed(by_x_ptr, DTYPE) + at, rounded(by_x, DTYPE), mask=valid)
            total += tl.where(valid, by_x, 0.0)
        column += channels_tiled
    _keep_sums(sums_ptr, total, c, channels_tiled, INDEX)


_BITS = {"signs_ptr": "*u8", "inside_ptr": "*u8"}
_SIZES = dict.fromkeys(("size", "channels", "inner"), "i32")
_TILED = _SIZES | dict.fromkeys(("outer_tiled", "channels_tiled", "inner_tiled"), "i32")
_LEAKY = {"ACTIVATION": "leaky_relu", "SLOPE": 0.2, "GAIN": 1.0, "CLAMP": None}
_CLAMPED = {"ACTIVATION": "relu", "SLOPE": 0.0, "GAIN": 1.5, "CLAMP": 256.0}
_GELU, _GELU_TANH, _TANH, _SOFTPLUS = (
    {"ACTIVATION": name, "SLOPE": 0.0, "GAIN": 1.0, "CLAMP": None} for name in ("gelu", "gelu_tanh", "tanh", "softplus")
)
_FLAT = {"INDEX": tl.int32, "BY_CHANNEL": False, "TILE_C": 1, "TILE_Q": _BLOCK}
_SUMMED = {"INDEX": tl.int64, "BY_CHANNEL": True, "TILE_C": 2, "TILE_Q": 512}


def _absent(*names: str) -> dict[str, None]:
    return {f"{name}_ptr": None for name in names}


# For ahead-of-time compilation: each launched kernel, its arguments ("*A" points to the accumulation dtype) and the
# combinations of its constants, without DTYPE, the dtype of the input.
AOT: list[tuple[Any, dict[str, str], list[dict[str, Any]]]] = [
    (
        _activate,
        addresses("x", "bias", "y") | _BITS | _SIZES,
        [
            _LEAKY | {"INDEX": tl.int32, "EIGHT": "any", "BLOCK": _BLOCK} | _absent("bias", "inside"),
            _CLAMPED | {"INDEX": tl.int64, "EIGHT": "any", "BLOCK": _BLOCK},
            *(
                form | {"INDEX": tl.int32, "EIGHT": eight, "BLOCK": _BLOCK} | _absent("signs", "inside")
                for form, eight in ((_GELU, "one"), (_TANH, "successive"), (_SOFTPLUS, "any"))
            ),
        ],
    ),
    (
        _backward,
        addresses("g", "k", "x", "bias", "out", "sums") | _BITS | _TILED,
        [
            _LEAKY | _FLAT | _absent("k", "x", "bias", "inside", "sums"),
            _CLAMPED | _SUMMED | _absent("x", "bias"),
            _GELU | _SUMMED | _absent("k", "signs", "inside"),
        ],
    ),
    (
        _double_backward,
        addresses("h", "k", "dy", "x", "bias", "by_dy", "by_x", "sums") | _TILED,
        [_SOFTPLUS | _FLAT | _absent("k", "bias", "sums"), _GELU_TANH | _SUMMED],
    ),
]


def piecewise_forward(
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    signs: Tensor | None,
    inside: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    sizes = layout.size, layout.channels, layout.inner
    eight = "any"
    if layout.inner % 8 == 0:
        eight = "one"
    elif layout.inner == 1 and layout.channels % 8 == 0:
        eight = "successive"
    constants = _constants(x.dtype, layout, options) | {"EIGHT": eight, "BLOCK": _BLOCK}
    with device_of(x):
        _activate[(triton.cdiv(layout.size, _BLOCK),)](x, bias, y, signs, inside, *sizes, **constants)


def piecewise_apply(
    g: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
    inside: Tensor | None,
    out: Tensor | None,
    sums: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    # If g and out are both None, the dtype does not matter.
    like = next(t for t in (g, out, sums) if t is not None)
    grid, parts, sizes, tile = _tiles(layout, sums, like.dtype)
    constants = _constants(like.dtype, layout, options)
    with device_of(like):
        _backward[grid](g, bias, None, None, signs, inside, out, parts, *sizes, **constants, **tile)
        _add_up(parts, sums)


def smooth_forward(x: Tensor, bias: Tensor | None, y: Tensor, layout: Layout, options: Options) -> None:
    piecewise_forward(x, bias, y, None, None, layout, options)


def smooth_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dx: Tensor | None,
    dbias: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    grid, parts, sizes, tile = _tiles(layout, dbias, x.dtype)
    constants = _constants(x.dtype, layout, options)
    with device_of(x):
        _backward[grid](dy, None, x, bias, None, None, dx, parts, *sizes, **constants, **tile)
        _add_up(parts, dbias)


def smooth_double_backward(
    h: Tensor | None,
    h_bias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    by_dy: Tensor | None,
    by_x: Tensor | None,
    by_bias: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    grid, parts, sizes, tile = _tiles(layout, by_bias, x.dtype)
    constants = _constants(x.dtype, layout, options)
    with device_of(x):
        _double_backward[grid](h, h_bias, dy, x, bias, by_dy, by_x, parts, *sizes, **constants, **tile)
        _add_up(parts, by_bias)


def _tiles(
    layout: Layout, sums: Tensor | None, dtype: torch.dtype
) -> tuple[tuple[int, int], Tensor | None, tuple[int, ...], dict[str, int]]:
    """Return the grid, the buffer of the partial sums (parts, channels), the sizes and the tile.

    They depend on the shape alone.
    """
    sizes = layout.size, layout.channels, layout.inner
    if sums is None:
        rows = triton.cdiv(layout.size, _BLOCK)
        return (rows, 1), None, (*sizes, 1, rows, _BLOCK), {"BY_CHANNEL": False, "TILE_C": 1, "TILE_Q": _BLOCK}
    tile_q = min(_BLOCK, triton.next_power_of_2(layout.inner))
    tile_c = max(1, _BLOCK // tile_q)
    tiles = triton.cdiv(layout.channels, tile_c)
    count = min(layout.outer, triton.cdiv(_PROGRAMS, tiles))
    parts = torch.empty(count, layout.channels, dtype=accumulation_dtype(dtype), device=sums.device)
    return (tiles, count), parts, (*sizes, *layout), {"BY_CHANNEL": True, "TILE_C": tile_c, "TILE_Q": tile_q}


def _add_up(parts: Tensor | None, sums: Tensor | None) -> None:
    if parts is not None and sums is not None:
        torch.sum(parts, 0, out=sums)


def _constants(dtype: torch.dtype, layout: Layout, options: Options) -> dict[str, Any]:
    return {
        "ACTIVATION": options.activation,
        "SLOPE": options.negative_slope,
        "GAIN": options.gain,
        "CLAMP": None if options.clamp == inf else options.clamp,
        "INDEX": tl.int32 if layout.size < 2**31 - 2 * _BLOCK else tl.int64,
        "DTYPE": DTYPES[dtype],
    }
