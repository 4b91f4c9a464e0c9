"""The first filter of filtered_lrelu in Triton, with the activation, or its slopes, at the end.

    _activated      z = act(U (x + bias)), and two bits per element if a derivative follows: above 0, and not clamped
    with READ       z = S (U x), with the slopes S from these bits

upfirdn2d does the second filter. One kernel for both would have to compute an upsampled element for each of the taps
that reads it: 36 times for 12 taps and a factor of 2. A thread makes ROWS UP_Y rows of some neighbors, as in upfirdn2d.
The bits of a column are ROWS UP_Y / 4 bytes. Bytes: one read of x, one write of z, two bits per element of z.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.library import accumulation_dtype
from fastgan.ops.triton_language import DTYPES, addresses, device_of, rounded, typed
from fastgan.ops.upfirdn2d.triton_rows import (
    BLOCK,
    TOGETHER,
    first_input,
    joined_row,
    lines_of_tile,
    load_taps,
    row_of_lines,
    rows_of_phase,
    taps_on_device,
    tiles_of,
)


@triton.jit
def _activate(u, SHIFT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr):
    """Return the activation, and its two bits, shifted."""
    above = u > 0.0
    z = u * tl.where(above, tl.full(u.shape, GAIN, u.dtype), tl.full(u.shape, SLOPE * GAIN, u.dtype))
    bits = tl.where(above, 1 << SHIFT, 0)
    if CLAMP is None:
        bits |= 2 << SHIFT
    else:
        limit = tl.full(u.shape, CLAMP, u.dtype)
        kept = tl.abs(z) <= limit
        bits |= tl.where(kept, 2 << SHIFT, 0)
        if u.dtype == tl.float64:  # in which Triton's clamp has no instruction
            z = tl.where(kept | (z != z), z, tl.where(z > 0.0, limit, -limit))
        else:
            z = tl.clamp(z, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return z, bits


@triton.jit
def _times_slope(u, bits, SLOPE: tl.constexpr, GAIN: tl.constexpr):
    z = u * tl.where((bits & 1) != 0, tl.full(u.shape, GAIN, u.dtype), tl.full(u.shape, SLOPE * GAIN, u.dtype))
    return tl.where((bits & 2) != 0, z, 0.0)


@triton.jit
def _byte(bits_plane, line, column, out_height, out_width, INDEX: tl.constexpr):
    """Load the bits of four rows."""
    inside = (line * 4 < out_height) & (column < out_width)
    return tl.load(bits_plane + (line.to(INDEX) * out_width + column), mask=inside, other=0).to(tl.int32)


@triton.jit
def _activated(
    x_ptr,
    bias_ptr,
    z_ptr,
    taps_ptr,
    bits_ptr,
    channels,
    height,
    width,
    out_height,
    out_width,
    start_y,
    start_x,
    UP_Y: tl.constexpr,
    UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    PHASE_Y: tl.constexpr,
    PHASE_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    SEPARABLE: tl.constexpr,
    UNROLLED: tl.constexpr,
    JOINED: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    READ: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    columns = tl.cdiv(out_width, ACROSS)
    along = tl.cdiv(columns, TILE_X)
    down = tl.cdiv(tl.cdiv(out_height, UP_Y), ROWS * TILE_Y)
    tile = tl.program_id(0) % (along * down)
    plane = (tl.program_id(0) // (along * down)).to(tl.int64)
    x_plane = typed(x_ptr, DTYPE) + plane * height * width
    z_plane = typed(z_ptr, DTYPE) + plane * out_height * out_width
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + plane % channels)
    column = tile % along * TILE_X + tl.arange(0, TILE_X)[None, :]
    group = tile // along * TILE_Y + tl.arange(0, TILE_Y)[:, None]  # of rows
    BYTES: tl.constexpr = ROWS * UP_Y // 4  # of bits in a column
    lines = ()
    taps = ()
    if UNROLLED:
        taps = load_taps(taps_ptr, 0, TAPS_Y)
        lines = lines_of_tile(
            x_plane,
            load_taps(taps_ptr, TAPS_Y, TAPS_X),
            group * (ROWS * DOWN_Y) - (start_y - PHASE_Y) // UP_Y,
            column * (ACROSS // UP_X * DOWN_X) - (start_x - PHASE_X) // UP_X,
            column < columns,
            0,
            1,
            height,
            width,
            bias,
            UP_Y,
            UP_X,
            DOWN_Y,
            DOWN_X,
            PHASE_Y,
            PHASE_X,
            TAPS_Y,
            TAPS_X,
            ROWS,
            ACROSS,
            INDEX,
        )
    for p in tl.static_range(1 if JOINED else UP_X):
        joined = tile % along * (TILE_X * ACROSS) + tl.arange(0, TILE_X * ACROSS)[None, :]
        ox = joined if JOINED else column * UP_X + p
        none = tl.zeros([TILE_Y, ox.shape[1]], tl.int32)
        first = none  # the bytes of this column
        second = none
        third = none
        fourth = none
        if READ:
            bits_plane = bits_ptr + plane * tl.cdiv(out_height, 4) * out_width
            first = _byte(bits_plane, group * BYTES, ox, out_height, out_width, INDEX)
            if BYTES > 1:
                second = _byte(bits_plane, group * BYTES + 1, ox, out_height, out_width, INDEX)
            if BYTES > 2:
                third = _byte(bits_plane, group * BYTES + 2, ox, out_height, out_width, INDEX)
            if BYTES > 3:
                fourth = _byte(bits_plane, group * BYTES + 3, ox, out_height, out_width, INDEX)
        kept = (first, second, third, fourth)
        for q in tl.static_range(UP_Y):
            rows = ()
            if JOINED:
                for row in tl.static_range(ROWS):
                    rows += (joined_row(lines, taps, row, q, ACROSS, UP_Y, DOWN_Y, PHASE_Y, TAPS_Y, ROWS),)
            elif UNROLLED:
                for row in tl.static_range(ROWS):
                    rows += (row_of_lines(lines, taps, row, q, p, UP_Y, DOWN_Y, PHASE_Y, TAPS_Y, ROWS),)
            else:
                rows = rows_of_phase(
                    x_plane,
                    taps_ptr,
                    group * (ROWS * DOWN_Y) + first_input(q * DOWN_Y - start_y, UP_Y),
                    column * DOWN_X + first_input(p * DOWN_X - start_x, UP_X),
                    column < columns,
                    0,
                    1,
                    height,
                    width,
                    bias,
                    (PHASE_Y + q * (UP_Y - 1) * DOWN_Y) % UP_Y,
                    (PHASE_X + p * (UP_X - 1) * DOWN_X) % UP_X,
                    UP_Y,
                    UP_X,
                    DOWN_Y,
                    TAPS_Y,
                    TAPS_X,
                    SEPARABLE,
                    INDEX,
                )
            for row in tl.static_range(ROWS):
                oy = (group * ROWS + row) * UP_Y + q
                inside = (oy < out_height) & (ox < out_width)
                if READ:
                    z = _times_slope(
                        rows[row], kept[(row * UP_Y + q) // 4] >> (2 * ((row * UP_Y + q) % 4)), SLOPE, GAIN
                    )
                else:
                    z, bits = _activate(rows[row], 2 * ((row * UP_Y + q) % 4), SLOPE, GAIN, CLAMP)
                    if (row * UP_Y + q) // 4 == 0:
                        first |= bits
                    elif (row * UP_Y + q) // 4 == 1:
                        second |= bits
                    elif (row * UP_Y + q) // 4 == 2:
                        third |= bits
                    else:
                        fourth |= bits
                tl.store(z_plane + (oy.to(INDEX) * out_width + ox), rounded(z, DTYPE), mask=inside)
        if not READ and bits_ptr is not None:
            packed = (first, second, third, fourth)
            for b in tl.static_range(BYTES):
                line = group * BYTES + b
                to = bits_ptr + plane * tl.cdiv(out_height, 4) * out_width + (line.to(INDEX) * out_width + ox)
                tl.store(to, packed[b].to(tl.uint8), mask=(line * 4 < out_height) & (ox < out_width))


def size_of_bits(planes: int, height: int, width: int) -> int:
    """The bytes for the bits of all planes: a byte has four elements of a column."""
    return planes * ((height + 3) // 4) * width


def activated(
    x: Tensor,
    bias: Tensor | None,
    z: Tensor,
    bits: Tensor | None,
    read: bool,
    sizes: Sequence[int],
    separable: bool,
    taps: Sequence[float],
    slope: float,
    gain: float,
    clamp: float,
) -> None:
    """x and z are contiguous. The sizes are those of upfirdn2d's kernel, with inner 1. The bias has the taps' dtype."""
    _, _, height, width, out_height, out_width, *_, start_y, start_x, _, _ = sizes
    options, programs = tiles_of(sizes, separable)
    options |= {
        "SLOPE": slope,
        "GAIN": gain,
        "CLAMP": None if clamp == inf else clamp,
        "READ": read,
        "DTYPE": DTYPES[x.dtype],
    }
    of_device = taps_on_device(tuple(taps), accumulation_dtype(x.dtype), x.device)
    shape = height, width, out_height, out_width, start_y, start_x
    with device_of(x):
        _activated[(programs,)](x, bias, z, of_device, bits, x.shape[1], *shape, **options)


_POINTERS = {
    **addresses("x", "bias", "z", "taps"),
    "bits_ptr": "*u8",
    **dict.fromkeys(("channels", "height", "width", "out_height", "out_width", "start_y", "start_x"), "i32"),
}
AOT = [
    (
        _activated,
        _POINTERS,
        [
            {
                "UP_Y": 2,
                "UP_X": 2,
                "DOWN_Y": 1,
                "DOWN_X": 1,
                "PHASE_Y": 0,
                "PHASE_X": 1,
                "TAPS_Y": 4,
                "TAPS_X": 4,
                "SEPARABLE": True,
                "UNROLLED": True,
                "JOINED": True,
                "ROWS": 8,
                "ACROSS": TOGETHER,
                "SLOPE": 0.2,
                "GAIN": 2**0.5,
                "CLAMP": 256.0,
                "READ": read,
                "TILE_Y": 4,
                "TILE_X": BLOCK // TOGETHER // 4,
                "INDEX": tl.int32,
            }
            for read in (False, True)
        ],
    )
]
