"""Rows of upfirdn2d's results in Triton, for its kernel and for that of filtered_lrelu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # columns of a phase that a program's threads have together
TOGETHER = 4  # results in a row that a thread stores in one access
ROWS_OF_PHASE = tl.constexpr(4)
MOST_LOADS = 240  # of a thread with separable taps, for all phases
MOST_UNROLLED = tl.constexpr(96)  # loads of a thread. With 12 taps, the compiler would need 22 s for all of them.


@triton.jit
def first_input(position, UP: tl.constexpr):
    """Return the first input at or after a place among the inputs and the zeros between them."""
    shift = tl.maximum(-position, 0)  # keeps the dividend nonnegative
    return (position + shift * UP + UP - 1) // UP - shift


@triton.jit
def _plus(total, line, taps_ptr, k, TAPS: tl.constexpr):
    """Add the line times tap k, if there is one."""
    exists = (k >= 0) & (k < TAPS)
    tap = tl.load(taps_ptr + k, mask=exists, other=0.0)
    return tl.where(exists, total + line * tap, total)  # a line that is not finite adds nothing without a tap


@triton.jit
def _plus_line(
    rows,
    v,
    x_plane,
    taps_ptr,
    y,
    x0,
    exists,
    c,
    inner,
    height,
    width,
    bias,
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
    """Add line v of the input, which is at y, to the four rows that use it."""
    SIZE: tl.constexpr = TAPS_Y if SEPARABLE else TAPS_Y * TAPS_X
    WIDTH: tl.constexpr = 1 if SEPARABLE else TAPS_X  # taps of a row
    EACH: tl.constexpr = DOWN_Y * UP_Y * WIDTH  # from a row's tap to that of the next
    first, second, third, fourth = rows
    line = tl.zeros_like(first)
    k = (KY + v * UP_Y) * WIDTH
    for h in tl.static_range((TAPS_X - KX + UP_X - 1) // UP_X):
        x = x0 + h
        at = (y.to(INDEX) * width + x) * inner + c
        read = exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        value = tl.load(x_plane + at, mask=read, other=0.0).to(line.dtype)
        if bias is not None:
            value += tl.where(read, bias, 0.0)
        if SEPARABLE:
            line += value * tl.load(taps_ptr + (TAPS_Y + KX + h * UP_X))
        else:
            first = _plus(first, value, taps_ptr, k + KX + h * UP_X, SIZE)
            second = _plus(second, value, taps_ptr, k + KX + h * UP_X - EACH, SIZE)
            third = _plus(third, value, taps_ptr, k + KX + h * UP_X - 2 * EACH, SIZE)
            fourth = _plus(fourth, value, taps_ptr, k + KX + h * UP_X - 3 * EACH, SIZE)
    if SEPARABLE:
        first = _plus(first, line, taps_ptr, k, SIZE)
        second = _plus(second, line, taps_ptr, k - EACH, SIZE)
        third = _plus(third, line, taps_ptr, k - 2 * EACH, SIZE)
        fourth = _plus(fourth, line, taps_ptr, k - 3 * EACH, SIZE)
    return first, second, third, fourth


@triton.jit
def rows_of_phase(
    x_plane,
    taps_ptr,
    y0,
    x0,
    exists,
    c,
    inner,
    height,
    width,
    bias,
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
    """Return four rows of a phase, whose first taps are KY and KX. Their first inputs are at y0 and x0.

    The bias, unless it is None, is added to each input.
    """
    zero = tl.zeros([y0.shape[0], x0.shape[1]], taps_ptr.dtype.element_ty)
    rows = zero, zero, zero, zero
    LINES: tl.constexpr = (ROWS_OF_PHASE - 1) * DOWN_Y + (TAPS_Y - KY + UP_Y - 1) // UP_Y
    if LINES * TAPS_X * UP_Y <= MOST_UNROLLED:
        for v in tl.static_range(LINES):
            rows = _plus_line(
                rows, v, x_plane, taps_ptr, y0 + v, x0, exists, c, inner, height, width, bias,
                KY, KX, UP_Y, UP_X, DOWN_Y, TAPS_Y, TAPS_X, SEPARABLE, INDEX,
            )  # fmt: skip
    else:
        for v in range(LINES):
            rows = _plus_line(
                rows, v, x_plane, taps_ptr, y0 + v, x0, exists, c, inner, height, width, bias,
                KY, KX, UP_Y, UP_X, DOWN_Y, TAPS_Y, TAPS_X, SEPARABLE, INDEX,
            )  # fmt: skip
    return rows


def unrolls(up: tuple[int, int], down: tuple[int, int], taps: tuple[int, int], start: tuple[int, int]) -> bool:
    """Return whether a thread's loads with separable taps are few enough to be written out by the compiler."""
    (up_y, up_x), (down_y, down_x), (taps_y, taps_x), (start_y, start_x) = up, down, taps, start
    lines = _span(up_y, down_y, taps_y, start_y % up_y) + (ROWS_OF_PHASE.value - 1) * down_y
    loads: int = lines * _span(up_x, down_x, taps_x, start_x % up_x)
    return loads <= MOST_LOADS


def tiles_of(sizes: Sequence[int], separable: bool) -> tuple[dict[str, Any], int]:
    """Return the constants that the sizes of a launch decide, and its number of programs."""
    planes, inner, height, width, out_height, out_width, *pairs = sizes
    up_y, up_x, down_y, down_x, start_y, start_x, taps_y, taps_x = pairs
    unrolled = separable and unrolls((up_y, up_x), (down_y, down_x), (taps_y, taps_x), (start_y, start_x))
    # Neighbors share a window of the input. It must not be so far from the next thread's that few accesses coincide.
    near = [n for n in (TOGETHER, 2) if n % up_x == 0 and n * down_x <= TOGETHER * up_x]
    joined = bool(unrolled and inner == 1 and near)
    across = near[0] if joined else up_x
    # Neighboring rows of many taps have most of their lines in common.
    twice = joined and up_y <= 2 and down_y == 1 and taps_y >= 4 * up_y
    of_thread = ROWS_OF_PHASE.value * (2 if twice else 1)
    columns, rows = triton.cdiv(out_width, across) * inner, triton.cdiv(triton.cdiv(out_height, up_y), of_thread)
    block = BLOCK // TOGETHER if joined else BLOCK
    tile_x = min(block, triton.next_power_of_2(columns))
    tile_y = min(block // tile_x, triton.next_power_of_2(rows))
    options = {
        "UP_Y": up_y,
        "UP_X": up_x,
        "DOWN_Y": down_y,
        "DOWN_X": down_x,
        "PHASE_Y": start_y % up_y,
        "PHASE_X": start_x % up_x,
        "TAPS_Y": taps_y,
        "TAPS_X": taps_x,
        "SEPARABLE": separable,
        "UNROLLED": unrolled,
        "JOINED": joined,
        "ROWS": of_thread,
        "ACROSS": across,
        "TILE_Y": tile_y,
        "TILE_X": tile_x,
        "INDEX": tl.int32 if max(height * width, out_height * out_width) * inner < 2**30 else tl.int64,
    }
    return options, planes * triton.cdiv(columns, tile_x) * triton.cdiv(rows, tile_y)


def _span(up: int, down: int, taps: int, phase: int) -> int:
    """Return how many inputs in a row the outputs of all phases have."""
    return (taps - 1 - phase + down * (up - 1)) // up + 1


@triton.jit
def load_taps(taps_ptr, AT: tl.constexpr, TAPS: tl.constexpr):
    """Load the taps of one direction."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps += (tl.load(taps_ptr + (AT + k)),)
    return taps


@triton.jit
def lines_of_tile(
    x_plane,
    taps,
    y0,
    x0,
    exists,
    c,
    inner,
    height,
    width,
    bias,
    UP_Y: tl.constexpr,
    UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    PHASE_Y: tl.constexpr,
    PHASE_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Return the input's lines for a thread's rows, each as a tuple: its sums with the taps of result p of ``ACROSS``.

    y0 and x0 are the first inputs of result 0. An input j further on meets tap UP j + PHASE - DOWN p of result p.
    The bias, unless it is None, is added to each input.
    """
    LINES: tl.constexpr = (TAPS_Y - 1 - PHASE_Y + DOWN_Y * (UP_Y - 1)) // UP_Y + 1 + (ROWS - 1) * DOWN_Y
    WIDTH: tl.constexpr = (TAPS_X - 1 - PHASE_X + DOWN_X * (ACROSS - 1)) // UP_X + 1
    columns = ()
    for j in tl.static_range(WIDTH):
        columns += (exists & (x0 + j >= 0) & (x0 + j < width),)
    biases = ()  # of the sums: it is cheaper to add them once than to each input
    for p in tl.static_range(ACROSS if bias is not None else 0):
        total = tl.zeros(x0.shape, taps[0].dtype)
        for j in tl.static_range(WIDTH):
            if (UP_X * j + PHASE_X - DOWN_X * p >= 0) & (UP_X * j + PHASE_X - DOWN_X * p < TAPS_X):
                total += tl.where(columns[j], taps[UP_X * j + PHASE_X - DOWN_X * p], 0.0)
        biases += (bias * total,)
    lines = ()
    for v in tl.static_range(LINES):
        y = y0 + v
        inside = (y >= 0) & (y < height)
        first = x_plane + ((y.to(INDEX) * width + x0) * inner + c)
        values = ()
        for j in tl.static_range(WIDTH):
            values += (tl.load(first + j * inner, mask=inside & columns[j], other=0.0).to(taps[0].dtype),)
        sums = ()
        for p in tl.static_range(ACROSS):
            total = tl.zeros_like(values[0])
            for j in tl.static_range(WIDTH):
                if (UP_X * j + PHASE_X - DOWN_X * p >= 0) & (UP_X * j + PHASE_X - DOWN_X * p < TAPS_X):
                    total += values[j] * taps[UP_X * j + PHASE_X - DOWN_X * p]
            if bias is not None:
                total += tl.where(inside, biases[p], 0.0)
            sums += (total,)
        lines += (sums,)
    return lines


@triton.jit
def row_of_lines(
    lines,
    taps,
    ROW: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    UP_Y: tl.constexpr,
    DOWN_Y: tl.constexpr,
    PHASE_Y: tl.constexpr,
    TAPS_Y: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return one of a thread's rows of phase Q, for result P of those in a row."""
    LINES: tl.constexpr = (TAPS_Y - 1 - PHASE_Y + DOWN_Y * (UP_Y - 1)) // UP_Y + 1 + (ROWS - 1) * DOWN_Y
    total = tl.zeros_like(lines[0][P])
    for v in tl.static_range(LINES):
        if (UP_Y * (v - ROW * DOWN_Y) + PHASE_Y >= DOWN_Y * Q) & (
            UP_Y * (v - ROW * DOWN_Y) + PHASE_Y < DOWN_Y * Q + TAPS_Y
        ):
            total += lines[v][P] * taps[UP_Y * (v - ROW * DOWN_Y) + PHASE_Y - DOWN_Y * Q]
    return total


@triton.jit
def joined_row(
    lines,
    taps,
    ROW: tl.constexpr,
    Q: tl.constexpr,
    ACROSS: tl.constexpr,
    UP_Y: tl.constexpr,
    DOWN_Y: tl.constexpr,
    PHASE_Y: tl.constexpr,
    TAPS_Y: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return one of a thread's rows of phase Q. Its two or four results are neighbors."""
    TILE_Y: tl.constexpr = lines[0][0].shape[0]
    TILE_X: tl.constexpr = lines[0][0].shape[1]
    a = row_of_lines(lines, taps, ROW, Q, 0, UP_Y, DOWN_Y, PHASE_Y, TAPS_Y, ROWS)
    b = row_of_lines(lines, taps, ROW, Q, 1, UP_Y, DOWN_Y, PHASE_Y, TAPS_Y, ROWS)
    if ACROSS == 4:
        c = row_of_lines(lines, taps, ROW, Q, 2, UP_Y, DOWN_Y, PHASE_Y, TAPS_Y, ROWS)
        d = row_of_lines(lines, taps, ROW, Q, 3, UP_Y, DOWN_Y, PHASE_Y, TAPS_Y, ROWS)
        both = tl.join(tl.join(a, c), tl.join(b, d))
    else:
        both = tl.join(a, b)
    return tl.reshape(both, (TILE_Y, TILE_X * ACROSS))


@dataclass
class _Resident:
    """Taps on a device."""

    tensor: Tensor
    streams: set[int] = field(default_factory=set)  # those that have used it
    captured: bool = False  # graphs read it at each replay


_MOST = 256
_on_device: dict[Any, _Resident] = {}


def taps_on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
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
