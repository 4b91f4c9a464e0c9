"""Triton kernels of a bias and activation. The formulas are in csrc/cpu/bias_act_piecewise.cpp and bias_act_smooth.cpp.

    _activate          y, and one bit per element if the derivatives need no more
    _backward          S (g + k) from the bits, or m f'(x + b) g for a smooth function
    _double_backward   by_dy, by_x

A derivative program handles a tile of channels and a range of the outer dimension. If channel sums are requested, the
channels are those of the bias, and a second launch adds the partial sums in a fixed order. Otherwise memory is treated
as rows of one tile each. Bytes: each operand is read once, and each result is written once.
"""

import triton
import triton.language as tl

from fastgan.ops.triton_language import rounded, typed


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
