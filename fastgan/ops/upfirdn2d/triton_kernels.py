"""upfirdn2d in Triton. The formula is in csrc/cpu/upfirdn2d.cpp.

A program makes a block of the results of a plane. A result meets every u-th tap, from one that depends on its place, so
that no zero is multiplied. Bytes: one read of x, one write of y; what several results need comes from the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.library import accumulation_dtype
from fastgan.ops.triton_language import DTYPES, addresses, device_of, rounded, typed
from fastgan.ops.upfirdn2d.triton_sums import taps_on_device, weighted_sums

_BLOCK = 512


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
    size = out_height * out_width * inner
    blocks = tl.cdiv(size, BLOCK)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    total = weighted_sums(
        x_ptr,
        taps_ptr,
        plane,
        e,
        inside,
        inner,
        height,
        width,
        out_width,
        start_y,
        start_x,
        UP_Y,
        UP_X,
        DOWN_Y,
        DOWN_X,
        TAPS_Y,
        TAPS_X,
        SEPARABLE,
        BLOCK,
        DTYPE,
    )
    to = typed(y_ptr, DTYPE) + plane * size + e
    tl.store(to, rounded(total, DTYPE), mask=inside)


def upfirdn2d(x: Tensor, y: Tensor, sizes: Sequence[int], separable: bool, taps: Sequence[float]) -> None:
    """x and y are contiguous, in the layout that ``sizes`` tell: see autograd.py."""
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
    of_device = taps_on_device(tuple(taps), accumulation_dtype(x.dtype), x.device)
    shape = inner, height, width, out_height, out_width, start_y, start_x
    with device_of(x):
        _upfirdn2d[grid](x, y, of_device, *shape, **options)


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
