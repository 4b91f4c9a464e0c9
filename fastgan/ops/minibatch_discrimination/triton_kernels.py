"""Minibatch discrimination in Triton. The formulas and their derivation are in csrc/cpu/minibatch_discrimination.cpp.

    _similarities   o
    _gradients      dm, or by_h and by_m

m is packed as (B, C, N), so that a tile of samples is contiguous. It is packed once for all orders. A program handles
one b and a tile of samples i, and loops over the tiles of all samples j. The pairs of two tiles stay in registers, and
their sums are written once. Each pair is visited twice, once from either side; adding to both sides would need atomics.

Operations for each of the N^2 B pairs: 2 C and an exp in the forward, 5 C in the backward, 9 C in the double backward.
Registers cannot be indexed, so a row of sums over j is inserted into its column of a (samples, dims) tile by comparing
column numbers. That costs 1 / BLOCK of the pairs' work per dim. With more than DIMS dims, several programs share the
output, and each computes all distances.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.ops.triton_language import DTYPES, addresses, device_of, rounded, typed

_DIMS = 32


@triton.jit
def _compared(i, j, samples, segments_ptr, EXCLUDE_SELF: tl.constexpr):
    inside = (i < samples)[:, None] & (j < samples)[None, :]
    if EXCLUDE_SELF:
        inside = inside & (i[:, None] != j[None, :])
    if segments_ptr is not None:
        of_i = tl.load(segments_ptr + i, mask=i < samples, other=0)
        of_j = tl.load(segments_ptr + j, mask=j < samples, other=0)
        inside = inside & (of_i[:, None] == of_j[None, :])
    return inside


@triton.jit
def _with_sign_of(s, x):
    return tl.where(s == 0, 0.0, tl.where(s > 0, x, -x))


@triton.jit
def _similarities(
    m_ptr,
    segments_ptr,
    o_ptr,
    samples,
    kernels,
    dims,
    first,
    rows,
    EXCLUDE_SELF: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    tiles = tl.cdiv(rows, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    i = first + row
    m = typed(m_ptr, DTYPE) + b * dims * samples
    total = tl.zeros([BLOCK], ACC)
    for j0 in range(0, samples, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        distance = tl.zeros([BLOCK, BLOCK], ACC)
        at = m
        for _ in range(dims):
            own = tl.load(at + i, mask=row < rows, other=0.0).to(ACC)
            other = tl.load(at + j, mask=j < samples, other=0.0).to(ACC)
            distance += tl.abs(own[:, None] - other[None, :])
            at += samples
        compared = _compared(i, j, samples, segments_ptr, EXCLUDE_SELF)
        total += tl.sum(tl.where(compared, tl.exp(-distance), 0.0), 1)
    target = typed(o_ptr, DTYPE) + row.to(tl.int64) * kernels + b
    tl.store(target, rounded(total, DTYPE), mask=row < rows)


@triton.jit
def _gradients(
    w_ptr,
    h_ptr,
    m_ptr,
    segments_ptr,
    by_h_ptr,
    by_m_ptr,
    samples,
    kernels,
    dims,
    first,
    rows,
    BLOCK: tl.constexpr,
    DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute by_h and by_m. Without w, write dm to by_m."""
    ACC: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    tiles = tl.cdiv(rows, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    c0 = tl.program_id(1) * DIMS
    column = tl.arange(0, DIMS)
    i = first + row
    m = typed(m_ptr, DTYPE) + b * dims * samples
    h = typed(h_ptr, DTYPE) + b * samples
    h_own = tl.load(h + i, mask=row < rows, other=0.0).to(ACC)
    of_sample = tl.zeros([BLOCK], ACC)
    of_dims = tl.zeros([BLOCK, DIMS], ACC)
    for j0 in range(0, samples, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        distance = tl.zeros([BLOCK, BLOCK], ACC)
        if w_ptr is not None:
            tangent = tl.zeros([BLOCK, BLOCK], ACC)
            at_w = typed(w_ptr, DTYPE) + b * dims * samples
        at = m
        for _ in range(dims):
            own = tl.load(at + i, mask=row < rows, other=0.0).to(ACC)
            other = tl.load(at + j, mask=j < samples, other=0.0).to(ACC)
            apart = own[:, None] - other[None, :]
            distance += tl.abs(apart)
            if w_ptr is not None:
                w_own = tl.load(at_w + i, mask=row < rows, other=0.0).to(ACC)
                w_other = tl.load(at_w + j, mask=j < samples, other=0.0).to(ACC)
                tangent += _with_sign_of(apart, w_own[:, None] - w_other[None, :])
                at_w += samples
            at += samples
        pairs = tl.where(_compared(i, j, samples, segments_ptr, True), -tl.exp(-distance), 0.0)
        if w_ptr is not None:
            pairs *= tangent
            of_sample += tl.sum(pairs, 1)
            pairs = -pairs
        if by_m_ptr is not None:
            h_other = tl.load(h + j, mask=j < samples, other=0.0).to(ACC)
            pairs *= h_own[:, None] + h_other[None, :]
            at = m + c0.to(tl.int64) * samples
            for c in range(tl.minimum(DIMS, dims - c0)):
                own = tl.load(at + i, mask=row < rows, other=0.0).to(ACC)
                other = tl.load(at + j, mask=j < samples, other=0.0).to(ACC)
                given = tl.sum(_with_sign_of(own[:, None] - other[None, :], pairs), 1)
                of_dims += tl.where(column == c, given[:, None], 0.0)
                at += samples
    target = row.to(tl.int64) * kernels + b
    if by_h_ptr is not None:  # noqa: SIM102 (a compile-time condition; the inner one is not)
        if c0 == 0:
            tl.store(typed(by_h_ptr, DTYPE) + target, rounded(of_sample, DTYPE), mask=row < rows)
    if by_m_ptr is not None:
        to = typed(by_m_ptr, DTYPE) + target[:, None] * dims + (c0 + column)[None, :]
        tl.store(to, rounded(of_dims, DTYPE), mask=(row < rows)[:, None] & (c0 + column < dims)[None, :])


_SIZES = dict.fromkeys(("samples", "kernels", "dims", "first", "rows"), "i32")


# For ahead-of-time compilation: each launched kernel, its arguments ("*A" points to the accumulation dtype) and the
# combinations of its constants, without DTYPE, the dtype of the input.
AOT: list[tuple[Any, dict[str, str], list[dict[str, Any]]]] = [
    (
        _similarities,
        addresses("m", "o") | {"segments_ptr": "*i64"} | _SIZES,
        [{"EXCLUDE_SELF": True, "BLOCK": 64}, {"EXCLUDE_SELF": False, "BLOCK": 16, "segments_ptr": None}],
    ),
    (
        _gradients,
        addresses("w", "h", "m", "by_h", "by_m") | {"segments_ptr": "*i64"} | _SIZES,
        [
            {"BLOCK": 64, "DIMS": 16, "w_ptr": None, "by_h_ptr": None, "segments_ptr": None},
            {"BLOCK": 32, "DIMS": _DIMS},
            {"BLOCK": 32, "DIMS": 1, "by_m_ptr": None},
        ],
    ),
]


def forward(m: Tensor, segments: Tensor | None, o: Tensor, first: int, exclude_self: bool) -> None:
    kernels, dims, samples = m.shape
    rows, (block, warps) = len(o), _tile(m, 64)
    sizes = samples, kernels, dims, first, rows
    constants = {"EXCLUDE_SELF": exclude_self, "BLOCK": block, "DTYPE": DTYPES[m.dtype]}
    with device_of(m):
        _similarities[(triton.cdiv(rows, block) * kernels,)](m, segments, o, *sizes, **constants, num_warps=warps)


def backward(h: Tensor, m: Tensor, segments: Tensor | None, dm: Tensor, first: int) -> None:
    _launch_gradients(None, h, m, segments, None, dm, first, len(dm))


def double_backward(
    w: Tensor, h: Tensor, m: Tensor, segments: Tensor | None, by_h: Tensor | None, by_m: Tensor | None, first: int
) -> None:
    written = by_m if by_h is None else by_h
    if written is not None:
        _launch_gradients(w.permute(1, 2, 0).contiguous(), h, m, segments, by_h, by_m, first, len(written))


def _launch_gradients(
    w: Tensor | None,
    h: Tensor,
    m: Tensor,
    segments: Tensor | None,
    by_h: Tensor | None,
    by_m: Tensor | None,
    first: int,
    rows: int,
) -> None:
    kernels, dims, samples = m.shape
    block, warps = _tile(m, 64 if w is None else 32)
    of_program = 1 if by_m is None else min(_DIMS, triton.next_power_of_2(dims))
    grid = triton.cdiv(rows, block) * kernels, 1 if by_m is None else triton.cdiv(dims, of_program)
    operands = w, h.t().contiguous(), m, segments, by_h, by_m
    constants = {"BLOCK": block, "DIMS": of_program, "DTYPE": DTYPES[m.dtype]}
    with device_of(m):
        _gradients[grid](*operands, samples, kernels, dims, first, rows, **constants, num_warps=warps)


def _tile(m: Tensor, most: int) -> tuple[int, int]:
    """Return the samples per tile and warps per program. They depend on the number of samples and on register size."""
    most = 32 if m.dtype == torch.float64 else most
    block = max(16, min(most, int(triton.next_power_of_2(m.shape[2]))))
    return block, 8 if block == 64 else 4
