"""The sums of upfirdn2d in Triton: the kernel of upfirdn2d stores them, and that of filtered_lrelu activates them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.triton_language import typed


@triton.jit
def _first(o, start, UP: tl.constexpr, DOWN: tl.constexpr):
    """Return the first tap that meets an element of the input, and that element."""
    shift = (tl.maximum(start, 0) + UP - 1) // UP  # keeps what is divided from being negative
    position = o * DOWN - start + shift * UP
    k = (UP - position % UP) % UP
    return k, (position + k) // UP - shift


@triton.jit
def weighted_sums(
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
    """Return the results for the elements ``e`` of a plane, in the dtype of the taps."""
    ACC: tl.constexpr = taps_ptr.dtype.element_ty
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
    return total


_on_device: dict[Any, Tensor] = {}


def taps_on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The taps as a tensor, made once: a copy to the device at every call would cost more than the kernel."""
    key = values, dtype, device
    found = _on_device.get(key)
    if found is None:
        if len(_on_device) >= 256:
            _on_device.clear()
        found = _on_device[key] = torch.tensor(values, dtype=dtype).to(device)
    return found
