"""upfirdn2d in Triton. The formula is in csrc/cpu/upfirdn2d.cpp.

Input i and output o meet in tap k = u i - d o + start, if the filter has it. Outputs u apart are of one phase: their
taps are the same, each u-th one, and their inputs are d apart. The compiler therefore knows the taps, and no zero is
multiplied. A thread makes four rows of a phase at a time. It reads an input row once for all of them, sums it with the
horizontal taps, and adds that to each row with its vertical tap. With 4 x 4 separable taps, an output costs 7 loads and
11 products if u = d = 1, where one at a time costs 16 and 20.

Bytes: one read of x, one write of y; what several threads need comes from the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.library import accumulation_dtype
from fastgan.ops.triton_language import DTYPES, addresses, device_of, rounded, typed

_BLOCK = 512  # columns of a phase that a program's threads have together
_ROWS = tl.constexpr(4)


@triton.jit
def _first(position, UP: tl.constexpr):
    """Return the first input at or after a place among the inputs and the zeros between them."""
    shift = tl.maximum(-position, 0)  # keeps what is divided from being negative
    return (position + shift * UP + UP - 1) // UP - shift


@triton.jit
def _plus(total, line, taps_ptr, K: tl.constexpr, TAPS: tl.constexpr):
    """Add the line with tap K, if there is one."""
    if K >= 0 and K < TAPS:
        total += line * tl.load(taps_ptr + K)
    return total


@triton.jit
def _rows(
    x_plane,
    taps_ptr,
    y0,
    x0,
    exists,
    c,
    inner,
    height,
    width,
    KY: tl.constexpr,
    KX: tl.constexpr,
    UP_Y: tl.constexpr,
    UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    SEPARABLE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Return four rows of a phase, whose first taps are KY and KX. Their first inputs are at y0 and x0."""
    ACC: tl.constexpr = taps_ptr.dtype.element_ty
    SIZE: tl.constexpr = TAPS_Y if SEPARABLE else TAPS_Y * TAPS_X
    WIDTH: tl.constexpr = 1 if SEPARABLE else TAPS_X  # taps of a row
    EACH: tl.constexpr = DOWN_Y * UP_Y * WIDTH  # from a row's tap to that of the next
    zero = tl.zeros([y0.shape[0], x0.shape[1]], ACC)
    first = zero
    second = zero
    third = zero
    fourth = zero
    for v in tl.static_range((_ROWS - 1) * DOWN_Y + (TAPS_Y - KY + UP_Y - 1) // UP_Y):
        y = y0 + v
        line = zero
        for h in tl.static_range((TAPS_X - KX + UP_X - 1) // UP_X):
            x = x0 + h
            at = (y.to(INDEX) * width + x) * inner + c
            read = exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            value = tl.load(x_plane + at, mask=read, other=0.0).to(ACC)
            if SEPARABLE:
                line += value * tl.load(taps_ptr + (TAPS_Y + KX + h * UP_X))
            else:
                first = _plus(first, value, taps_ptr, (KY + v * UP_Y) * WIDTH + KX + h * UP_X, SIZE)
                second = _plus(second, value, taps_ptr, (KY + v * UP_Y) * WIDTH + KX + h * UP_X - EACH, SIZE)
                third = _plus(third, value, taps_ptr, (KY + v * UP_Y) * WIDTH + KX + h * UP_X - 2 * EACH, SIZE)
                fourth = _plus(fourth, value, taps_ptr, (KY + v * UP_Y) * WIDTH + KX + h * UP_X - 3 * EACH, SIZE)
        if SEPARABLE:
            first = _plus(first, line, taps_ptr, KY + v * UP_Y, SIZE)
            second = _plus(second, line, taps_ptr, KY + v * UP_Y - EACH, SIZE)
            third = _plus(third, line, taps_ptr, KY + v * UP_Y - 2 * EACH, SIZE)
            fourth = _plus(fourth, line, taps_ptr, KY + v * UP_Y - 3 * EACH, SIZE)
    return first, second, third, fourth


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
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    columns = tl.cdiv(out_width, UP_X) * inner
    along = tl.cdiv(columns, TILE_X)
    down = tl.cdiv(tl.cdiv(out_height, UP_Y), _ROWS * TILE_Y)
    tile = tl.program_id(0) % (along * down)
    plane = (tl.program_id(0) // (along * down)).to(tl.int64)
    x_plane = typed(x_ptr, DTYPE) + plane * height * width * inner
    y_plane = typed(y_ptr, DTYPE) + plane * out_height * out_width * inner
    e = tile % along * TILE_X + tl.arange(0, TILE_X)[None, :]
    column = e // inner
    c = e % inner
    group = tile // along * TILE_Y + tl.arange(0, TILE_Y)[:, None]  # of rows
    for q in tl.static_range(UP_Y):
        for p in tl.static_range(UP_X):
            y0 = group * (_ROWS * DOWN_Y) + _first(q * DOWN_Y - start_y, UP_Y)
            x0 = column * DOWN_X + _first(p * DOWN_X - start_x, UP_X)
            rows = _rows(
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
            for row in tl.static_range(_ROWS):
                oy = (group * _ROWS + row) * UP_Y + q
                at = (oy.to(INDEX) * out_width + ox) * inner + c
                tl.store(y_plane + at, rounded(rows[row], DTYPE), mask=(oy < out_height) & (ox < out_width))


def upfirdn2d(x: Tensor, y: Tensor, sizes: Sequence[int], separable: bool, taps: Sequence[float]) -> None:
    """x and y are contiguous, in the layout that ``sizes`` tell: see autograd.py."""
    planes, inner, height, width, out_height, out_width, *pairs = sizes
    up_y, up_x, down_y, down_x, start_y, start_x, taps_y, taps_x = pairs
    columns, rows = triton.cdiv(out_width, up_x) * inner, triton.cdiv(triton.cdiv(out_height, up_y), _ROWS.value)
    tile_x = min(_BLOCK, triton.next_power_of_2(columns))
    tile_y = min(_BLOCK // tile_x, triton.next_power_of_2(rows))
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
        "TILE_Y": tile_y,
        "TILE_X": tile_x,
        "INDEX": tl.int32 if max(height * width, out_height * out_width) * inner < 2**30 else tl.int64,
        "DTYPE": DTYPES[x.dtype],
    }
    of_device = _taps(tuple(taps), accumulation_dtype(x.dtype), x.device)
    shape = inner, height, width, out_height, out_width, start_y, start_x
    with device_of(x):
        grid = (planes * triton.cdiv(columns, tile_x) * triton.cdiv(rows, tile_y),)
        _upfirdn2d[grid](x, y, of_device, *shape, **options)


@dataclass
class _Resident:
    """Taps on a device."""

    tensor: Tensor
    streams: set[int] = field(default_factory=set)  # those that have used it
    captured: bool = False  # graphs read it at each replay


_MOST = 256
_on_device: dict[Any, _Resident] = {}


def _taps(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The taps as a tensor, made once: a copy to the device at every call would cost more than the kernel."""
    key = values, dtype, device
    captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _on_device.get(key)
    if found is None:
        if captures:
            raise RuntimeError("upfirdn2d with new taps cannot be captured: run the step once before the capture")
        if len(_on_device) >= _MOST:
            for old in [old for old, resident in _on_device.items() if not resident.captured]:
                del _on_device[old]
        found = _on_device[key] = _Resident(torch.tensor(values, dtype=dtype).to(device))
    found.captured |= captures
    if device.type == "cuda" and not captures:
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream not in found.streams:  # its memory is not reused before the stream is done with it
            found.streams.add(stream.cuda_stream)
            found.tensor.record_stream(stream)
    return found.tensor


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
                "TILE_Y": tile_y,
                "TILE_X": _BLOCK // tile_y,
                "INDEX": index,
            }
            for up, down, separable, tile_y, index in (
                (2, 1, True, 1, tl.int32),
                (1, 2, True, 4, tl.int32),
                (2, 1, False, 1, tl.int64),
                (1, 2, False, 4, tl.int64),
            )
        ],
    )
]
