"""upfirdn2d in Triton. The formula is in csrc/cpu/upfirdn2d.cpp.

A program computes a block of results of one plane. A result uses every u-th tap, starting from one that depends on its
position, so no inserted zero is multiplied. Bytes: one read of x and one write of y. Neighboring results share elements
of x through the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.library import accumulation_dtype
from fastgan.ops.triton_language import DTYPES, addresses, device_of, rounded, typed

_BLOCK = 512


@triton.jit
def _first(o, start, UP: tl.constexpr, DOWN: tl.constexpr):
    """Return the first tap that falls on an element of the input, and that element."""
    shift = (tl.maximum(start, 0) + UP - 1) // UP  # the dividend must not be negative
    position = o * DOWN - start + shift * UP
    k = (UP - position % UP) % UP
    return k, (position + k) // UP - shift


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
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    SEPARABLE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = taps_ptr.dtype.element_ty
    size = out_height * out_width * inner
    blocks = tl.cdiv(size, BLOCK)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    ky, iy = _first(e // (out_width * inner), start_y, UP_Y, DOWN_Y)
    kx, ix = _first(e // inner % out_width, start_x, UP_X, DOWN_X)
    c = e % inner
    total = tl.zeros([BLOCK], ACC)
    for v in tl.static_range((TAPS_Y + UP_Y - 1) // UP_Y):
        y = iy + v
        k = ky + v * UP_Y
        used = inside & (y >= 0) & (y < height) & (k < TAPS_Y)
        line = tl.zeros([BLOCK], ACC)
        for h in tl.static_range((TAPS_X + UP_X - 1) // UP_X):
            x = ix + h
            m = kx + h * UP_X
            read = used & (x >= 0) & (x < width) & (m < TAPS_X)
            at = ((plane * height + y) * width + x) * inner + c
            place = m + (TAPS_Y if SEPARABLE else k * TAPS_X)
            tap = tl.load(taps_ptr + place, mask=read, other=0.0)
            line += tap * tl.load(typed(x_ptr, DTYPE) + at, mask=read, other=0.0).to(ACC)
        if SEPARABLE:
            line *= tl.load(taps_ptr + k, mask=used, other=0.0)
        total += line
    to = typed(y_ptr, DTYPE) + plane * size + e
    tl.store(to, rounded(total, DTYPE), mask=inside)


def upfirdn2d(x: Tensor, y: Tensor, sizes: Sequence[int], separable: bool, taps: Sequence[float]) -> None:
    """Run the kernel. x and y are contiguous in the layout of ``sizes`` (see autograd.py)."""
    planes, inner, height, width, out_height, out_width, *pairs = sizes
    up_y, up_x, down_y, down_x, start_y, start_x, taps_y, taps_x = pairs
    grid = (planes * triton.cdiv(out_height * out_width * inner, _BLOCK),)
    options: dict[str, Any] = {
        "UP_Y": up_y,
        "UP_X": up_x,
        "DOWN_Y": down_y,
        "DOWN_X": down_x,
        "TAPS_Y": taps_y,
        "TAPS_X": taps_x,
        "SEPARABLE": separable,
        "BLOCK": _BLOCK,
        "DTYPE": DTYPES[x.dtype],
    }
    of_device = _taps(tuple(taps), accumulation_dtype(x.dtype), x.device)
    shape = inner, height, width, out_height, out_width, start_y, start_x
    with device_of(x):
        _upfirdn2d[grid](x, y, of_device, *shape, **options)


_on_device: dict[Any, Tensor] = {}


def _taps(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the taps as a cached tensor. A copy to the device at every call would cost more than the kernel."""
    key = values, dtype, device
    found = _on_device.get(key)
    if found is None:
        if len(_on_device) >= 256:
            _on_device.clear()
        found = _on_device[key] = torch.tensor(values, dtype=dtype).to(device)
    return found


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
                "TAPS_Y": 4,
                "TAPS_X": 4,
                "SEPARABLE": separable,
                "BLOCK": _BLOCK,
            }
            for up, down, separable in ((2, 1, True), (1, 2, True), (2, 1, False), (1, 2, False))
        ],
    )
]
