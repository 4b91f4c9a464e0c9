"""upfirdn2d in Triton. The formula is in csrc/cpu/upfirdn2d.cpp.

Input i and output o meet in tap k = u i - d o + start, if the filter has it. Outputs u apart are of one phase: their
taps are the same, each u-th one, and their inputs are d apart. The compiler therefore knows the taps, and no zero is
multiplied. A thread makes four rows at a time. With separable taps, it reads each input that the phases of these rows
have in common once, sums the inputs of a line with the horizontal taps of each phase, and these sums with the vertical
taps of each row. With 4 x 4 taps, an output costs 7 loads and 11 products if u = d = 1, where one at a time costs 16
and 20; with 12 x 12 and u = 2, 4.4 loads and 13 products. Otherwise, a thread makes one phase after the other.

Bytes: one read of x, one write of y; what several threads need comes from the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.library import accumulation_dtype
from fastgan.ops.triton_language import DTYPES, addresses, device_of, rounded, typed
from fastgan.ops.upfirdn2d.triton_rows import (
    BLOCK,
    ROWS,
    first_input,
    lines_of_tile,
    load_taps,
    row_of_lines,
    rows_of_phase,
    taps_on_device,
    unrolls,
    warps_of,
)


@triton.jit
def _upfirdn2d(
    x_ptr,
    y_ptr,
    taps_ptr,
    inner,
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
    PHASE_Y: tl.constexpr,  # start_y % UP_Y
    PHASE_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    SEPARABLE: tl.constexpr,
    UNROLLED: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    columns = tl.cdiv(out_width, UP_X) * inner
    along = tl.cdiv(columns, TILE_X)
    down = tl.cdiv(tl.cdiv(out_height, UP_Y), ROWS * TILE_Y)
    tile = tl.program_id(0) % (along * down)
    plane = (tl.program_id(0) // (along * down)).to(tl.int64)
    x_plane = typed(x_ptr, DTYPE) + plane * height * width * inner
    y_plane = typed(y_ptr, DTYPE) + plane * out_height * out_width * inner
    e = tile % along * TILE_X + tl.arange(0, TILE_X)[None, :]
    column = e // inner
    c = e % inner
    group = tile // along * TILE_Y + tl.arange(0, TILE_Y)[:, None]  # of rows
    if UNROLLED:
        lines = lines_of_tile(
            x_plane,
            load_taps(taps_ptr, TAPS_Y, TAPS_X),
            group * (ROWS * DOWN_Y) - (start_y - PHASE_Y) // UP_Y,
            column * DOWN_X - (start_x - PHASE_X) // UP_X,
            e < columns,
            c,
            inner,
            height,
            width,
            UP_Y,
            UP_X,
            DOWN_Y,
            DOWN_X,
            PHASE_Y,
            PHASE_X,
            TAPS_Y,
            TAPS_X,
            INDEX,
        )
        taps = load_taps(taps_ptr, 0, TAPS_Y)
        for row in tl.static_range(ROWS):
            for q in tl.static_range(UP_Y):
                oy = (group * ROWS + row) * UP_Y + q
                for p in tl.static_range(UP_X):
                    ox = column * UP_X + p
                    at = (oy.to(INDEX) * out_width + ox) * inner + c
                    y = row_of_lines(lines, taps, row, q, p, UP_Y, DOWN_Y, PHASE_Y, TAPS_Y)
                    tl.store(y_plane + at, rounded(y, DTYPE), mask=(oy < out_height) & (ox < out_width))
    else:
        for q in tl.static_range(UP_Y):
            for p in tl.static_range(UP_X):
                y0 = group * (ROWS * DOWN_Y) + first_input(q * DOWN_Y - start_y, UP_Y)
                x0 = column * DOWN_X + first_input(p * DOWN_X - start_x, UP_X)
                rows = rows_of_phase(
                    x_plane,
                    taps_ptr,
                    y0,
                    x0,
                    e < columns,
                    c,
                    inner,
                    height,
                    width,
                    (PHASE_Y + q * (UP_Y - 1) * DOWN_Y) % UP_Y,  # the phase's first taps
                    (PHASE_X + p * (UP_X - 1) * DOWN_X) % UP_X,
                    UP_Y,
                    UP_X,
                    DOWN_Y,
                    TAPS_Y,
                    TAPS_X,
                    SEPARABLE,
                    INDEX,
                )
                ox = column * UP_X + p
                for row in tl.static_range(ROWS):
                    oy = (group * ROWS + row) * UP_Y + q
                    at = (oy.to(INDEX) * out_width + ox) * inner + c
                    tl.store(y_plane + at, rounded(rows[row], DTYPE), mask=(oy < out_height) & (ox < out_width))


def upfirdn2d(x: Tensor, y: Tensor, sizes: Sequence[int], separable: bool, taps: Sequence[float]) -> None:
    """x and y are contiguous, in the layout that ``sizes`` tell: see autograd.py."""
    planes, inner, height, width, out_height, out_width, *pairs = sizes
    up_y, up_x, down_y, down_x, start_y, start_x, taps_y, taps_x = pairs
    columns, rows = triton.cdiv(out_width, up_x) * inner, triton.cdiv(triton.cdiv(out_height, up_y), ROWS.value)
    tile_x = min(BLOCK, triton.next_power_of_2(columns))
    tile_y = min(BLOCK // tile_x, triton.next_power_of_2(rows))
    options: dict[str, Any] = {
        "UP_Y": up_y,
        "UP_X": up_x,
        "DOWN_Y": down_y,
        "DOWN_X": down_x,
        "PHASE_Y": start_y % up_y,
        "PHASE_X": start_x % up_x,
        "TAPS_Y": taps_y,
        "TAPS_X": taps_x,
        "SEPARABLE": separable,
        "UNROLLED": separable and unrolls((up_y, up_x), (down_y, down_x), (taps_y, taps_x), (start_y, start_x)),
        "TILE_Y": tile_y,
        "TILE_X": tile_x,
        "INDEX": tl.int32 if max(height * width, out_height * out_width) * inner < 2**30 else tl.int64,
        "DTYPE": DTYPES[x.dtype],
    }
    of_device = taps_on_device(tuple(taps), accumulation_dtype(x.dtype), x.device)
    shape = inner, height, width, out_height, out_width, start_y, start_x
    with device_of(x):
        grid = (planes * triton.cdiv(columns, tile_x) * triton.cdiv(rows, tile_y),)
        _upfirdn2d[grid](x, y, of_device, *shape, num_warps=warps_of(options), **options)


_POINTERS = addresses("x", "y", "taps") | dict.fromkeys(
    ("inner", "height", "width", "out_height", "out_width", "start_y", "start_x"), "i32"
)
AOT = [
    (
        _upfirdn2d,
        _POINTERS,
        [
            {
                "UP_Y": up,
                "UP_X": up,
                "DOWN_Y": down,
                "DOWN_X": down,
                "PHASE_Y": 0,
                "PHASE_X": up - 1,
                "TAPS_Y": 4,
                "TAPS_X": 4,
                "SEPARABLE": separable,
                "UNROLLED": unrolled,
                "TILE_Y": tile_y,
                "TILE_X": BLOCK // tile_y,
                "INDEX": index,
            }
            for up, down, separable, unrolled, tile_y, index in (
                (2, 1, True, True, 1, tl.int32),
                (1, 2, True, True, 4, tl.int32),
                (1, 2, True, False, 4, tl.int32),
                (2, 1, False, False, 1, tl.int64),
                (1, 2, False, False, 4, tl.int64),
            )
        ],
    )
]
