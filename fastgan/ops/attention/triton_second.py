"""The second derivative of attention in Triton; see triton_kernels.py."""

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
def _tangent(p, q, k, gq, gk, scale, GQ: tl.constexpr, GK: tl.constexpr, PRECISION: tl.constexpr):
    """T"""
    t = tl.zeros(p.shape, p.dtype)
    if GQ:
        t += product(gq, k, PRECISION)
    if GK:
        t += product(q, gk, PRECISION)
    return t * scale


@triton.jit
def second_rows(
    gq_ptr,
    gk_ptr,
    gv_ptr,
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    by_g_ptr,
    by_q_ptr,
    tau_ptr,
    mu_ptr,
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
    GQ: tl.constexpr = gq_ptr is not None
    GK: tl.constexpr = gk_ptr is not None
    tiles = tl.cdiv(length, ROWS)
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = slot // heads, slot % heads
    group = b * groups + h // (heads // groups)
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    scale = total_of(scale_high, scale_low, ACC)
    q = load(q_ptr, slot * length, i, length, width, WIDTH, DTYPE)
    g = load(g_ptr, slot * length, i, length, wide, WIDE, DTYPE)
    gq = q
    if GQ:
        gq = load(gq_ptr, slot * length, i, length, width, WIDTH, DTYPE)
    lse = tl.load(lse_ptr + slot * length + i, mask=i < length, other=0.0)
    delta = tl.load(delta_ptr + slot * length + i, mask=i < length, other=0.0)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tl.program_id(0) % tiles + 1) * ROWS)

    # As the probabilities of a row are 1 together and its dS are 0: mu = rowsum(dS T) + rowsum(P R).
    tau = tl.zeros([ROWS], ACC)
    mu = tl.zeros([ROWS], ACC)
    for j0 in range(0, end, KEYS):
        j = j0 + tl.arange(0, KEYS)
        k = load(k_ptr, group * keys, j, keys, width, WIDTH, DTYPE)
        v = load(v_ptr, group * keys, j, keys, wide, WIDE, DTYPE)
        s = scores(q, k, scale, i, j, length, keys, b, h, mask_ptr, by_b, by_h, by_i, by_j, CAUSAL, PRECISION)
        p = tl.exp(s - lse[:, None])
        gk = k
        if GK:
            gk = load(gk_ptr, group * keys, j, keys, width, WIDTH, DTYPE)
        t = _tangent(p, q, k, gq, gk, scale, GQ, GK, PRECISION)
        dp = product(g, v, PRECISION)
        r = tl.zeros(p.shape, ACC)
        if gv_ptr is not None:
            r = product(g, load(gv_ptr, group * keys, j, keys, wide, WIDE, DTYPE), PRECISION)
        if seed_ptr is not None:
            of_dropout = factors(p, seed_ptr, i, j, slot, dropout_p, factor_high, factor_low)
            dp *= of_dropout
            r *= of_dropout
        tau += tl.sum(p * t, 1)
        mu += tl.sum(p * ((dp - delta[:, None]) * t + r), 1)
    tl.store(tau_ptr + slot * length + i, tau, mask=i < length)
    tl.store(mu_ptr + slot * length + i, mu, mask=i < length)

    by_g = tl.zeros([ROWS, WIDE], ACC)
    by_q = tl.zeros([ROWS, WIDTH], ACC)
    for j0 in range(0, end, KEYS):
        j = j0 + tl.arange(0, KEYS)
        k = load(k_ptr, group * keys, j, keys, width, WIDTH, DTYPE)
        v = load(v_ptr, group * keys, j, keys, wide, WIDE, DTYPE)
        s = scores(q, k, scale, i, j, length, keys, b, h, mask_ptr, by_b, by_h, by_i, by_j, CAUSAL, PRECISION)
        p = tl.exp(s - lse[:, None])
        gk = k
        if GK:
            gk = load(gk_ptr, group * keys, j, keys, width, WIDTH, DTYPE)
        t = _tangent(p, q, k, gq, gk, scale, GQ, GK, PRECISION) - tau[:, None]
        weighted = p
        if seed_ptr is not None:
            weighted = p * factors(p, seed_ptr, i, j, slot, dropout_p, factor_high, factor_low)
        if by_g_ptr is not None:
            by_g += times(weighted * t, v, PRECISION)
            if gv_ptr is not None:
                by_g += times(weighted, load(gv_ptr, group * keys, j, keys, wide, WIDE, DTYPE), PRECISION)
        if by_q_ptr is not None:
            dp = product(g, v, PRECISION)
            r = tl.zeros(p.shape, ACC)
            if gv_ptr is not None:
                r = product(g, load(gv_ptr, group * keys, j, keys, wide, WIDE, DTYPE), PRECISION)
            if seed_ptr is not None:
                of_dropout = factors(p, seed_ptr, i, j, slot, dropout_p, factor_high, factor_low)
                dp *= of_dropout
                r *= of_dropout
            dp -= delta[:, None]
            by_q += times(p * (dp * t + r - mu[:, None]), k, PRECISION)
            if GK:
                by_q += times(p * dp, gk, PRECISION)
    if by_g_ptr is not None:
        store(by_g_ptr, by_g, slot * length, i, length, wide, WIDE, DTYPE)
    if by_q_ptr is not None:
        store(by_q_ptr, by_q * scale, slot * length, i, length, width, WIDTH, DTYPE)


@triton.jit
def second_keys(
    gq_ptr,
    gk_ptr,
    gv_ptr,
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    tau_ptr,
    mu_ptr,
    by_k_ptr,
    by_v_ptr,
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
    GQ: tl.constexpr = gq_ptr is not None
    GK: tl.constexpr = gk_ptr is not None
    tiles = tl.cdiv(keys, KEYS)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    b, repeats = group // groups, heads // groups
    first = tl.program_id(0) % tiles * KEYS
    j = first + tl.arange(0, KEYS)
    scale = total_of(scale_high, scale_low, ACC)
    k = load(k_ptr, group * keys, j, keys, width, WIDTH, DTYPE)
    v = load(v_ptr, group * keys, j, keys, wide, WIDE, DTYPE)
    gk = k
    if GK:
        gk = load(gk_ptr, group * keys, j, keys, width, WIDTH, DTYPE)
    by_k = tl.zeros([KEYS, WIDTH], ACC)
    by_v = tl.zeros([KEYS, WIDE], ACC)
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
            gq = q
            if GQ:
                gq = load(gq_ptr, slot * length, i, length, width, WIDTH, DTYPE)
            lse = tl.load(lse_ptr + slot * length + i, mask=i < length, other=0.0)
            tau = tl.load(tau_ptr + slot * length + i, mask=i < length, other=0.0)
            s = scores(q, k, scale, i, j, length, keys, b, h, mask_ptr, by_b, by_h, by_i, by_j, CAUSAL, PRECISION)
            p = tl.exp(s - lse[:, None])
            t = _tangent(p, q, k, gq, gk, scale, GQ, GK, PRECISION) - tau[:, None]
            weighted = p
            if seed_ptr is not None:
                weighted = p * factors(p, seed_ptr, i, j, slot, dropout_p, factor_high, factor_low)
            if by_v_ptr is not None:
                by_v += times_transposed(weighted * t, g, PRECISION)
            if by_k_ptr is not None:
                delta = tl.load(delta_ptr + slot * length + i, mask=i < length, other=0.0)
                mu = tl.load(mu_ptr + slot * length + i, mask=i < length, other=0.0)
                dp = product(g, v, PRECISION)
                r = tl.zeros(p.shape, ACC)
                if gv_ptr is not None:
                    r = product(g, load(gv_ptr, group * keys, j, keys, wide, WIDE, DTYPE), PRECISION)
                if seed_ptr is not None:
                    of_dropout = factors(p, seed_ptr, i, j, slot, dropout_p, factor_high, factor_low)
                    dp *= of_dropout
                    r *= of_dropout
                dp -= delta[:, None]
                by_k += times_transposed(p * (dp * t + r - mu[:, None]), q, PRECISION)
                if GQ:
                    by_k += times_transposed(p * dp, gq, PRECISION)
    if by_k_ptr is not None:
        store(by_k_ptr, by_k * scale, group * keys, j, keys, width, WIDTH, DTYPE)
    if by_v_ptr is not None:
        store(by_v_ptr, by_v, group * keys, j, keys, wide, WIDE, DTYPE)
