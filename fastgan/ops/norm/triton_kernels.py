"""Normalization in Triton: kernel launches and grids. The kernels are in triton_rows.py, triton_channels.py
and triton_channel_sums.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.norm.layout import Backward, DoubleBackward, Forward, Layout
from fastgan.ops.norm.triton_channel_sums import row_means, row_statistics
from fastgan.ops.norm.triton_channels import (
    channel_moments,
    channel_products,
    grad_channels,
    grad_grad_channels,
    normalize_channels,
)
from fastgan.ops.norm.triton_rows import affine_sums, grad_grad_rows, grad_rows, normalize_rows
from fastgan.ops.triton_language import DTYPES, addresses, device_of

_BLOCK = 1024
_LONG_BLOCK = 4096
_WIDE_ROW = 20000  # bytes of a row, of which too many in flight would leave L2 before their second read
_FEW_ROWS = 256  # of which one program each would not fill a GPU
_TILE = 2048  # elements of a tile of channels
_SUMS = 1024  # programs of the sums over samples
_SHARE = 65536  # bytes of a program of the sums over channels: L2 holds those of all in flight for a second read
_MOST_SUMS = 4096
_PROGRAMS = 512  # programs of a sum over samples or positions; enough to fill any GPU
_SMALL = 256  # values of a sum over parts
_LONGEST = 65535  # largest number of programs on the second axis of a grid


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


_SIZES = _integers("size", "channels", "inner", "groups")
_STRIDES = _integers("by_sample", "by_channel", "by_segment", "by_position")
_TILED = _integers("segments", "channels", "inner", "groups") | _STRIDES
_BY_ROW = _integers("positions", "parts", "channels", "groups")
_TALL: dict[str, Any] = {"TILE_C": 1, "TILE_S": 2, "TILE_Q": 1024, "INDEX": tl.int32}
_WIDE: dict[str, Any] = {"TILE_C": 64, "TILE_S": 1, "TILE_Q": 32, "INDEX": tl.int64}

# For ahead-of-time compilation: each launched kernel, its arguments ("*A" points to the accumulation dtype) and the
# combinations of its constants, without DTYPE, the dtype of the input.
AOT: list[tuple[Any, dict[str, str], list[dict[str, Any]]]] = [
    (
        normalize_rows,
        addresses("x", "weight", "bias", "y", "mean", "rstd") | _SIZES,
        [
            {"EPS": 1e-5, "STAGE": "whole", "BLOCK": _BLOCK},
            {"EPS": 1e-5, "STAGE": "results", "BLOCK": _BLOCK, "weight_ptr": None, "bias_ptr": None},
        ],
    ),
    (
        grad_rows,
        addresses("dy", "x", "mean", "rstd", "weight", "dx", "sums") | _SIZES,
        [
            {"STAGE": "whole", "BLOCK": _BLOCK, "sums_ptr": None},
            {"STAGE": "sums", "BLOCK": _BLOCK},
            {"STAGE": "results", "BLOCK": _BLOCK, "weight_ptr": None},
        ],
    ),
    (
        grad_grad_rows,
        addresses("h", "h_weight", "h_bias", "dy", "x", "mean", "rstd", "weight", "by_dy", "by_x", "h_means", "sums")
        | _SIZES,
        [
            {"STAGE": "whole", "BLOCK": _BLOCK, "sums_ptr": None},
            {"STAGE": "sums", "BLOCK": _BLOCK, "h_weight_ptr": None, "h_bias_ptr": None},
            {"STAGE": "results", "BLOCK": _BLOCK, "h_ptr": None, "weight_ptr": None, "h_means_ptr": None},
        ],
    ),
    (
        affine_sums,
        addresses("dy", "x", "h", "mean", "rstd", "h_means", "weight_sums", "bias_sums")
        | _integers("samples", "channels", "inner", "of_row"),
        [
            {"SECOND": False, "ONE_ROW": True, "TILE_C": 1024, "TILE_Q": 1, "h_ptr": None, "h_means_ptr": None},
            {"SECOND": True, "ONE_ROW": False, "TILE_C": 2, "TILE_Q": 512, "bias_sums_ptr": None},
        ],
    ),
    (
        channel_moments,
        addresses("x", "moments") | _integers("segments", "channels", "inner") | _STRIDES,
        [_TALL, _WIDE],
    ),
    (
        row_statistics,
        addresses("moments", "statistics") | _BY_ROW,
        [{"EPS": 1e-5, "VARIANCE": variance, "BLOCK": _SMALL} for variance in (False, True)],
    ),
    (
        normalize_channels,
        addresses("x", "weight", "bias", "y", "statistics") | _TILED,
        [_TALL, _WIDE | {"weight_ptr": None, "bias_ptr": None}],
    ),
    (
        channel_products,
        addresses("h", "dy", "x", "statistics", "sums") | _TILED,
        [_TALL, _WIDE, _WIDE | {"h_ptr": None}],
    ),
    (
        row_means,
        addresses("sums", "statistics", "weight", "h_weight", "means", "of_weight", "of_bias") | _BY_ROW,
        [
            {"SECOND": False, "H": False, "BLOCK_C": 1, "BLOCK_P": _SMALL, "h_weight_ptr": None},
            {"SECOND": True, "H": True, "BLOCK_C": 16, "BLOCK_P": 16, "of_bias_ptr": None},
        ],
    ),
    (
        grad_channels,
        addresses("dy", "x", "statistics", "weight", "means", "dx") | _TILED,
        [_TALL, _WIDE | {"weight_ptr": None}],
    ),
    (
        grad_grad_channels,
        addresses("h", "h_weight", "h_bias", "dy", "x", "statistics", "weight", "means", "by_dy", "by_x") | _TILED,
        [_TALL, _WIDE | {"h_weight_ptr": None, "h_bias_ptr": None, "weight_ptr": None}],
    ),
]


def forward(t: Forward, layout: Layout, eps: float) -> None:
    with device_of(t.x):
        if _in_rows(layout):
            mean, rstd, *_ = t.statistics
            parts, constants = _row_parts(layout), _row_block(t.x, layout) | {"EPS": eps}
            if parts > 1:
                _share_statistics(t, layout, eps)
            stage = "whole" if parts == 1 else "results"
            normalize_rows[(layout.rows, parts)](*t[:-1], mean, rstd, *_sizes(layout), STAGE=stage, **constants)
            return
        _statistics(t, layout, eps)
        tile = _tile(t.x, layout)
        normalize_channels[_tiles(t.x, layout, tile, every=True)](*t, *_tiled(layout), **tile)


def _statistics(t: Forward, layout: Layout, eps: float) -> None:
    tile = _tile(t.x, layout, 2 * _TILE)  # one operand leaves registers for more of it
    tiles = _tiles(t.x, layout, tile)
    moments = t.statistics.new_empty(3, layout.samples, tiles[1], layout.channels)
    sizes = layout.segments, layout.channels, layout.inner
    channel_moments[tiles](t.x, moments, *sizes, *_strides(layout), **tile)
    small = {"EPS": eps, "VARIANCE": len(t.statistics) == 3, "BLOCK": _SMALL}
    row_statistics[(layout.rows,)](moments, t.statistics, *_by_row(tiles, layout), **small)


def _share_statistics(t: Forward, layout: Layout, eps: float) -> None:
    """Compute the statistics of long rows by several programs each: a row is the only channel of a sample."""
    _statistics(t, Layout(layout.rows, 1, 1, _sizes(layout)[0], 1), eps)


def backward(t: Backward, layout: Layout) -> None:
    with device_of(t.x):
        if _in_rows(layout):
            mean, rstd, *_ = t.statistics
            if t.dx is not None:
                operands = t.dy, t.x, mean, rstd, t.weight, t.dx
                _launch_rows(grad_rows, 2, operands, t.x, mean, layout)
            if t.dweight is not None or t.dbias is not None:
                _sum_over_samples(t, None, None, (t.dweight, t.dbias), layout)
            return
        means = _means(t, None, None, (t.dweight, t.dbias), layout)
        if t.dx is not None:
            operands = t.dy, t.x, t.statistics, t.weight, means, t.dx
            tile = _tile(t.x, layout)
            grad_channels[_tiles(t.x, layout, tile, every=True)](*operands, *_tiled(layout), **tile)


def double_backward(t: DoubleBackward, layout: Layout) -> None:
    with device_of(t.x):
        if _in_rows(layout):
            mean, rstd, *_ = t.statistics
            h_means = None if t.by_weight is None else mean.new_empty(layout.rows, 2)
            operands = *t[:5], mean, rstd, t.weight, t.by_dy, t.by_x, h_means
            _launch_rows(grad_grad_rows, 7, operands, t.x, mean, layout)
            if t.by_weight is not None:
                _sum_over_samples(t, t.h, h_means, (t.by_weight, None), layout)
            return
        means = _means(t, t.h, t.h_weight, (t.by_weight, None), layout)
        if t.by_dy is not None or t.by_x is not None:
            tile = _tile(t.x, layout)
            grid = _tiles(t.x, layout, tile, every=True)
            grad_grad_channels[grid](*t[:7], means, *t[7:9], *_tiled(layout), **tile)


def _launch_rows(
    kernel: Any, count: int, operands: tuple[Tensor | None, ...], x: Tensor, mean: Tensor, layout: Layout
) -> None:
    """Launch a derivative of contiguous rows that needs ``count`` sums of each row."""
    parts, constants = _row_parts(layout), _row_block(x, layout)
    grid, sizes = (layout.rows, parts), _sizes(layout)
    if parts == 1:
        kernel[grid](*operands, None, *sizes, STAGE="whole", **constants)
        return
    sums = mean.new_empty(count, layout.rows, parts)
    kernel[grid](*operands, sums, *sizes, STAGE="sums", **constants)
    kernel[grid](*operands, sums.sum(2), *sizes, STAGE="results", **constants)


def _row_block(x: Tensor, layout: Layout) -> dict[str, Any]:
    """Return the block. Wide ones keep fewer rows in flight, so that L2 holds them, and each thread has less to do."""
    size = _sizes(layout)[0]
    of_whole_row = 2 * _BLOCK if size * x.element_size() > _WIDE_ROW else _BLOCK
    block = _LONG_BLOCK if _row_parts(layout) > 1 else of_whole_row
    # The sums over a row that is one block outweigh few elements of a thread.
    of_thread = 16 if x.element_size() == 2 and size <= _BLOCK else 8
    return {"BLOCK": block, "num_warps": block // (32 * of_thread), "DTYPE": DTYPES[x.dtype]}


def _row_parts(layout: Layout) -> int:
    """Return how many programs share a row: several if there are few rows and these are long."""
    blocks = triton.cdiv(_sizes(layout)[0], _LONG_BLOCK)
    parts = max(1, min(blocks // 2, triton.cdiv(_PROGRAMS, layout.rows))) if layout.rows <= _FEW_ROWS else 1
    return int(triton.cdiv(blocks, triton.cdiv(blocks, parts)))  # without programs that have no block


def _in_rows(layout: Layout) -> bool:
    return layout.segments == 1 and not layout.channels_last


def _sum_over_samples(
    t: Backward | DoubleBackward,
    h: Tensor | None,
    h_means: Tensor | None,
    results: tuple[Tensor | None, Tensor | None],
    layout: Layout,
) -> None:
    """Sum the gradients of weight and bias over samples, for contiguous rows."""
    mean, rstd, *_ = t.statistics
    tile_q = min(_BLOCK, triton.next_power_of_2(layout.inner))
    tile_c = min(_BLOCK // tile_q, triton.next_power_of_2(layout.channels))
    tiles = triton.cdiv(layout.channels, tile_c)
    parts = min(layout.samples, triton.cdiv(_SUMS, tiles))  # depends on the shape alone: same bits on any GPU
    sums = [None if s is None else mean.new_empty(parts, layout.channels) for s in results]
    sizes = layout.samples, layout.channels, layout.inner, layout.channels // layout.groups
    constants: dict[str, Any] = {"SECOND": h is not None, "ONE_ROW": layout.groups == 1}
    constants |= {"TILE_C": tile_c, "TILE_Q": tile_q, "DTYPE": DTYPES[t.x.dtype], "num_warps": 8}
    affine_sums[(tiles, parts)](t.dy, t.x, h, mean, rstd, h_means, *sums, *sizes, **constants)
    _add_up(sums, results)


def _means(
    t: Backward | DoubleBackward,
    h: Tensor | None,
    h_weight: Tensor | None,
    results: tuple[Tensor | None, Tensor | None],
    layout: Layout,
) -> Tensor:
    """Return the means that the derivatives need per row, and write the gradients of weight and bias to ``results``."""
    second = isinstance(t, DoubleBackward)
    tile = _tile(t.x, layout)
    tiles = _tiles(t.x, layout, tile)
    acc = t.statistics
    sums = acc.new_empty(5 if h is not None else 2, layout.samples, tiles[1], layout.channels)
    channel_products[tiles](h, t.dy, t.x, acc, sums, *_tiled(layout), **tile)
    means = acc.new_empty(layout.rows, 5)
    unsummed = [None if s is None else acc.new_empty(layout.samples, layout.channels) for s in results]
    block_c = min(16, triton.next_power_of_2(layout.channels // layout.groups))
    small = {"SECOND": second, "H": h is not None, "BLOCK_C": block_c, "BLOCK_P": _SMALL // block_c}
    operands = sums, acc, t.weight, h_weight, means, *unsummed
    row_means[(layout.rows,)](*operands, *_by_row(tiles, layout), **small)
    _add_up(unsummed, results)
    return means


def _add_up(partial: list[Tensor | None], results: tuple[Tensor | None, Tensor | None]) -> None:
    for sums, result in zip(partial, results, strict=True):
        if sums is not None and result is not None:
            torch.sum(sums, 0, out=result.view(-1))


def _sizes(layout: Layout) -> tuple[int, int, int, int]:
    of_row = layout.channels // layout.groups
    return of_row * layout.inner, of_row, layout.inner, layout.groups


def _positions(layout: Layout) -> int:
    return layout.segments * layout.inner


def _by_row(tiles: tuple[int, int], layout: Layout) -> tuple[int, int, int, int]:
    return _positions(layout), tiles[1], layout.channels, layout.groups


def _tiled(layout: Layout) -> tuple[int, ...]:
    return layout.segments, layout.channels, layout.inner, layout.groups, *_strides(layout)


def _strides(layout: Layout) -> tuple[int, int, int, int]:
    """Return the strides of sample, channel, segment and position."""
    segment = layout.channels * layout.inner
    if layout.channels_last:
        return segment, 1, segment, layout.channels
    return layout.segments * segment, layout.inner, segment, 1


def _tile(x: Tensor, layout: Layout, most: int = _TILE) -> dict[str, Any]:
    """Return a tile of at most ``most`` elements.

    Lanes are adjacent in memory: over channels if these are last, otherwise over positions.
    """
    of_channels = min(64, triton.next_power_of_2(layout.channels))
    if not layout.channels_last:
        of_channels = min(of_channels, max(1, 32 // triton.next_power_of_2(layout.inner)))
    positions = min(most // of_channels, triton.next_power_of_2(layout.inner))
    segments = min(most // of_channels // positions, triton.next_power_of_2(layout.segments))
    size = of_channels * segments * positions
    return {
        "TILE_C": of_channels,
        "TILE_S": segments,
        "TILE_Q": positions,
        "INDEX": tl.int32 if layout.inner < 2**31 - 2 * _TILE else tl.int64,
        "DTYPE": DTYPES[x.dtype],
        "num_warps": max(1, min(8, size // 256)),
    }


def _tiles(x: Tensor, layout: Layout, tile: dict[str, Any], every: bool = False) -> tuple[int, int]:
    """Return the grid (tiles of channels of each sample, parts of their segments and positions).

    For sums, it has few programs, since their partial sums must be added. With ``every``, it covers all tiles.
    """
    tiles = triton.cdiv(layout.channels, tile["TILE_C"]) * layout.samples
    count = triton.cdiv(layout.segments, tile["TILE_S"]) * triton.cdiv(layout.inner, tile["TILE_Q"])
    if every:
        parts = min(triton.cdiv(count, 4), _LONGEST)
    else:
        programs = triton.cdiv(layout.samples * layout.channels * _positions(layout) * x.element_size(), _SHARE)
        parts = min(count, triton.cdiv(max(_PROGRAMS, min(programs, _MOST_SUMS)), tiles))
    return tiles, triton.cdiv(count, triton.cdiv(count, parts))  # without programs that have no tile
