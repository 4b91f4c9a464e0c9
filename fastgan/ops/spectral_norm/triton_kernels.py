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
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.backends import TRITON_INTERPRETS
from fastgan.ops.spectral_norm import triton_plan as plans
from fastgan.ops.spectral_norm.layout import Layout


def _field(name: str) -> tl.constexpr:
    return tl.constexpr(plans.FIELDS.index(name))


_WEIGHT, _OUTPUT, _U, _V, _SAVED, _GRAD = map(_field, ("weight", "output", "u", "v", "saved", "grad"))
_OUTER, _ROWS, _INNER = map(_field, ("outer", "rows", "inner"))
_CHUNK, _CHUNKS, _CHUNK_SUMS, _VECTOR = map(_field, ("chunk", "chunks", "chunk_sums", "vector"))
_FORM, _SPAN, _TILES, _RESULT, _SUMS = map(_field, ("s_form", "s_span", "s_tiles", "s", "s_sums"))
_OF_T = tl.constexpr(plans.FIELDS.index("t_form") - plans.FIELDS.index("s_form"))  # from a field of s to that of t
_FIELDS = tl.constexpr(len(plans.FIELDS))

_INTERPRETED = tl.constexpr(TRITON_INTERPRETS)
_BLOCK = tl.constexpr(plans.BLOCK)
_SMALL_BLOCK = tl.constexpr(plans.SMALL_BLOCK)
_MAX_PARTS = tl.constexpr(plans.MAX_PARTS)
_GENERAL = tl.constexpr(plans.GENERAL)
_ALONG = tl.constexpr(plans.ALONG)
_ACROSS = tl.constexpr(plans.ACROSS)
_RUNS = tl.constexpr(plans.RUNS)
_WEIGHT_PART = tl.constexpr(plans.WEIGHT_PART)
_U_PART = tl.constexpr(plans.U_PART)


@triton.jit
def _pointer(layer, FIELD: tl.constexpr, DTYPE: tl.constexpr, VEC: tl.constexpr):
    # The alignment hint belongs to the cast, so code that assumes no alignment needs a cast of its own.
    pointer = tl.load(layer + FIELD).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if VEC > 1 else pointer


@triton.jit
def _multiple(x, VEC: tl.constexpr):
    # x is a multiple of VEC. This form tells the compiler.
    return x // VEC * VEC


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        # Triton's interpreter truncates to bfloat16 where hardware rounds to the nearest.
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _divide(x, by):
    """Return quotient and remainder, in 32 bits."""
    quotient = x // by.to(tl.int32)
    return quotient, x - quotient * by.to(tl.int32)


@triton.jit
def _total(sums, count):
    i = tl.arange(0, _MAX_PARTS)
    return tl.sum(tl.load(sums + i, mask=i < count, other=0.0), 0)


@triton.jit
def _inverse_norm(squared, EPS: tl.constexpr):
    return 1.0 / tl.maximum(tl.sqrt(squared), EPS)


@triton.jit
def _dot(weight, x, i, ni, nj, rows, inner, FORM: tl.constexpr, OF_T: tl.constexpr, ACC: tl.constexpr):
    """Return the sum over j of W[i, j] x[j] for a block of i. W is transposed if OF_T."""
    BJ: tl.constexpr = (_SMALL_BLOCK if FORM <= _RUNS else _BLOCK) // i.shape[0]
    acc = tl.zeros([i.shape[0], BJ], ACC)
    for j0 in range(0, nj, BJ):
        j = j0 + tl.arange(0, BJ)
        x_j = tl.load(x + j, mask=j < nj, other=0.0).to(ACC)
        if FORM == _ALONG:
            at = i[:, None] * nj + j[None, :]
        elif FORM == _ACROSS:
            at = i[:, None] + j[None, :] * ni
        else:
            outer, k = _divide((i if OF_T else j).to(tl.int32), inner)
            column = outer * (rows * inner) + k
            at = column[:, None] + (j * inner)[None, :] if OF_T else (i * inner)[:, None] + column[None, :]
        w = tl.load(weight + at, mask=(i < ni)[:, None] & (j < nj)[None, :], other=0.0)
        acc += w.to(ACC) * x_j[None, :]
    return tl.sum(acc, 1)


@triton.jit
def _tile(
    layer,
    index,
    x,
    scale,
    result,
    FORM: tl.constexpr,
    OF_T: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write one tile of s or t to ``result`` and return its part of the sum of squares (WEIGHTED: of u.s)."""
    ACC: tl.constexpr = result.dtype.element_ty
    WIDE: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    VEC: tl.constexpr = 1 if FORM <= _RUNS else WIDE
    BI: tl.constexpr = 32 if FORM == _GENERAL else 8 * WIDE if FORM == _ACROSS else 4
    weight = _pointer(layer, _WEIGHT, DTYPE, VEC)
    u = _pointer(layer, _U, DTYPE, 1)
    rows = tl.load(layer + _ROWS)
    inner = tl.load(layer + _INNER)
    columns = tl.load(layer + _OUTER) * inner
    ni = columns if OF_T else rows
    nj = rows if OF_T else columns
    if FORM == _ALONG:
        nj = _multiple(nj, VEC)
    if FORM == _ACROSS:
        ni = _multiple(ni, VEC)
    span = tl.load(layer + (_OF_T if OF_T else 0) + _SPAN)
    begin = _multiple(index * span, BI)
    total = tl.zeros([BI], ACC)
    for i0 in range(begin, tl.minimum(begin + span, ni), BI):
        i = i0 + tl.arange(0, BI)
        y = _dot(weight, x, i, ni, nj, rows, inner, FORM, OF_T, ACC) * scale
        tl.store(result + i, y, mask=i < ni)
        if WEIGHTED:
            total += y * tl.load(u + i, mask=i < ni, other=0.0).to(ACC)
        else:
            total += y * y
    return tl.sum(total, 0)


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
    HERE: tl.constexpr = _OF_T if OF_T else 0
    THERE: tl.constexpr = 0 if OF_T else _OF_T
    tile = tiles_ptr + 2 * tl.program_id(0)
    layer = layers_ptr + tl.load(tile) * _FIELDS
    index = tl.load(tile + 1)
    result = scratch + tl.load(layer + HERE + _RESULT)
    if STORED:
        x = _pointer(layer, _U if OF_T else _V, DTYPE, 1)
        scale = tl.full([], 1.0, ACC)
    else:
        x = scratch + tl.load(layer + THERE + _RESULT)
        sums = scratch + tl.load(layer + THERE + _SUMS)
        scale = _inverse_norm(_total(sums, tl.load(layer + THERE + _TILES)), EPS)
    form = tl.load(layer + HERE + _FORM)
    if form == _ALONG:
        part = _tile(layer, index, x, scale, result, _ALONG, OF_T, WEIGHTED, DTYPE)
    elif form == _ACROSS:
        part = _tile(layer, index, x, scale, result, _ACROSS, OF_T, WEIGHTED, DTYPE)
    elif not OF_T and form == _RUNS:
        part = _tile(layer, index, x, scale, result, _RUNS, OF_T, WEIGHTED, DTYPE)
    else:
        part = _tile(layer, index, x, scale, result, _GENERAL, OF_T, WEIGHTED, DTYPE)
    tl.store(scratch + tl.load(layer + HERE + _SUMS) + index, part)


@triton.jit
def _divide_chunk(layer, index, scale, VEC: tl.constexpr, DTYPE: tl.constexpr):
    BLOCK: tl.constexpr = _BLOCK if VEC > 1 else _SMALL_BLOCK
    weight = _pointer(layer, _WEIGHT, DTYPE, VEC)
    output = _pointer(layer, _OUTPUT, DTYPE, VEC)
    size = _multiple(tl.load(layer + _OUTER) * tl.load(layer + _ROWS) * tl.load(layer + _INNER), VEC)
    chunk = tl.load(layer + _CHUNK)
    begin = _multiple(index * chunk, BLOCK)
    for e0 in range(begin, tl.minimum(begin + chunk, size), BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        w = tl.load(weight + e, mask=e < size).to(scale.dtype)
        tl.store(output + e, _rounded(w * scale, DTYPE), mask=e < size)


@triton.jit
def _keep(stored, saved, found, n, index, scale, ITERATED: tl.constexpr):
    """Update a block of u or v in place and save it for backward."""
    i = index * _SMALL_BLOCK + tl.arange(0, _SMALL_BLOCK)
    if ITERATED:
        x = tl.load(found + i, mask=i < n) * scale
        tl.store(stored + i, _rounded(x, stored.dtype.element_ty), mask=i < n)
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
    LAST: tl.constexpr = 0 if V_FIRST or not ITERATED else _OF_T
    tile = parts_ptr + 3 * tl.program_id(0)
    layer = layers_ptr + tl.load(tile) * _FIELDS
    part = tl.load(tile + 1)
    index = tl.load(tile + 2)
    sigma = _total(scratch + tl.load(layer + LAST + _SUMS), tl.load(layer + LAST + _TILES))
    if ITERATED:  # sigma = s.u = |s|^2 / |s|, or the same with t
        sigma *= _inverse_norm(sigma, EPS)
    if part == _WEIGHT_PART:
        if tl.load(layer + _VECTOR) != 0:
            _divide_chunk(layer, index, 1.0 / sigma, 128 // DTYPE.primitive_bitwidth, DTYPE)
        else:
            _divide_chunk(layer, index, 1.0 / sigma, 1, DTYPE)
    else:
        saved = _pointer(layer, _SAVED, ACC, 1)
        rows = tl.load(layer + _ROWS)
        s = scratch + tl.load(layer + _RESULT)
        t = scratch + tl.load(layer + _OF_T + _RESULT)
        s_scale = sigma
        t_scale = sigma
        if ITERATED:
            s_scale = _inverse_norm(_total(scratch + tl.load(layer + _SUMS), tl.load(layer + _TILES)), EPS)
            t_sums = scratch + tl.load(layer + _OF_T + _SUMS)
            t_scale = _inverse_norm(_total(t_sums, tl.load(layer + _OF_T + _TILES)), EPS)
        if part == _U_PART:
            if index == 0:
                tl.store(saved, sigma)
            _keep(_pointer(layer, _U, DTYPE, 1), saved + 1, s, rows, index, s_scale, ITERATED)
        else:
            columns = tl.load(layer + _OUTER) * tl.load(layer + _INNER)
            _keep(_pointer(layer, _V, DTYPE, 1), saved + 1 + rows, t, columns, index, t_scale, ITERATED)


@triton.jit
def _inner_product(layer, index, VEC: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr):
    BLOCK: tl.constexpr = _BLOCK if VEC > 1 else _SMALL_BLOCK
    weight = _pointer(layer, _WEIGHT, DTYPE, VEC)
    grad = _pointer(layer, _GRAD, DTYPE, VEC)
    size = _multiple(tl.load(layer + _OUTER) * tl.load(layer + _ROWS) * tl.load(layer + _INNER), VEC)
    chunk = tl.load(layer + _CHUNK)
    begin = _multiple(index * chunk, BLOCK)
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
    layer = layers_ptr + tl.load(tile) * _FIELDS
    index = tl.load(tile + 1)
    if tl.load(layer + _VECTOR) != 0:
        part = _inner_product(layer, index, 128 // DTYPE.primitive_bitwidth, DTYPE, ACC)
    else:
        part = _inner_product(layer, index, 1, DTYPE, ACC)
    tl.store(scratch + tl.load(layer + _CHUNK_SUMS) + index, part)


@triton.jit
def _grad_chunk(layer, index, scale, rank_one, VEC: tl.constexpr, DTYPE: tl.constexpr):
    """Process elements in groups of VEC within a line of ``inner``. Row and column are computed once per group."""
    ACC: tl.constexpr = scale.dtype
    GROUPS: tl.constexpr = _BLOCK // VEC if VEC > 1 else _SMALL_BLOCK
    grad = _pointer(layer, _GRAD, DTYPE, VEC)
    output = _pointer(layer, _OUTPUT, DTYPE, VEC)
    u = _pointer(layer, _SAVED, ACC, 1) + 1
    rows = tl.load(layer + _ROWS)
    inner = tl.load(layer + _INNER)
    v = u + rows
    line_groups = inner // VEC
    groups = tl.load(layer + _OUTER) * rows * line_groups
    chunk = tl.load(layer + _CHUNK) // VEC
    begin = index * chunk
    for g0 in range(begin, tl.minimum(begin + chunk, groups), GROUPS):
        group = g0 + tl.arange(0, GROUPS)
        line0 = g0 // line_groups
        outer0 = line0 // rows
        within = (g0 - line0 * line_groups).to(tl.int32) + tl.arange(0, GROUPS)
        lines, within = _divide(within, line_groups)
        outers, row = _divide((line0 - outer0 * rows).to(tl.int32) + lines, rows)
        lane = tl.arange(0, VEC)[None, :]
        column = ((outer0 + outers) * inner + within * VEC)[:, None] + lane
        at = (group * VEC)[:, None] + lane
        inside = (group < groups)[:, None]
        u_r = tl.load(u + row, mask=group < groups)[:, None]
        v_c = tl.load(v + column, mask=inside)
        g = tl.load(grad + at, mask=inside).to(ACC)
        tl.store(output + at, _rounded(g * scale + rank_one * u_r * v_c, DTYPE), mask=inside)


@triton.jit
def _grad_weights(chunks_ptr, layers_ptr, scratch, DTYPE: tl.constexpr):
    WIDE: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    tile = chunks_ptr + 2 * tl.program_id(0)
    layer = layers_ptr + tl.load(tile) * _FIELDS
    index = tl.load(tile + 1)
    product = _total(scratch + tl.load(layer + _CHUNK_SUMS), tl.load(layer + _CHUNKS))
    scale = 1.0 / tl.load(_pointer(layer, _SAVED, scratch.dtype.element_ty, 1))
    rank_one = -product * scale * scale
    if (tl.load(layer + _VECTOR) != 0) & (tl.load(layer + _INNER) % WIDE == 0):
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

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


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
    dtype = _TYPES[weights[0].dtype]

    def product(*, of_t: bool, stored: bool, weighted: bool = False) -> None:
        tiles = plan.t_tiles if of_t else plan.s_tiles
        constants = {"OF_T": of_t, "STORED": stored, "WEIGHTED": weighted, "EPS": eps, "DTYPE": dtype}
        _product[(len(tiles),)](tiles, layers, scratch, **constants)

    with _on(saved.device):
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
    dtype = _TYPES[weights[0].dtype]
    with _on(saved.device):
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


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
