"""Bias and activation in Triton: kernel launches and grids. The kernels are in triton_activations.py."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.bias_act.layout import Layout, Options
from fastgan.ops.bias_act.triton_activations import _activate, _backward, _double_backward
from fastgan.ops.library import accumulation_dtype
from fastgan.ops.triton_language import DTYPES, addresses, device_of

_BLOCK = 1024
_PROGRAMS = 2048  # of a sum over channels: enough that the warps in flight hide the latency of memory

_BITS = {"signs_ptr": "*u8", "inside_ptr": "*u8"}
_SIZES = dict.fromkeys(("size", "channels", "inner"), "i32")
_TILED = _SIZES | dict.fromkeys(("outer_tiled", "channels_tiled", "inner_tiled"), "i32")
_LEAKY = {"ACTIVATION": "leaky_relu", "SLOPE": 0.2, "GAIN": 1.0, "CLAMP": None}
_CLAMPED = {"ACTIVATION": "relu", "SLOPE": 0.0, "GAIN": 1.5, "CLAMP": 256.0}
_GELU, _GELU_TANH, _TANH, _SOFTPLUS = (
    {"ACTIVATION": name, "SLOPE": 0.0, "GAIN": 1.0, "CLAMP": None} for name in ("gelu", "gelu_tanh", "tanh", "softplus")
)
_FLAT = {"INDEX": tl.int32, "BY_CHANNEL": False, "TILE_C": 1, "TILE_Q": _BLOCK}
_SUMMED = {"INDEX": tl.int64, "BY_CHANNEL": True, "TILE_C": 2, "TILE_Q": 512}


def _absent(*names: str) -> dict[str, None]:
    return {f"{name}_ptr": None for name in names}


# For ahead-of-time compilation: each launched kernel, its arguments ("*A" points to the accumulation dtype) and the
# combinations of its constants, without DTYPE, the dtype of the input.
AOT: list[tuple[Any, dict[str, str], list[dict[str, Any]]]] = [
    (
        _activate,
        addresses("x", "bias", "y") | _BITS | _SIZES,
        [
            _LEAKY | {"INDEX": tl.int32, "EIGHT": "any", "BLOCK": _BLOCK} | _absent("bias", "inside"),
            _CLAMPED | {"INDEX": tl.int64, "EIGHT": "any", "BLOCK": _BLOCK},
            *(
                form | {"INDEX": tl.int32, "EIGHT": eight, "BLOCK": _BLOCK} | _absent("signs", "inside")
                for form, eight in ((_GELU, "one"), (_TANH, "successive"), (_SOFTPLUS, "any"))
            ),
        ],
    ),
    (
        _backward,
        addresses("g", "k", "x", "bias", "out", "sums") | _BITS | _TILED,
        [
            _LEAKY | _FLAT | _absent("k", "x", "bias", "inside", "sums"),
            _CLAMPED | _SUMMED | _absent("x", "bias"),
            _GELU | _SUMMED | _absent("k", "signs", "inside"),
        ],
    ),
    (
        _double_backward,
        addresses("h", "k", "dy", "x", "bias", "by_dy", "by_x", "sums") | _TILED,
        [_SOFTPLUS | _FLAT | _absent("k", "bias", "sums"), _GELU_TANH | _SUMMED],
    ),
]


def piecewise_forward(
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    signs: Tensor | None,
    inside: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    sizes = layout.size, layout.channels, layout.inner
    eight = "any"
    if layout.inner % 8 == 0:
        eight = "one"
    elif layout.inner == 1 and layout.channels % 8 == 0:
        eight = "successive"
    constants = _constants(x.dtype, layout, options) | {"EIGHT": eight, "BLOCK": _BLOCK}
    with device_of(x):
        _activate[(triton.cdiv(layout.size, _BLOCK),)](x, bias, y, signs, inside, *sizes, **constants)


def piecewise_apply(
    g: Tensor | None,
    bias: Tensor | None,
    signs: Tensor | None,
    inside: Tensor | None,
    out: Tensor | None,
    sums: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    # If g and out are both None, the dtype does not matter.
    like = next(t for t in (g, out, sums) if t is not None)
    grid, parts, sizes, tile = _tiles(layout, sums, like.dtype)
    constants = _constants(like.dtype, layout, options)
    with device_of(like):
        _backward[grid](g, bias, None, None, signs, inside, out, parts, *sizes, **constants, **tile)
        _add_up(parts, sums)


def smooth_forward(x: Tensor, bias: Tensor | None, y: Tensor, layout: Layout, options: Options) -> None:
    piecewise_forward(x, bias, y, None, None, layout, options)


def smooth_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dx: Tensor | None,
    dbias: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    grid, parts, sizes, tile = _tiles(layout, dbias, x.dtype)
    constants = _constants(x.dtype, layout, options)
    with device_of(x):
        _backward[grid](dy, None, x, bias, None, None, dx, parts, *sizes, **constants, **tile)
        _add_up(parts, dbias)


def smooth_double_backward(
    h: Tensor | None,
    h_bias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    by_dy: Tensor | None,
    by_x: Tensor | None,
    by_bias: Tensor | None,
    layout: Layout,
    options: Options,
) -> None:
    grid, parts, sizes, tile = _tiles(layout, by_bias, x.dtype)
    constants = _constants(x.dtype, layout, options)
    with device_of(x):
        _double_backward[grid](h, h_bias, dy, x, bias, by_dy, by_x, parts, *sizes, **constants, **tile)
        _add_up(parts, by_bias)


def _tiles(
    layout: Layout, sums: Tensor | None, dtype: torch.dtype
) -> tuple[tuple[int, int], Tensor | None, tuple[int, ...], dict[str, int]]:
    """Return the grid, the buffer of the partial sums (parts, channels), the sizes and the tile.

    They depend on the shape alone.
    """
    sizes = layout.size, layout.channels, layout.inner
    if sums is None:
        rows = triton.cdiv(layout.size, _BLOCK)
        return (rows, 1), None, (*sizes, 1, rows, _BLOCK), {"BY_CHANNEL": False, "TILE_C": 1, "TILE_Q": _BLOCK}
    tile_q = min(_BLOCK, triton.next_power_of_2(layout.inner))
    tile_c = max(1, _BLOCK // tile_q)
    tiles = triton.cdiv(layout.channels, tile_c)
    count = min(layout.outer, triton.cdiv(_PROGRAMS, tiles))
    parts = torch.empty(count, layout.channels, dtype=accumulation_dtype(dtype), device=sums.device)
    return (tiles, count), parts, (*sizes, *layout), {"BY_CHANNEL": True, "TILE_C": tile_c, "TILE_Q": tile_q}


def _add_up(parts: Tensor | None, sums: Tensor | None) -> None:
    if parts is not None and sums is not None:
        torch.sum(parts, 0, out=sums)


def _constants(dtype: torch.dtype, layout: Layout, options: Options) -> dict[str, Any]:
    return {
        "ACTIVATION": options.activation,
        "SLOPE": options.negative_slope,
        "GAIN": options.gain,
        "CLAMP": None if options.clamp == inf else options.clamp,
        "INDEX": tl.int32 if layout.size < 2**31 - 2 * _BLOCK else tl.int64,
        "DTYPE": DTYPES[dtype],
    }
