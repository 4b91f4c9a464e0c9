"""What all Triton kernels of attention do with a tile of scores."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgan.ops.triton_language import rounded, typed


@triton.jit
def total_of(high, low, DTYPE: tl.constexpr):
    """A number that is given as two of float32, which is what a launch can pass."""
    return tl.to_tensor(high).to(DTYPE) + tl.to_tensor(low).to(DTYPE)


@triton.jit
def load(ptr, first, i, count, width, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Rows i of a (count, width) matrix that begins at row ``first``."""
    c = tl.arange(0, WIDTH)
    at = (first + i.to(tl.int64))[:, None] * width + c[None, :]
    return tl.load(typed(ptr, DTYPE) + at, mask=(i < count)[:, None] & (c < width)[None, :], other=0.0)


@triton.jit
def store(ptr, values, first, i, count, width, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    c = tl.arange(0, WIDTH)
    at = (first + i.to(tl.int64))[:, None] * width + c[None, :]
    tl.store(typed(ptr, DTYPE) + at, rounded(values, DTYPE), mask=(i < count)[:, None] & (c < width)[None, :])


@triton.jit
def scores(
    q,
    k,
    scale,
    i,
    j,
    length,
    keys,
    b,
    h,
    mask_ptr,
    by_b,
    by_h,
    by_i,
    by_j,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    s = product(q, k, PRECISION) * scale
    inside = (i < length)[:, None] & (j < keys)[None, :]
    if CAUSAL:
        inside = inside & (j[None, :] <= i[:, None])
    if mask_ptr is not None:
        of_rows = mask_ptr + b * by_b + h * by_h + i.to(tl.int64)[:, None] * by_i
        at = of_rows + j.to(tl.int64)[None, :] * by_j
        if mask_ptr.dtype.element_ty == tl.uint8:
            inside = inside & (tl.load(at, mask=inside, other=0) != 0)
        else:
            s += tl.load(at, mask=inside, other=0.0).to(s.dtype)
    return tl.where(inside, s, -float("inf"))


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """left right^T"""
    return tl.dot(left, tl.trans(right), input_precision=PRECISION)


@triton.jit
def times(tile, right, PRECISION: tl.constexpr):
    return tl.dot(tile, right.to(tile.dtype), input_precision=PRECISION)


@triton.jit
def times_transposed(tile, right, PRECISION: tl.constexpr):
    return tl.dot(tl.trans(tile), right.to(tile.dtype), input_precision=PRECISION)


@triton.jit
def factors(tile, seed_ptr, i, j, slot, dropout_p, factor_high, factor_low):
    """Those of dropout, by the place of a score among all."""
    at = tl.zeros(tile.shape, tl.int32)
    random, _a, _b, _c = tl.philox(tl.load(seed_ptr), at + j[None, :], at + i[:, None], at + slot.to(tl.int32), at)
    kept = tl.uint_to_uniform_float(random) >= dropout_p
    return tl.where(kept, total_of(factor_high, factor_low, tile.dtype), 0.0)
