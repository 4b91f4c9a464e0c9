"""Minibatch discrimination in Triton. The formulas and their derivation are in csrc/cpu/minibatch_discrimination.cpp.

    _similarities   o
    _gradients      dm, or by_h and by_m

m is packed as (B, C, N), so that a tile of samples is contiguous. It is packed once for all orders. A program handles
one b and a tile of samples i, and loops over the tiles of all samples j. The pairs of two tiles stay in registers, and
their sums are written once. Each pair is visited twice, once from either side; adding to both sides would need atomics.

A tile of pairs is (OWN, OTHERS, ALONG, ACROSS): each of ALONG x ACROSS threads compares OWN x OTHERS samples, which it
loads in vectors. The compiler gives a thread the first two axes, because the last two are as many as the threads. With
4 x 8 pairs, 3 loads serve the 64 operations of a dim; threads add up their sums of o and by_h once, after the loop.

Operations for each of the N^2 B pairs: 2 C and an exp in the forward, 5 C in the backward, 9 C in the double backward.
A sign takes two comparisons more, because that of 0 is 0. Registers cannot be indexed, so a dim's sum over j, which
ACROSS threads share, is inserted by comparing column numbers. With more than DIMS dims, several programs share the
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
_ALONG, _ACROSS = 16, 8  # threads; samples of a tile are these times a thread's
# A copy of operands through shared memory would need barriers; they are in L1.
_LAUNCH = {"num_warps": _ALONG * _ACROSS // (64 if torch.version.hip else 32), "num_stages": 1}


@triton.jit
def _own(OWN: tl.constexpr, ALONG: tl.constexpr):
    return tl.arange(0, ALONG)[None, None, :, None] * OWN + tl.arange(0, OWN)[:, None, None, None]


@triton.jit
def _others(OTHERS: tl.constexpr, ACROSS: tl.constexpr):
    return tl.arange(0, ACROSS)[None, None, None, :] * OTHERS + tl.arange(0, OTHERS)[None, :, None, None]


@triton.jit
def _compared(i, j, samples, segments_ptr, EXCLUDE_SELF: tl.constexpr):
    """Tell which pairs count. Rows that are not there are not stored."""
    inside = (j < samples) & (i >= 0)
    if EXCLUDE_SELF:
        inside = inside & (i != j)
    if segments_ptr is not None:
        of_i = tl.load(segments_ptr + i, mask=i < samples, other=0)
        of_j = tl.load(segments_ptr + j, mask=j < samples, other=0)
        inside = inside & (of_i == of_j)
    return inside


@triton.jit
def _sign(x, y):
    """Return the sign of x - y."""
    return (x > y).to(x.dtype) - (x < y).to(x.dtype)


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
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    ALONG: tl.constexpr,
    ACROSS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    tiles = tl.cdiv(rows, OWN * ALONG)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * (OWN * ALONG) + _own(OWN, ALONG)
    i = first + row
    m = typed(m_ptr, DTYPE) + b * dims * samples
    total = tl.zeros([OWN, ALONG, ACROSS], ACC)
    for j0 in range(0, samples, OTHERS * ACROSS):
        j = j0 + _others(OTHERS, ACROSS)
        distance = tl.zeros([OWN, OTHERS, ALONG, ACROSS], ACC)
        at = m
        for _ in range(dims):
            own = tl.load(at + i, mask=row < rows).to(ACC)
            other = tl.load(at + j, mask=j < samples).to(ACC)
            distance += tl.abs(own - other)
            at += samples
        compared = _compared(i, j, samples, segments_ptr, EXCLUDE_SELF)
        total += tl.sum(tl.where(compared, tl.exp(-distance), 0.0), 1)
    o = tl.sum(total, 2)[:, None, :, None]
    target = typed(o_ptr, DTYPE) + row.to(tl.int64) * kernels + b
    tl.store(target, rounded(o, DTYPE), mask=row < rows)


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
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    ALONG: tl.constexpr,
    ACROSS: tl.constexpr,
    DIMS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute by_h and by_m. Without w, write dm to by_m."""
    ACC: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    tiles = tl.cdiv(rows, OWN * ALONG)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * (OWN * ALONG) + _own(OWN, ALONG)
    c0 = tl.program_id(1) * DIMS
    i = first + row
    m = typed(m_ptr, DTYPE) + b * dims * samples
    h = typed(h_ptr, DTYPE) + b * samples
    h_own = tl.load(h + i, mask=row < rows).to(ACC)
    column = _others(DIMS // ACROSS, ACROSS)  # a thread's dims of the result
    of_sample = tl.zeros([OWN, ALONG, ACROSS], ACC)
    of_dims = tl.zeros([OWN, DIMS // ACROSS, ALONG, ACROSS], ACC)
    for j0 in range(0, samples, OTHERS * ACROSS):
        j = j0 + _others(OTHERS, ACROSS)
        distance = tl.zeros([OWN, OTHERS, ALONG, ACROSS], ACC)
        if w_ptr is not None:
            tangent = tl.zeros([OWN, OTHERS, ALONG, ACROSS], ACC)
            at_w = typed(w_ptr, DTYPE) + b * dims * samples
        at = m
        for _ in range(dims):
            own = tl.load(at + i, mask=row < rows).to(ACC)
            other = tl.load(at + j, mask=j < samples).to(ACC)
            distance += tl.abs(own - other)
            if w_ptr is not None:
                w_own = tl.load(at_w + i, mask=row < rows).to(ACC)
                w_other = tl.load(at_w + j, mask=j < samples).to(ACC)
                tangent += _sign(own, other) * (w_own - w_other)
                at_w += samples
            at += samples
        pairs = tl.where(_compared(i, j, samples, segments_ptr, True), -tl.exp(-distance), 0.0)
        if w_ptr is not None:
            pairs *= tangent
            of_sample += tl.sum(pairs, 1)
            pairs = -pairs
        if by_m_ptr is not None:
            h_other = tl.load(h + j, mask=j < samples).to(ACC)
            pairs *= h_own + h_other
            at = m + c0.to(tl.int64) * samples
            for c in range(tl.minimum(DIMS, dims - c0)):
                own = tl.load(at + i, mask=row < rows).to(ACC)
                other = tl.load(at + j, mask=j < samples).to(ACC)
                given = tl.sum(tl.sum(_sign(own, other) * pairs, 1), 2)
                of_dims += tl.where(column == c, given[:, None, :, None], 0.0)
                at += samples
    target = row.to(tl.int64) * kernels + b
    if by_h_ptr is not None:  # noqa: SIM102 (a compile-time condition; the inner one is not)
        if c0 == 0:
            sums = tl.sum(of_sample, 2)[:, None, :, None]
            tl.store(typed(by_h_ptr, DTYPE) + target, rounded(sums, DTYPE), mask=row < rows)
    if by_m_ptr is not None:
        to = typed(by_m_ptr, DTYPE) + target * dims + (c0 + column)
        tl.store(to, rounded(of_dims, DTYPE), mask=(row < rows) & (c0 + column < dims))


_SIZES = dict.fromkeys(("samples", "kernels", "dims", "first", "rows"), "i32")


def _pairs(own: int, others: int) -> dict[str, int]:
    return {"OWN": own, "OTHERS": others, "ALONG": _ALONG, "ACROSS": _ACROSS}


# For ahead-of-time compilation: each launched kernel, its arguments ("*A" points to the accumulation dtype) and the
# combinations of its constants, without DTYPE, the dtype of the input.
AOT: list[tuple[Any, dict[str, str], list[dict[str, Any]]]] = [
    (
        _similarities,
        addresses("m", "o") | {"segments_ptr": "*i64"} | _SIZES,
        [{"EXCLUDE_SELF": True, **_pairs(4, 8)}, {"EXCLUDE_SELF": False, **_pairs(1, 2), "segments_ptr": None}],
    ),
    (
        _gradients,
        addresses("w", "h", "m", "by_h", "by_m") | {"segments_ptr": "*i64"} | _SIZES,
        [
            {**_pairs(4, 8), "DIMS": 16, "w_ptr": None, "by_h_ptr": None, "segments_ptr": None},
            {**_pairs(4, 4), "DIMS": _DIMS},
            {**_pairs(1, 4), "DIMS": _ACROSS, "by_m_ptr": None},
        ],
    ),
]


def forward(m: Tensor, segments: Tensor | None, o: Tensor, first: int, exclude_self: bool) -> None:
    kernels, dims, samples = m.shape
    rows, tile = len(o), _tile(m, 8)
    sizes = samples, kernels, dims, first, rows
    constants = {"EXCLUDE_SELF": exclude_self, **tile, "DTYPE": DTYPES[m.dtype]}
    with device_of(m):
        _similarities[(_tiles(rows, tile) * kernels,)](m, segments, o, *sizes, **constants, **_LAUNCH)


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
    tile = _tile(m, 8 if w is None else 4)
    of_program = _ACROSS if by_m is None else max(_ACROSS, min(_DIMS, triton.next_power_of_2(dims)))
    grid = _tiles(rows, tile) * kernels, 1 if by_m is None else triton.cdiv(dims, of_program)
    operands = w, h.t().contiguous(), m, segments, by_h, by_m
    constants = {**tile, "DIMS": of_program, "DTYPE": DTYPES[m.dtype]}
    with device_of(m):
        _gradients[grid](*operands, samples, kernels, dims, first, rows, **constants, **_LAUNCH)


def _tile(m: Tensor, most: int) -> dict[str, int]:
    """Return the pairs of a thread. They depend on the number of samples and on register size.

    ``most``: samples j in float32. Small batches take few samples i, which leaves more programs.
    """
    samples = m.shape[2]
    others = triton.next_power_of_2(samples) // _ACROSS
    return _pairs(
        1 if samples <= 64 else 2 if samples < 1024 else 4,
        max(2, min(others, most // 2 if m.dtype == torch.float64 else most)),
    )


def _tiles(rows: int, tile: dict[str, int]) -> int:
    return int(triton.cdiv(rows, tile["OWN"] * tile["ALONG"]))
