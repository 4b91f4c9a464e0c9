"""Minibatch standard deviation in Triton. The formulas and their derivation are in csrc/cpu/minibatch_stddev.cpp.

    _forward           copies x and sums s; a program handles a tile of values of one group and block of channels
    _append            adds the sums of these programs and writes them after the values of each sample: y, or by_dy
    _slopes            a; one program per group and block
    _backward          dx, from dy, x and a
    _double_backward   by_x, the values of by_dy, and the sums of r q

Bytes: each operand is read once, and each result is written once. A tile of all members of a group stays in registers;
if a group has more than _MEMBERS members, the tile is read again from L1. Each program leaves a partial sum, and the
partial sums are added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.library import accumulation_dtype
from fastgan.ops.minibatch_stddev.layout import Layout
from fastgan.ops.triton_language import DTYPES, addresses, device_of, rounded, typed

_MEMBERS = 16  # members held in registers at a time
_TILE = 2048  # values of all these members together
_BYTES = 8192  # of a tile of one row: a thread has all of up to 4 members in 16-byte loads, and no sum leaves it
_BLOCK = 1024


@triton.jit
def _tile(groups, outer, features, run, tail, MANY_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the offsets of this program's values for the first member, in tensors without and with statistics.

    Also return the distance to the next member in both, the mask of valid values, and the slot of group and block.
    """
    count = tl.cast(outer, tl.int64) * run
    parts = tl.cdiv(count, BLOCK)
    slot = tl.program_id(0) // parts
    feature = slot % features
    first = tl.program_id(0) % parts * BLOCK
    p = first + tl.arange(0, BLOCK)
    inside = p < count
    row = tl.zeros([BLOCK], tl.int64)
    if MANY_ROWS:
        row0 = first // run
        within = (first - row0 * run).to(tl.int32) + tl.arange(0, BLOCK)  # divided in 32 bits
        row = row0 + within // run
        p = (within % run).to(tl.int64)
    narrow = (slot // features * outer + row) * features * run + feature * run + p
    if MANY_ROWS:
        # A row of the result is not a multiple of 16 bytes. Threads read the values that they write, so that none move.
        narrow = tl.max_contiguous(narrow, [1])
    wide = (slot // features * outer + row) * features * (run + tail) + feature * run + p
    rows = tl.cast(groups, tl.int64) * outer * features
    return narrow, wide, rows * run, rows * (run + tail), inside, slot


@triton.jit
def _mean(x_ptr, narrow, step, inside, SIZE: tl.constexpr, MEMBERS: tl.constexpr, ACC: tl.constexpr):
    total = tl.zeros([narrow.shape[0]], ACC)
    for first in range(0, SIZE, MEMBERS):
        g = first + tl.arange(0, MEMBERS)[:, None]
        total += tl.sum(tl.load(x_ptr + g * step + narrow, mask=(g < SIZE) & inside, other=0.0).to(ACC), 0)
    near = total / SIZE  # approximate: a GPU divides by its inexact reciprocal
    rest = tl.zeros([narrow.shape[0]], ACC)
    for first in range(0, SIZE, MEMBERS):
        g = first + tl.arange(0, MEMBERS)[:, None]
        real = (g < SIZE) & inside
        rest += tl.sum(tl.where(real, tl.load(x_ptr + g * step + narrow, mask=real, other=0.0).to(ACC) - near, 0.0), 0)
    return near + rest / SIZE  # exact enough that equal samples have zero deviation


@triton.jit
def _moments(
    x_ptr, narrow, step, inside, EPS: tl.constexpr, SIZE: tl.constexpr, MEMBERS: tl.constexpr, ACC: tl.constexpr
):
    """Return <x> and <z^2> + eps."""
    mean = _mean(x_ptr, narrow, step, inside, SIZE, MEMBERS, ACC)
    squares = tl.zeros([narrow.shape[0]], ACC)
    for first in range(0, SIZE, MEMBERS):
        g = first + tl.arange(0, MEMBERS)[:, None]
        real = (g < SIZE) & inside
        z = tl.where(real, tl.load(x_ptr + g * step + narrow, mask=real, other=0.0).to(ACC) - mean, 0.0)
        squares += tl.sum(z * z, 0)
    return mean, squares / SIZE + EPS


@triton.jit
def _forward(
    x_ptr,
    y_ptr,
    sums_ptr,
    groups,
    outer,
    features,
    run,
    tail,
    MANY_ROWS: tl.constexpr,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    x = typed(x_ptr, DTYPE)
    y = typed(y_ptr, DTYPE)
    narrow, wide, step, wide_step, inside, _ = _tile(groups, outer, features, run, tail, MANY_ROWS, BLOCK)
    _, variance = _moments(x, narrow, step, inside, EPS, SIZE, MEMBERS, ACC)
    for first in range(0, SIZE, MEMBERS):
        g = first + tl.arange(0, MEMBERS)[:, None]
        real = (g < SIZE) & inside
        tl.store(y + g * wide_step + wide, tl.load(x + g * step + narrow, mask=real), mask=real)
    sum = tl.sum(tl.where(inside, tl.sqrt(variance), 0.0), 0)
    tl.store(sums_ptr + tl.program_id(0), sum)


@triton.jit
def _append(
    sums_ptr,
    to_ptr,
    groups,
    outer,
    features,
    run,
    tail,
    parts,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    n = (tl.program_id(0) // features).to(tl.int64)
    feature = tl.program_id(0) % features
    slot = n % groups * features + feature
    total = tl.zeros([BLOCK], ACC)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + slot * parts + part, mask=part < parts, other=0.0)
    value = tl.full([BLOCK], tl.sum(total, 0) / (tl.cast(outer, tl.int64) * run).to(ACC), ACC)
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = (n * outer + i // tail) * features * (run + tail) + features * run + feature * tail + i % tail
    tl.store(typed(to_ptr, DTYPE) + at, rounded(value, DTYPE), mask=i < tl.cast(outer, tl.int64) * tail)


@triton.jit
def _slopes(
    dy_ptr,
    slope_ptr,
    groups,
    outer,
    features,
    run,
    tail,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = slope_ptr.dtype.element_ty
    slot = tl.program_id(0).to(tl.int64)
    count = tl.cast(outer, tl.int64) * tail
    total = tl.zeros([BLOCK], ACC)
    for first in range(0, SIZE * count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        n = i // count * groups + slot // features
        row = n * outer + i % count // tail
        at = row * features * (run + tail) + features * run + slot % features * tail + i % tail
        total += tl.load(typed(dy_ptr, DTYPE) + at, mask=i < SIZE * count, other=0.0).to(ACC)
    tl.store(slope_ptr + slot, tl.sum(total, 0) / (tl.cast(outer, tl.int64) * run * SIZE).to(ACC))


@triton.jit
def _backward(
    dy_ptr,
    x_ptr,
    dx_ptr,
    slope_ptr,
    groups,
    outer,
    features,
    run,
    tail,
    MANY_ROWS: tl.constexpr,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = slope_ptr.dtype.element_ty
    dy = typed(dy_ptr, DTYPE)
    x = typed(x_ptr, DTYPE)
    dx = typed(dx_ptr, DTYPE)
    narrow, wide, step, wide_step, inside, slot = _tile(groups, outer, features, run, tail, MANY_ROWS, BLOCK)
    mean, variance = _moments(x, narrow, step, inside, EPS, SIZE, MEMBERS, ACC)
    factor = tl.load(slope_ptr + slot) / tl.sqrt(variance)
    for first in range(0, SIZE, MEMBERS):
        g = first + tl.arange(0, MEMBERS)[:, None]
        real = (g < SIZE) & inside
        z = tl.load(x + g * step + narrow, mask=real, other=0.0).to(ACC) - mean
        result = tl.load(dy + g * wide_step + wide, mask=real, other=0.0).to(ACC) + factor * z
        tl.store(dx + g * step + narrow, rounded(result, DTYPE), mask=real)


@triton.jit
def _double_backward(
    h_ptr,
    x_ptr,
    slope_ptr,
    by_dy_ptr,
    by_x_ptr,
    sums_ptr,
    groups,
    outer,
    features,
    run,
    tail,
    MANY_ROWS: tl.constexpr,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = slope_ptr.dtype.element_ty
    h = typed(h_ptr, DTYPE)
    x = typed(x_ptr, DTYPE)
    narrow, wide, step, wide_step, inside, slot = _tile(groups, outer, features, run, tail, MANY_ROWS, BLOCK)
    mean, variance = _moments(x, narrow, step, inside, EPS, SIZE, MEMBERS, ACC)
    h_mean = _mean(h, narrow, step, inside, SIZE, MEMBERS, ACC)
    products = tl.zeros([BLOCK], ACC)
    for first in range(0, SIZE, MEMBERS):
        g = first + tl.arange(0, MEMBERS)[:, None]
        real = (g < SIZE) & inside
        z = tl.load(x + g * step + narrow, mask=real, other=0.0).to(ACC) - mean
        grad = tl.load(h + g * step + narrow, mask=real, other=0.0).to(ACC) - h_mean
        products += tl.sum(tl.where(real, grad * z, 0.0), 0)
    q = products / SIZE
    r = 1.0 / tl.sqrt(variance)
    if by_x_ptr is not None:
        factor = r * tl.load(slope_ptr + slot)
        by_x = typed(by_x_ptr, DTYPE)
        for first in range(0, SIZE, MEMBERS):
            g = first + tl.arange(0, MEMBERS)[:, None]
            real = (g < SIZE) & inside
            z = tl.load(x + g * step + narrow, mask=real, other=0.0).to(ACC) - mean
            grad = tl.load(h + g * step + narrow, mask=real, other=0.0).to(ACC) - h_mean
            tl.store(by_x + g * step + narrow, rounded(factor * (grad - q / variance * z), DTYPE), mask=real)
    if by_dy_ptr is not None:
        by_dy = typed(by_dy_ptr, DTYPE)
        for first in range(0, SIZE, MEMBERS):
            g = first + tl.arange(0, MEMBERS)[:, None]
            real = (g < SIZE) & inside
            tl.store(by_dy + g * wide_step + wide, tl.load(h + g * step + narrow, mask=real), mask=real)
        tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.where(inside, r * q, 0.0), 0))


_SIZES = dict.fromkeys(("groups", "outer", "features", "run", "tail"), "i32")
_FOUR = {"MANY_ROWS": False, "EPS": 1e-8, "SIZE": 4, "MEMBERS": 4, "BLOCK": 512}
# A launch specializes sizes of 1 as constants.
_ONES = {"groups": 1, "outer": 1, "features": 1, "run": 1, "tail": 1}
_ONE = {**_FOUR, **_ONES}
_MANY = {"MANY_ROWS": True, "EPS": 1e-8, "SIZE": 33, "MEMBERS": 16, "BLOCK": 128}

# For ahead-of-time compilation: each launched kernel, its arguments ("*A" points to the accumulation dtype) and the
# combinations of its constants, without DTYPE, the dtype of the input.
AOT: list[tuple[Any, dict[str, str], list[dict[str, Any]]]] = [
    (_forward, addresses("x", "y", "sums") | _SIZES, [_FOUR, _ONE, _MANY]),
    (_append, addresses("sums", "to") | _SIZES | {"parts": "i32"}, [{"BLOCK": _BLOCK}, {"BLOCK": _BLOCK, **_ONES}]),
    (_slopes, addresses("dy", "slope") | _SIZES, [{"SIZE": 4, "BLOCK": _BLOCK}, {"SIZE": 4, "BLOCK": _BLOCK, **_ONES}]),
    (_backward, addresses("dy", "x", "dx", "slope") | _SIZES, [_FOUR, _MANY]),
    (
        _double_backward,
        addresses("h", "x", "slope", "by_dy", "by_x", "sums") | _SIZES,
        [_FOUR, {**_MANY, "by_dy_ptr": None, "sums_ptr": None}, {**_ONE, "by_x_ptr": None}],
    ),
]


def forward(x: Tensor, y: Tensor, layout: Layout, eps: float) -> None:
    grid, constants = _plan(x, layout, eps)
    sums = x.new_empty(grid, dtype=accumulation_dtype(x.dtype))
    with device_of(x):
        _forward[grid](x, y, sums, *_sizes(layout), **constants)
        _append_sums(sums, y, layout, constants["DTYPE"])


def backward(dy: Tensor, x: Tensor, dx: Tensor, slope: Tensor, layout: Layout, eps: float) -> None:
    grid, constants = _plan(x, layout, eps)
    with device_of(x):
        of_slope = {"SIZE": layout.size, "BLOCK": _BLOCK, "DTYPE": constants["DTYPE"]}
        _slopes[(slope.numel(),)](dy, slope, *_sizes(layout), **of_slope)
        _backward[grid](dy, x, dx, slope, *_sizes(layout), **constants)


def double_backward(
    h: Tensor, x: Tensor, slope: Tensor, by_dy: Tensor | None, by_x: Tensor | None, layout: Layout, eps: float
) -> None:
    grid, constants = _plan(x, layout, eps)
    sums = None if by_dy is None else slope.new_empty(grid)
    with device_of(x):
        _double_backward[grid](h, x, slope, by_dy, by_x, sums, *_sizes(layout), **constants)
        if sums is not None and by_dy is not None:
            _append_sums(sums, by_dy, layout, constants["DTYPE"])


def _append_sums(sums: Tensor, to: Tensor, layout: Layout, dtype: Any) -> None:
    samples, parts = layout.groups * layout.size, sums.numel() // (layout.groups * layout.features)
    grid = samples * layout.features, triton.cdiv(layout.outer * layout.tail, _BLOCK)
    _append[grid](sums, to, *_sizes(layout), parts, BLOCK=_BLOCK, DTYPE=dtype)


def _plan(x: Tensor, layout: Layout, eps: float) -> tuple[tuple[int], dict[str, Any]]:
    members = min(_MEMBERS, triton.next_power_of_2(layout.size))
    block = (_TILE if layout.outer > 1 else _BYTES // x.element_size()) // members
    constants = {"MANY_ROWS": layout.outer > 1, "EPS": eps, "SIZE": layout.size, "MEMBERS": members, "BLOCK": block}
    parts = triton.cdiv(layout.outer * layout.run, block)
    return (layout.groups * layout.features * parts,), constants | {"DTYPE": DTYPES[x.dtype]}


def _sizes(layout: Layout) -> tuple[int, int, int, int, int]:
    return layout.groups, layout.outer, layout.features, layout.run, layout.tail
