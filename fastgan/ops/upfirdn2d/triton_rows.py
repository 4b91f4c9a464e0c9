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


@triton.jit
def first_input(position, UP: tl.constexpr):
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
    ACC: tl.constexpr = taps_ptr.dtype.element_ty
    SIZE: tl.constexpr = TAPS_Y if SEPARABLE else TAPS_Y * TAPS_X
    WIDTH: tl.constexpr = 1 if SEPARABLE else TAPS_X  # taps of a row
    EACH: tl.constexpr = DOWN_Y * UP_Y * WIDTH  # from a row's tap to that of the next
    zero = tl.zeros([y0.shape[0], x0.shape[1]], ACC)
    first = zero
    second = zero
    third = zero
    fourth = zero
    for v in tl.static_range((ROWS - 1) * DOWN_Y + (TAPS_Y - KY + UP_Y - 1) // UP_Y):
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
