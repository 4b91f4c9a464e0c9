"""Rows of upfirdn2d's results in Triton, for its kernel and for that of filtered_lrelu."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # columns of a phase that a program's threads have together
ROWS = tl.constexpr(4)
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
    zero = tl.zeros([y0.shape[0], x0.shape[1]], taps_ptr.dtype.element_ty)
    rows = zero, zero, zero, zero
    LINES: tl.constexpr = (ROWS - 1) * DOWN_Y + (TAPS_Y - KY + UP_Y - 1) // UP_Y
    if LINES * TAPS_X * UP_Y <= MOST_UNROLLED:
        for v in tl.static_range(LINES):
            rows = _plus_line(
                rows, v, x_plane, taps_ptr, y0 + v, x0, exists, c, inner, height, width,
                KY, KX, UP_Y, UP_X, DOWN_Y, TAPS_Y, TAPS_X, SEPARABLE, INDEX,
            )  # fmt: skip
    else:
        for v in range(LINES):
            rows = _plus_line(
                rows, v, x_plane, taps_ptr, y0 + v, x0, exists, c, inner, height, width,
                KY, KX, UP_Y, UP_X, DOWN_Y, TAPS_Y, TAPS_X, SEPARABLE, INDEX,
            )  # fmt: skip
    return rows


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
