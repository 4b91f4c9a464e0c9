"""The first filter of filtered_lrelu in Triton, with the activation, or its slopes, at the end.

    _activated      z = act(U x), and two bits per element if a derivative follows: above 0, and not clamped
    with READ       z = S (U x), with the slopes S from these bits

upfirdn2d does the second filter. One kernel for both would have to compute an upsampled element for each of the taps
that reads it: 36 times for 12 taps and a factor of 2. Bytes: one read of x, one write of z, two bits per element of z.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.library import accumulation_dtype
from fastgan.ops.triton_language import DTYPES, addresses, device_of, rounded, typed
from fastgan.ops.upfirdn2d.triton_sums import taps_on_device, weighted_sums

_BLOCK = 512  # whole bytes of bits, four elements each


@triton.jit
def _activated(
    x_ptr,
    z_ptr,
    taps_ptr,
    bits_ptr,
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
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,
    READ: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    size = out_height * out_width
    blocks = tl.cdiv(size, BLOCK)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    u = weighted_sums(
        x_ptr,
        taps_ptr,
        plane,
        e,
        inside,
        1,
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
    quarter = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    shifts = 2 * tl.arange(0, 4)
    slope = tl.full([BLOCK], SLOPE * GAIN, u.dtype)
    gain = tl.full([BLOCK], GAIN, u.dtype)
    if READ:
        packed = tl.load(bits_ptr + quarter).to(tl.int32)  # (BLOCK / 4,)
        bits = tl.reshape((packed[:, None] >> shifts[None, :]) & 3, [BLOCK])
        z = u * tl.where((bits & 1) != 0, gain, slope)
        z = tl.where((bits & 2) != 0, z, 0.0)
    else:
        above = u > 0.0
        z = u * tl.where(above, gain, slope)
        kept = tl.full([BLOCK], True, tl.int1)
        if CLAMP is not None:
            limit = tl.full([BLOCK], CLAMP, u.dtype)
            kept = tl.abs(z) <= limit
            z = tl.where(kept | (z != z), z, tl.where(z > 0.0, limit, -limit))
        if bits_ptr is not None:
            bits = above.to(tl.int32) + 2 * kept.to(tl.int32)
            packed = tl.sum(tl.reshape(bits, [BLOCK // 4, 4]) << shifts[None, :], axis=1)
            tl.store(bits_ptr + quarter, packed.to(tl.uint8))
    tl.store(typed(z_ptr, DTYPE) + plane * size + e, rounded(z, DTYPE), mask=inside)


def size_of_bits(planes: int, elements: int) -> int:
    """The bytes for the bits of all planes."""
    blocks: int = triton.cdiv(elements, _BLOCK)
    return planes * blocks * (_BLOCK // 4)


def activated(
    x: Tensor,
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
    """x and z are contiguous. The sizes are those of upfirdn2d's kernel, with inner 1."""
    planes, _, height, width, out_height, out_width, *pairs = sizes
    up_y, up_x, down_y, down_x, start_y, start_x, taps_y, taps_x = pairs
    grid = (planes * triton.cdiv(out_height * out_width, _BLOCK),)
    options: dict[str, Any] = {
        "UP_Y": up_y,
        "UP_X": up_x,
        "DOWN_Y": down_y,
        "DOWN_X": down_x,
        "TAPS_Y": taps_y,
        "TAPS_X": taps_x,
        "SEPARABLE": separable,
        "SLOPE": slope,
        "GAIN": gain,
        "CLAMP": None if clamp == inf else clamp,
        "READ": read,
        "BLOCK": _BLOCK,
        "DTYPE": DTYPES[x.dtype],
    }
    of_device = taps_on_device(tuple(taps), accumulation_dtype(x.dtype), x.device)
    shape = height, width, out_height, out_width, start_y, start_x
    with device_of(x):
        _activated[grid](x, z, of_device, bits, *shape, **options)


_POINTERS = {
    **addresses("x", "z", "taps"),
    "bits_ptr": "*u8",
    **dict.fromkeys(("height", "width", "out_height", "out_width", "start_y", "start_x"), "i32"),
}
AOT = [
    (
        _activated,
        _POINTERS,
        [
            {
                "UP_Y": 1 if read else 2,
                "UP_X": 1 if read else 2,
                "DOWN_Y": 1,
                "DOWN_X": 1,
                "TAPS_Y": 12,
                "TAPS_X": 12,
                "SEPARABLE": True,
                "SLOPE": 0.2,
                "GAIN": 2**0.5,
                "CLAMP": 256.0,
                "READ": read,
                "BLOCK": _BLOCK,
            }
            for read in (False, True)
        ],
    )
]
