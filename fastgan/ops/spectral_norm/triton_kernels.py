"""Spectral normalization of many weights in Triton: 2 n + 1 launches in the forward, two in the backward, for all.

A u-first iteration is s = W v, u = s / |s|, t = W^T u, v = t / |t|, and then sigma = u^T W v = t.v:
    _product  s = W v          a program handles a block of rows and stores its part of |s|^2
    _product  t = W^T s / |s|  a program handles a block of columns and stores its part of |t|^2
    _finish   W / sigma, u, v, sigma
v-first swaps the products. The backward is _inner_products, <G, W>, then _grad_weights,
G / sigma - (<G, W> / sigma^2) u v^T.

Bytes: the forward reads W 3 times and writes it once; the backward makes 3 reads and 1 write of that size. There are no
atomics, and every sum is added in a fixed order, so results are reproducible to the bit. The weights are passed as a
table of addresses, made in triton_plan.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.spectral_norm import triton_plan as plans
from fastgan.ops.spectral_norm.layout import Layout
from fastgan.ops.spectral_norm.triton_products import (
    ACROSS,
    ALONG,
    AT_CHUNK,
    AT_CHUNK_SUMS,
    AT_CHUNKS,
    AT_FORM,
    AT_GRAD,
    AT_INNER,
    AT_OF_T,
    AT_OUTER,
    AT_OUTPUT,
    AT_RESULT,
    AT_ROWS,
    AT_SAVED,
    AT_SUMS,
    AT_TILES,
    AT_U,
    AT_V,
    AT_VECTOR,
    AT_WEIGHT,
    BLOCK_OF_W,
    FIELDS,
    GENERAL,
    RUNS,
    SMALL_BLOCK,
    VECTORS,
    divide,
    multiple,
    pointer_of,
    tile_of_product,
)
from fastgan.ops.triton_language import DTYPES, device_of, rounded

_MAX_PARTS = tl.constexpr(plans.MAX_PARTS)
_WEIGHT_PART = tl.constexpr(plans.WEIGHT_PART)
_U_PART = tl.constexpr(plans.U_PART)


@triton.jit
def _total(sums, count):
    i = tl.arange(0, _MAX_PARTS)
    return tl.sum(tl.load(sums + i, mask=i < count, other=0.0), 0)


@triton.jit
def _inverse_norm(squared, EPS: tl.constexpr):
    return 1.0 / tl.maximum(tl.sqrt(squared), EPS)


@triton.jit
def _product(
    tiles_ptr,
    layers_ptr,
    scratch,
    OF_T: tl.constexpr,  # True: t = W^T u; False: s = W v
    STORED: tl.constexpr,  # True: read the caller's u or v; False: read the result of the previous launch
    WEIGHTED: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = scratch.dtype.element_ty
    HERE: tl.constexpr = AT_OF_T if OF_T else 0
    THERE: tl.constexpr = 0 if OF_T else AT_OF_T
    tile = tiles_ptr + 2 * tl.program_id(0)
    layer = layers_ptr + tl.load(tile) * FIELDS
    index = tl.load(tile + 1)
    result = scratch + tl.load(layer + HERE + AT_RESULT)
    if STORED:
        x = pointer_of(layer, AT_U if OF_T else AT_V, DTYPE, 1)
        scale = tl.full([], 1.0, ACC)
    else:
        x = scratch + tl.load(layer + THERE + AT_RESULT)
        sums = scratch + tl.load(layer + THERE + AT_SUMS)
        scale = _inverse_norm(_total(sums, tl.load(layer + THERE + AT_TILES)), EPS)
    form = tl.load(layer + HERE + AT_FORM)
    if form == ALONG:
        part = tile_of_product(layer, index, x, scale, result, ALONG, OF_T, WEIGHTED, DTYPE)
    elif form == ACROSS:
        part = tile_of_product(layer, index, x, scale, result, ACROSS, OF_T, WEIGHTED, DTYPE)
    elif form == VECTORS:
        part = tile_of_product(layer, index, x, scale, result, VECTORS, OF_T, WEIGHTED, DTYPE)
    elif not OF_T and form == RUNS:
        part = tile_of_product(layer, index, x, scale, result, RUNS, OF_T, WEIGHTED, DTYPE)
    else:
        part = tile_of_product(layer, index, x, scale, result, GENERAL, OF_T, WEIGHTED, DTYPE)
    tl.store(scratch + tl.load(layer + HERE + AT_SUMS) + index, part)


@triton.jit
def _divide_chunk(layer, index, scale, VEC: tl.constexpr, DTYPE: tl.constexpr):
    BLOCK: tl.constexpr = BLOCK_OF_W if VEC > 1 else SMALL_BLOCK
    weight = pointer_of(layer, AT_WEIGHT, DTYPE, VEC)
    output = pointer_of(layer, AT_OUTPUT, DTYPE, VEC)
    size = multiple(tl.load(layer + AT_OUTER) * tl.load(layer + AT_ROWS) * tl.load(layer + AT_INNER), VEC)
    chunk = tl.load(layer + AT_CHUNK)
    begin = multiple(index * chunk, BLOCK)
    for e0 in range(begin, tl.minimum(begin + chunk, size), BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        w = tl.load(weight + e, mask=e < size).to(scale.dtype)
        tl.store(output + e, rounded(w * scale, DTYPE), mask=e < size)


@triton.jit
def _keep(stored, saved, found, n, index, scale, ITERATED: tl.constexpr):
    """Update a block of u or v in place and save it for backward."""
    i = index * SMALL_BLOCK + tl.arange(0, SMALL_BLOCK)
    if ITERATED:
        x = tl.load(found + i, mask=i < n) * scale
        tl.store(stored + i, rounded(x, stored.dtype.element_ty), mask=i < n)
    else:
        x = tl.load(stored + i, mask=i < n).to(saved.dtype.element_ty)
    tl.store(saved + i, x, mask=i < n)


@triton.jit
def _finish(
    parts_ptr,
    layers_ptr,
    scratch,
    ITERATED: tl.constexpr,
    V_FIRST: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = scratch.dtype.element_ty
    LAST: tl.constexpr = 0 if V_FIRST or not ITERATED else AT_OF_T
    tile = parts_ptr + 3 * tl.program_id(0)
    layer = layers_ptr + tl.load(tile) * FIELDS
    part = tl.load(tile + 1)
    index = tl.load(tile + 2)
    sigma = _total(scratch + tl.load(layer + LAST + AT_SUMS), tl.load(layer + LAST + AT_TILES))
    if ITERATED:  # sigma = s.u = |s|^2 / |s|, or the same with t
        sigma *= _inverse_norm(sigma, EPS)
    if part == _WEIGHT_PART:
        if tl.load(layer + AT_VECTOR) != 0:
            _divide_chunk(layer, index, 1.0 / sigma, 128 // DTYPE.primitive_bitwidth, DTYPE)
        else:
            _divide_chunk(layer, index, 1.0 / sigma, 1, DTYPE)
    else:
        saved = pointer_of(layer, AT_SAVED, ACC, 1)
        rows = tl.load(layer + AT_ROWS)
        s = scratch + tl.load(layer + AT_RESULT)
        t = scratch + tl.load(layer + AT_OF_T + AT_RESULT)
        s_scale = sigma
        t_scale = sigma
        if ITERATED:
            s_scale = _inverse_norm(_total(scratch + tl.load(layer + AT_SUMS), tl.load(layer + AT_TILES)), EPS)
            t_sums = scratch + tl.load(layer + AT_OF_T + AT_SUMS)
            t_scale = _inverse_norm(_total(t_sums, tl.load(layer + AT_OF_T + AT_TILES)), EPS)
        if part == _U_PART:
            if index == 0:
                tl.store(saved, sigma)
            _keep(pointer_of(layer, AT_U, DTYPE, 1), saved + 1, s, rows, index, s_scale, ITERATED)
        else:
            columns = tl.load(layer + AT_OUTER) * tl.load(layer + AT_INNER)
            _keep(pointer_of(layer, AT_V, DTYPE, 1), saved + 1 + rows, t, columns, index, t_scale, ITERATED)


@triton.jit
def _inner_product(layer, index, VEC: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr):
    BLOCK: tl.constexpr = BLOCK_OF_W if VEC > 1 else SMALL_BLOCK
    weight = pointer_of(layer, AT_WEIGHT, DTYPE, VEC)
    grad = pointer_of(layer, AT_GRAD, DTYPE, VEC)
    size = multiple(tl.load(layer + AT_OUTER) * tl.load(layer + AT_ROWS) * tl.load(layer + AT_INNER), VEC)
    chunk = tl.load(layer + AT_CHUNK)
    begin = multiple(index * chunk, BLOCK)
    total = tl.zeros([BLOCK], ACC)
    for e0 in range(begin, tl.minimum(begin + chunk, size), BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        w = tl.load(weight + e, mask=e < size, other=0.0).to(ACC)
        total += w * tl.load(grad + e, mask=e < size, other=0.0).to(ACC)
    return tl.sum(total, 0)


@triton.jit
def _inner_products(chunks_ptr, layers_ptr, scratch, DTYPE: tl.constexpr):
    ACC: tl.constexpr = scratch.dtype.element_ty
    tile = chunks_ptr + 2 * tl.program_id(0)
    layer = layers_ptr + tl.load(tile) * FIELDS
    index = tl.load(tile + 1)
    if tl.load(layer + AT_VECTOR) != 0:
        part = _inner_product(layer, index, 128 // DTYPE.primitive_bitwidth, DTYPE, ACC)
    else:
        part = _inner_product(layer, index, 1, DTYPE, ACC)
    tl.store(scratch + tl.load(layer + AT_CHUNK_SUMS) + index, part)


@triton.jit
def _grad_chunk(layer, index, scale, rank_one, VEC: tl.constexpr, DTYPE: tl.constexpr):
    """Process elements in groups of VEC within a line of ``inner``. Row and column are computed once per group."""
    ACC: tl.constexpr = scale.dtype
    GROUPS: tl.constexpr = BLOCK_OF_W // VEC if VEC > 1 else SMALL_BLOCK
    grad = pointer_of(layer, AT_GRAD, DTYPE, VEC)
    output = pointer_of(layer, AT_OUTPUT, DTYPE, VEC)
    u = pointer_of(layer, AT_SAVED, ACC, 1) + 1
    rows = tl.load(layer + AT_ROWS)
    inner = tl.load(layer + AT_INNER)
    v = u + rows
    line_groups = inner // VEC
    groups = tl.load(layer + AT_OUTER) * rows * line_groups
    chunk = tl.load(layer + AT_CHUNK) // VEC
    begin = index * chunk
    for g0 in range(begin, tl.minimum(begin + chunk, groups), GROUPS):
        group = g0 + tl.arange(0, GROUPS)
        line0 = g0 // line_groups
        outer0 = line0 // rows
        within = (g0 - line0 * line_groups).to(tl.int32) + tl.arange(0, GROUPS)
        lines, within = divide(within, line_groups)
        outers, row = divide((line0 - outer0 * rows).to(tl.int32) + lines, rows)
        lane = tl.arange(0, VEC)[None, :]
        column = ((outer0 + outers) * inner + within * VEC)[:, None] + lane
        at = (group * VEC)[:, None] + lane
        inside = (group < groups)[:, None]
        u_r = tl.load(u + row, mask=group < groups)[:, None]
        v_c = tl.load(v + column, mask=inside)
        g = tl.load(grad + at, mask=inside).to(ACC)
        tl.store(output + at, rounded(g * scale + rank_one * u_r * v_c, DTYPE), mask=inside)


@triton.jit
def _grad_weights(chunks_ptr, layers_ptr, scratch, DTYPE: tl.constexpr):
    WIDE: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    tile = chunks_ptr + 2 * tl.program_id(0)
    layer = layers_ptr + tl.load(tile) * FIELDS
    index = tl.load(tile + 1)
    product = _total(scratch + tl.load(layer + AT_CHUNK_SUMS), tl.load(layer + AT_CHUNKS))
    scale = 1.0 / tl.load(pointer_of(layer, AT_SAVED, scratch.dtype.element_ty, 1))
    rank_one = -product * scale * scale
    if (tl.load(layer + AT_VECTOR) != 0) & (tl.load(layer + AT_INNER) % WIDE == 0):
        _grad_chunk(layer, index, scale, rank_one, WIDE, DTYPE)
    else:
        _grad_chunk(layer, index, scale, rank_one, 1, DTYPE)


# For ahead-of-time compilation: each launched kernel, its pointers ("*A" points to the accumulation dtype) and the
# combinations of its constants, without DTYPE, the dtype of the weights.
AOT: list[tuple[Any, dict[str, str], list[dict[str, Any]]]] = [
    (
        _product,
        {"tiles_ptr": "*i64", "layers_ptr": "*i64", "scratch": "*A"},
        [
            {"OF_T": of_t, "STORED": stored, "WEIGHTED": weighted, "EPS": 1e-12}
            for of_t, stored, weighted in (
                (False, True, False),
                (False, False, False),
                (False, True, True),
                (True, True, False),
                (True, False, False),
            )
        ],
    ),
    (
        _finish,
        {"parts_ptr": "*i64", "layers_ptr": "*i64", "scratch": "*A"},
        [
            {"ITERATED": iterated, "V_FIRST": v_first, "EPS": 1e-12}
            for iterated, v_first in ((True, False), (True, True), (False, False))
        ],
    ),
    (_inner_products, {"chunks_ptr": "*i64", "layers_ptr": "*i64", "scratch": "*A"}, [{}]),
    (_grad_weights, {"chunks_ptr": "*i64", "layers_ptr": "*i64", "scratch": "*A"}, [{}]),
]


def forward(
    weights: Sequence[Tensor],
    outputs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    saved: Tensor,
    layout: Layout,
    n_power_iterations: int,
    eps: float,
    v_first: bool,
) -> None:
    plan = _plan_of(layout, weights, outputs)
    addresses = _addresses(layout, saved, weights, outputs, us, vs, None)
    scratch = saved.new_empty(plan.scratch)
    dtype = DTYPES[weights[0].dtype]

    def product(*, of_t: bool, stored: bool, weighted: bool = False) -> None:
        tiles = plan.t_tiles if of_t else plan.s_tiles
        constants: dict[str, Any] = {"OF_T": of_t, "STORED": stored, "WEIGHTED": weighted, "EPS": eps, "DTYPE": dtype}
        # With fewer registers, the compiler lets a thread wait for each of its loads of W before the next.
        options = {"maxnreg": 128} if of_t and torch.version.hip is None else {}
        _product[(len(tiles),)](tiles, layers, scratch, **constants, **options)

    with device_of(saved):
        layers = plans.table_of(plan, addresses, saved.device, weights)
        if n_power_iterations == 0:
            product(of_t=False, stored=True, weighted=True)
        for i in range(n_power_iterations):
            product(of_t=v_first, stored=i == 0)
            product(of_t=not v_first, stored=False)
        constants = {"ITERATED": n_power_iterations > 0, "V_FIRST": v_first, "EPS": eps, "DTYPE": dtype}
        _finish[(len(plan.parts),)](plan.parts, layers, scratch, **constants)


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Tensor,
    layout: Layout,
) -> None:
    plan = _plan_of(layout, weights, outputs, grads)
    addresses = _addresses(layout, saved, weights, outputs, None, None, grads)
    scratch = saved.new_empty(plan.chunk_sums)
    dtype = DTYPES[weights[0].dtype]
    with device_of(saved):
        layers = plans.table_of(plan, addresses, saved.device, weights)
        _inner_products[(len(plan.chunks),)](plan.chunks, layers, scratch, DTYPE=dtype)
        _grad_weights[(len(plan.chunks),)](plan.chunks_back, layers, scratch, DTYPE=dtype)


def _plan_of(layout: Layout, *tensors: Sequence[Tensor]) -> plans.Plan:
    aligned = tuple([all(t.data_ptr() % 16 == 0 for t in those) for those in zip(*tensors, strict=True)])
    first = tensors[0][0]
    return plans.plan_of(layout.matrices, aligned, first.element_size(), first.device)


def _addresses(
    layout: Layout,
    saved: Tensor,
    weights: Sequence[Tensor],
    outputs: Sequence[Tensor],
    us: Sequence[Tensor] | None,
    vs: Sequence[Tensor] | None,
    grads: Sequence[Tensor] | None,
) -> tuple[plans.Addresses, ...]:
    lists = (weights, outputs, us, vs, grads)
    w, o, u, v, g = ([0] * len(weights) if ts is None else [t.data_ptr() for t in ts] for ts in lists)
    base, size = saved.data_ptr(), saved.element_size()
    return tuple(zip(w, o, u, v, [base + at * size for at in layout.offsets], g, strict=True))
