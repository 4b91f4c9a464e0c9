"""upfirdn2d in Triton. The formula is in csrc/cpu/upfirdn2d.cpp.

Input i and output o meet in tap k = u i - d o + start, if the filter has it. Outputs u apart are of one phase: their
taps are the same, each u-th one, and their inputs are d apart. The compiler therefore knows the taps, and no zero is
multiplied. With separable taps, a thread makes four or eight rows of up to four neighbors, of all phases. It reads each
input that these have in common once, sums the inputs of a line with the horizontal taps of each neighbor, and these
sums with the vertical taps of each row, and stores neighbors together. With 4 x 4 taps and u = d = 1, an output costs
2.4 loads and 9.5 products, where one at a time costs 16 and 20; with 12 x 12 and u = 2, 1.8 loads and 11 products.
channels_last has its neighbors among the channels. Otherwise, a thread makes four rows of one phase after the other.

Bytes: one read of x, one write of y; what several threads need comes from the caches.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    JOINED: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    columns = tl.cdiv(out_width, ACROSS) * inner
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
            column * (ACROSS // UP_X * DOWN_X) - (start_x - PHASE_X) // UP_X,
            e < columns,
            c,
            inner,
            height,
            width,
            None,
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
        taps = load_taps(taps_ptr, 0, TAPS_Y)
        for row in tl.static_range(ROWS):
            for q in tl.static_range(UP_Y):
                oy = (group * ROWS + row) * UP_Y + q
                if JOINED:
                    ox = tile % along * (TILE_X * ACROSS) + tl.arange(0, TILE_X * ACROSS)[None, :]
                    y = joined_row(lines, taps, row, q, ACROSS, UP_Y, DOWN_Y, PHASE_Y, TAPS_Y, ROWS)
                    to = y_plane + (oy.to(INDEX) * out_width + ox)
                    tl.store(to, rounded(y, DTYPE), mask=(oy < out_height) & (ox < out_width))
                else:
                    for p in tl.static_range(UP_X):
                        ox = column * UP_X + p
                        at = (oy.to(INDEX) * out_width + ox) * inner + c
                        y = row_of_lines(lines, taps, row, q, p, UP_Y, DOWN_Y, PHASE_Y, TAPS_Y, ROWS)
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
                    None,
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
    _, inner, height, width, out_height, out_width, *_, start_y, start_x, _, _ = sizes
    options, programs = tiles_of(sizes, separable)
    of_device = taps_on_device(tuple(taps), accumulation_dtype(x.dtype), x.device)
    shape = inner, height, width, out_height, out_width, start_y, start_x
    with device_of(x):
        _upfirdn2d[(programs,)](x, y, of_device, *shape, DTYPE=DTYPES[x.dtype], **options)


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
                "JOINED": joined,
                "ROWS": rows,
                "ACROSS": across,
                "TILE_Y": tile_y,
                "TILE_X": BLOCK // tile_y // (TOGETHER if joined else 1),
                "INDEX": index,
            }
            for up, down, separable, unrolled, joined, rows, across, tile_y, index in (
                (2, 1, True, True, True, 4, 4, 1, tl.int32),
                (1, 2, True, True, True, 4, 2, 4, tl.int32),
                (2, 1, True, True, False, 4, 2, 1, tl.int32),
                (1, 2, True, False, False, 4, 1, 4, tl.int32),
                (2, 1, False, False, False, 4, 2, 1, tl.int64),
                (1, 2, False, False, False, 4, 1, 4, tl.int64),
            )
        ],
    )
]
