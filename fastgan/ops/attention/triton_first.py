"""Attention and its first derivative in Triton; see triton_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgan.ops.attention.triton_tiles import (
    factors,
    load,
    product,
    scores,
    store,
    times,
    times_transposed,
    total_of,
)


@triton.jit
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    seed_ptr,
    o_ptr,
    lse_ptr,
    heads,
    groups,
    length,
    keys,
    width,
    wide,
    by_b,
    by_h,
    by_i,
    by_j,
    scale_high,
    scale_low,
    dropout_p,
    factor_high,
    factor_low,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    tiles = tl.cdiv(length, ROWS)
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = slot // heads, slot % heads
    group = b * groups + h // (heads // groups)
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    scale = total_of(scale_high, scale_low, ACC)
    q = load(q_ptr, slot * length, i, length, width, WIDTH, DTYPE)
    largest = tl.full([ROWS], -float("inf"), ACC)
    sums = tl.zeros([ROWS], ACC)
    total = tl.zeros([ROWS, WIDE], ACC)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tl.program_id(0) % tiles + 1) * ROWS)
    for j0 in range(0, end, KEYS):
        j = j0 + tl.arange(0, KEYS)
        k = load(k_ptr, group * keys, j, keys, width, WIDTH, DTYPE)
        v = load(v_ptr, group * keys, j, keys, wide, WIDE, DTYPE)
        s = scores(q, k, scale, i, j, length, keys, b, h, mask_ptr, by_b, by_h, by_i, by_j, CAUSAL, PRECISION)
        larger = tl.maximum(largest, tl.max(s, 1))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        p = tl.exp(s - shift[:, None])
        shrink = tl.exp(largest - shift)
        sums = sums * shrink + tl.sum(p, 1)
        if seed_ptr is not None:
            p *= factors(p, seed_ptr, i, j, slot, dropout_p, factor_high, factor_low)
        total = total * shrink[:, None] + times(p, v, PRECISION)
        largest = larger
    nothing = sums == 0
    sums = tl.where(nothing, 1.0, sums)
    store(o_ptr, total / sums[:, None], slot * length, i, length, wide, WIDE, DTYPE)
    lse = tl.where(nothing, 0.0, tl.where(nothing, 0.0, largest) + tl.log(sums))
    tl.store(lse_ptr + slot * length + i, lse, mask=i < length)


@triton.jit
def backward_rows(
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    dq_ptr,
    heads,
    groups,
    length,
    keys,
    width,
    wide,
    by_b,
    by_h,
    by_i,
    by_j,
    scale_high,
    scale_low,
    dropout_p,
    factor_high,
    factor_low,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    tiles = tl.cdiv(length, ROWS)
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = slot // heads, slot % heads
    group = b * groups + h // (heads // groups)
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    scale = total_of(scale_high, scale_low, ACC)
    q = load(q_ptr, slot * length, i, length, width, WIDTH, DTYPE)
    g = load(g_ptr, slot * length, i, length, wide, WIDE, DTYPE)
    lse = tl.load(lse_ptr + slot * length + i, mask=i < length, other=0.0)
    delta = tl.load(delta_ptr + slot * length + i, mask=i < length, other=0.0)
    dq = tl.zeros([ROWS, WIDTH], ACC)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tl.program_id(0) % tiles + 1) * ROWS)
    for j0 in range(0, end, KEYS):
        j = j0 + tl.arange(0, KEYS)
        k = load(k_ptr, group * keys, j, keys, width, WIDTH, DTYPE)
        v = load(v_ptr, group * keys, j, keys, wide, WIDE, DTYPE)
        s = scores(q, k, scale, i, j, length, keys, b, h, mask_ptr, by_b, by_h, by_i, by_j, CAUSAL, PRECISION)
        dp = product(g, v, PRECISION)
        if seed_ptr is not None:
            dp *= factors(dp, seed_ptr, i, j, slot, dropout_p, factor_high, factor_low)
        dq += times(tl.exp(s - lse[:, None]) * (dp - delta[:, None]), k, PRECISION)
    store(dq_ptr, dq * scale, slot * length, i, length, width, WIDTH, DTYPE)


@triton.jit
def backward_keys(
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    dk_ptr,
    dv_ptr,
    heads,
    groups,
    length,
    keys,
    width,
    wide,
    by_b,
    by_h,
    by_i,
    by_j,
    scale_high,
    scale_low,
    dropout_p,
    factor_high,
    factor_low,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    tiles = tl.cdiv(keys, KEYS)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    b, repeats = group // groups, heads // groups
    first = tl.program_id(0) % tiles * KEYS
    j = first + tl.arange(0, KEYS)
    scale = total_of(scale_high, scale_low, ACC)
    k = load(k_ptr, group * keys, j, keys, width, WIDTH, DTYPE)
    v = load(v_ptr, group * keys, j, keys, wide, WIDE, DTYPE)
    dk = tl.zeros([KEYS, WIDTH], ACC)
    dv = tl.zeros([KEYS, WIDE], ACC)
    begin = 0
    if CAUSAL:
        begin = first // ROWS * ROWS
    for repeat in range(repeats):
        h = group % groups * repeats + repeat
        slot = b * heads + h
        for i0 in range(begin, length, ROWS):
            i = i0 + tl.arange(0, ROWS)
            q = load(q_ptr, slot * length, i, length, width, WIDTH, DTYPE)
            g = load(g_ptr, slot * length, i, length, wide, WIDE, DTYPE)
            lse = tl.load(lse_ptr + slot * length + i, mask=i < length, other=0.0)
            delta = tl.load(delta_ptr + slot * length + i, mask=i < length, other=0.0)
            s = scores(q, k, scale, i, j, length, keys, b, h, mask_ptr, by_b, by_h, by_i, by_j, CAUSAL, PRECISION)
            p = tl.exp(s - lse[:, None])
            dp = product(g, v, PRECISION)
            weighted = p
            if seed_ptr is not None:
                of_dropout = factors(dp, seed_ptr, i, j, slot, dropout_p, factor_high, factor_low)
                dp *= of_dropout
                weighted = p * of_dropout
            if dv_ptr is not None:
                dv += times_transposed(weighted, g, PRECISION)
            if dk_ptr is not None:
                dk += times_transposed(p * (dp - delta[:, None]), q, PRECISION)
    if dk_ptr is not None:
        store(dk_ptr, dk * scale, group * keys, j, keys, width, WIDTH, DTYPE)
    if dv_ptr is not None:
        store(dv_ptr, dv, group * keys, j, keys, wide, WIDE, DTYPE)
