"""Tiles of attention in Triton, and a description of its kernels. The formulas are in blocks.py.

    triton_first.py     attend              o and the log-sum-exp of each row
                        grad_rows           dq
                        grad_keys           dk and dv
    triton_second.py    grad_grad_rows      tau and mu of each row, by_g and by_q
                        grad_grad_keys      by_k and by_v
    triton_mask.py      grad_mask           dmask, or by_mask

A program of a ``rows`` kernel handles a tile of rows of one head and loops over the keys. A program of a ``keys``
kernel handles a tile of keys of one group and loops over the rows of every head in it. Each computes the tiles of P
again from the log-sum-exp, and adds in a fixed order without atomics. Scores are never stored. Bytes: each program
reads its own tile once and all tiles of the other side, from L2 as long as the operands of a head fit there.

tau and mu are the sums of P T and P M over a row. With M = (dP - delta) (T - tau) + R, one pass adds up
P (dP - delta) T, P (dP - delta) and P R beside P T, and mu is the first - tau times the second + the third.

Products of two operands take them in their storage type. P, dS and the like stay in float32, and their products with an
operand use PRECISION. Every sum is float32 (float64 for float64).
"""

from math import inf

import triton
import triton.language as tl

from fastgan.backends import TRITON_INTERPRETS
from fastgan.ops.triton_language import rounded, typed

_INTERPRETED = tl.constexpr(TRITON_INTERPRETS)
NEVER = tl.constexpr(-inf)


@triton.jit
def load_tile(ptr, first, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Load a tile (BLOCK, PADDED) of rows of a (count, WIDTH) matrix. Zeros follow the last row and column."""
    row = first + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    return tl.load(typed(ptr, DTYPE) + at, mask=(row < count)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, values, first, count, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    BLOCK: tl.constexpr = values.shape[0]
    PADDED: tl.constexpr = values.shape[1]
    row = first + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    tl.store(typed(ptr, DTYPE) + at, rounded(values, DTYPE), mask=inside)


@triton.jit
def scores_of(left, right, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Compute left right^T of two operands in their storage type."""
    if _INTERPRETED:  # it has no products of bfloat16
        return tl.dot(left.to(ACC), tl.trans(right.to(ACC)), out_dtype=ACC)
    return tl.dot(left, tl.trans(right), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def plus_product(weights, operand, total, PRECISION: tl.constexpr):
    """Return total + weights operand. ``weights`` is a tile of P or dS; the operand has its storage type."""
    return total + tl.dot(weights, operand.to(weights.dtype), input_precision=PRECISION, out_dtype=weights.dtype)


@triton.jit
def masked(
    scores,
    mask_ptr,
    row0,
    key0,
    length,
    keys,
    mask_first,
    mask_row,
    mask_key,
    CAUSAL: tl.constexpr,
    BOOLEAN: tl.constexpr,
):
    """Scores with the masks applied; -inf outside of the matrix too."""
    row = (row0 + tl.arange(0, scores.shape[0]))[:, None]
    key = (key0 + tl.arange(0, scores.shape[1]))[None, :]
    inside = (row < length) & (key < keys)
    if CAUSAL:
        inside = inside & (key <= row)
    if mask_ptr is not None:
        at = mask_first + row.to(tl.int64) * mask_row + key.to(tl.int64) * mask_key
        if BOOLEAN:
            inside = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        else:
            scores += tl.load(mask_ptr + at, mask=inside, other=0.0).to(scores.dtype)
    return tl.where(inside, scores, NEVER)


@triton.jit
def factors_of(seed_ptr, head, row0, key0, like, DROPOUT: tl.constexpr):
    """D: 0 with the probability DROPOUT, and 1 / (1 - DROPOUT) otherwise. Head, row and key alone decide."""
    row = tl.broadcast_to((row0 + tl.arange(0, like.shape[0]))[:, None], like.shape)
    key = tl.broadcast_to((key0 + tl.arange(0, like.shape[1]))[None, :], like.shape)
    zero = tl.zeros(like.shape, tl.int32)
    drawn, _second, _third, _fourth = tl.philox(tl.load(seed_ptr), key, row, zero + head.to(tl.int32), zero)
    uniform = tl.uint_to_uniform_float(drawn)
    kept = tl.full(like.shape, 1.0 / (1.0 - DROPOUT) if DROPOUT < 1.0 else 0.0, like.dtype)
    return tl.where(uniform >= DROPOUT, kept, 0.0)


@triton.jit
def probabilities(
    q,
    k,
    lse,
    rest,
    mask_ptr,
    row0,
    key0,
    length,
    keys,
    mask_first,
    mask_row,
    mask_key,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOOLEAN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scores = scores_of(q, k, ACC, PRECISION)
    scores = scores * tl.full(scores.shape, SCALE, ACC)
    scores = masked(scores, mask_ptr, row0, key0, length, keys, mask_first, mask_row, mask_key, CAUSAL, BOOLEAN)
    scores -= lse[:, None]
    if mask_ptr is not None and not BOOLEAN:  # it may have added -1e9 to a whole row
        scores -= rest[:, None]
    return tl.exp(scores)


@triton.jit
def load_lse(ptr, head, row, length):
    """Load the log-sum-exp of rows of a head, and what its rounding left out."""
    at = ptr + (head * length + row) * 2
    return tl.load(at, mask=row < length, other=0.0), tl.load(at + 1, mask=row < length, other=0.0)


@triton.jit
def mask_tile(ptr, row0, key0, length, keys, mask_first, mask_row, mask_key, like):
    """Load the tile of a mask or of its gradient, which adds to the scores."""
    row = (row0 + tl.arange(0, like.shape[0]))[:, None]
    key = (key0 + tl.arange(0, like.shape[1]))[None, :]
    at = mask_first + row.to(tl.int64) * mask_row + key.to(tl.int64) * mask_key
    return tl.load(ptr + at, mask=(row < length) & (key < keys), other=0.0).to(like.dtype)


@triton.jit
def deltas(g, o, ACC: tl.constexpr):
    return tl.sum(g.to(ACC) * o.to(ACC), 1)
