"""Triton kernels for the double backward of attention. triton_tiles.py describes them."""

import triton
import triton.language as tl

from fastgan.ops.attention.triton_tiles import (
    deltas,
    factors_of,
    load_lse,
    load_tile,
    mask_tile,
    plus_product,
    probabilities,
    scores_of,
    store_tile,
)


@triton.jit
def second_tile(
    q,
    g,
    gq,
    k,
    v,
    gk,
    gv,
    factors,
    delta,
    GQ: tl.constexpr,
    GK: tl.constexpr,
    GV: tl.constexpr,
    DROPS: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return dP - delta, T and R of a tile."""
    apart = scores_of(g, v, ACC, PRECISION)
    t = tl.zeros(apart.shape, ACC)
    r = tl.zeros(apart.shape, ACC)
    if GQ:
        t += scores_of(gq, k, ACC, PRECISION)
    if GK:
        t += scores_of(q, gk, ACC, PRECISION)
    t = t * tl.full(t.shape, SCALE, ACC)
    if GV:
        r = scores_of(g, gv, ACC, PRECISION)
    if DROPS:
        apart *= factors
        r *= factors
    return apart - delta[:, None], t, r


@triton.jit
def grad_grad_rows(
    gq_ptr,
    gk_ptr,
    gv_ptr,
    gmask_ptr,
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    seed_ptr,
    o_ptr,
    lse_ptr,
    by_g_ptr,
    by_q_ptr,
    tau_ptr,
    mu_ptr,
    length,
    keys,
    heads,
    repeats,
    mask_sample,
    mask_head,
    mask_row,
    mask_key,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOOLEAN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    GQ: tl.constexpr = gq_ptr is not None
    GK: tl.constexpr = gk_ptr is not None
    GV: tl.constexpr = gv_ptr is not None
    DROPS: tl.constexpr = seed_ptr is not None
    tiles = tl.cdiv(length, ROWS)
    row0 = tl.program_id(0) % tiles * ROWS
    head = (tl.program_id(0) // tiles).to(tl.int64)
    group = head // repeats
    mask_first = head // heads * mask_sample + head % heads * mask_head
    row = row0 + tl.arange(0, ROWS)
    q = load_tile(q_ptr + head * length * E, row0, length, DTYPE, ROWS, E, PADDED)
    g = load_tile(g_ptr + head * length * EV, row0, length, DTYPE, ROWS, EV, PADDED_V)
    o = load_tile(o_ptr + head * length * EV, row0, length, DTYPE, ROWS, EV, PADDED_V)
    gq = q
    if GQ:
        gq = load_tile(gq_ptr + head * length * E, row0, length, DTYPE, ROWS, E, PADDED)
    lse, rest = load_lse(lse_ptr, head, row, length)
    delta = deltas(g, o, ACC)
    last = tl.minimum(keys, row0 + ROWS) if CAUSAL else keys
    tau = tl.zeros([ROWS], ACC)
    of_both = tl.zeros([ROWS], ACC)
    of_apart = tl.zeros([ROWS], ACC)
    of_r = tl.zeros([ROWS], ACC)
    for key0 in range(0, last, KEYS):
        k = load_tile(k_ptr + group * keys * E, key0, keys, DTYPE, KEYS, E, PADDED)
        v = load_tile(v_ptr + group * keys * EV, key0, keys, DTYPE, KEYS, EV, PADDED_V)
        gk = k
        if GK:
            gk = load_tile(gk_ptr + group * keys * E, key0, keys, DTYPE, KEYS, E, PADDED)
        gv = v
        if GV:
            gv = load_tile(gv_ptr + group * keys * EV, key0, keys, DTYPE, KEYS, EV, PADDED_V)
        p = probabilities(
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
            SCALE,
            CAUSAL,
            BOOLEAN,
            ACC,
            PRECISION,
        )
        factors = p
        if DROPS:
            factors = factors_of(seed_ptr, head, row0, key0, p, DROPOUT)
        apart, t, r = second_tile(q, g, gq, k, v, gk, gv, factors, delta, GQ, GK, GV, DROPS, SCALE, ACC, PRECISION)
        if gmask_ptr is not None:
            t += mask_tile(gmask_ptr, row0, key0, length, keys, mask_first, mask_row, mask_key, t)
        tau += tl.sum(p * t, 1)
        of_both += tl.sum(p * apart * t, 1)
        of_apart += tl.sum(p * apart, 1)
        of_r += tl.sum(p * r, 1)
    mu = of_both - tau * of_apart + of_r
    tl.store(tau_ptr + head * length + row, tau, mask=row < length)
    tl.store(mu_ptr + head * length + row, mu, mask=row < length)
    if by_g_ptr is not None or by_q_ptr is not None:
        by_g = tl.zeros([ROWS, PADDED_V], ACC)
        by_q = tl.zeros([ROWS, PADDED], ACC)
        for key0 in range(0, last, KEYS):
            k = load_tile(k_ptr + group * keys * E, key0, keys, DTYPE, KEYS, E, PADDED)
            v = load_tile(v_ptr + group * keys * EV, key0, keys, DTYPE, KEYS, EV, PADDED_V)
            gk = k
            if GK:
                gk = load_tile(gk_ptr + group * keys * E, key0, keys, DTYPE, KEYS, E, PADDED)
            gv = v
            if GV:
                gv = load_tile(gv_ptr + group * keys * EV, key0, keys, DTYPE, KEYS, EV, PADDED_V)
            p = probabilities(
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
                SCALE,
                CAUSAL,
                BOOLEAN,
                ACC,
                PRECISION,
            )
            factors = p
            weights = p
            if DROPS:
                factors = factors_of(seed_ptr, head, row0, key0, p, DROPOUT)
                weights = p * factors
            apart, t, r = second_tile(q, g, gq, k, v, gk, gv, factors, delta, GQ, GK, GV, DROPS, SCALE, ACC, PRECISION)
            if gmask_ptr is not None:
                t += mask_tile(gmask_ptr, row0, key0, length, keys, mask_first, mask_row, mask_key, t)
            t = t - tau[:, None]
            if by_g_ptr is not None:
                by_g = plus_product(weights * t, v, by_g, PRECISION)
                if GV:
                    by_g = plus_product(weights, gv, by_g, PRECISION)
            if by_q_ptr is not None:
                by_q = plus_product(p * (apart * t + r - mu[:, None]), k, by_q, PRECISION)
                if GK:
                    by_q = plus_product(p * apart, gk, by_q, PRECISION)
        if by_g_ptr is not None:
            store_tile(by_g_ptr + head * length * EV, by_g, row0, length, DTYPE, EV)
        if by_q_ptr is not None:
            by_q = by_q * tl.full(by_q.shape, SCALE, ACC)
            store_tile(by_q_ptr + head * length * E, by_q, row0, length, DTYPE, E)


@triton.jit
def grad_grad_keys(
    gq_ptr,
    gk_ptr,
    gv_ptr,
    gmask_ptr,
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    seed_ptr,
    o_ptr,
    lse_ptr,
    by_k_ptr,
    by_v_ptr,
    tau_ptr,
    mu_ptr,
    length,
    keys,
    heads,
    repeats,
    mask_sample,
    mask_head,
    mask_row,
    mask_key,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOOLEAN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    GQ: tl.constexpr = gq_ptr is not None
    GK: tl.constexpr = gk_ptr is not None
    GV: tl.constexpr = gv_ptr is not None
    DROPS: tl.constexpr = seed_ptr is not None
    tiles = tl.cdiv(keys, KEYS)
    key0 = tl.program_id(0) % tiles * KEYS
    group = (tl.program_id(0) // tiles).to(tl.int64)
    k = load_tile(k_ptr + group * keys * E, key0, keys, DTYPE, KEYS, E, PADDED)
    v = load_tile(v_ptr + group * keys * EV, key0, keys, DTYPE, KEYS, EV, PADDED_V)
    gk = k
    if GK:
        gk = load_tile(gk_ptr + group * keys * E, key0, keys, DTYPE, KEYS, E, PADDED)
    gv = v
    if GV:
        gv = load_tile(gv_ptr + group * keys * EV, key0, keys, DTYPE, KEYS, EV, PADDED_V)
    by_k = tl.zeros([KEYS, PADDED], ACC)
    by_v = tl.zeros([KEYS, PADDED_V], ACC)
    first = key0 // ROWS * ROWS if CAUSAL else 0
    for repeat in range(repeats):
        head = group * repeats + repeat
        mask_first = head // heads * mask_sample + head % heads * mask_head
        for row0 in range(first, length, ROWS):
            row = row0 + tl.arange(0, ROWS)
            q = load_tile(q_ptr + head * length * E, row0, length, DTYPE, ROWS, E, PADDED)
            g = load_tile(g_ptr + head * length * EV, row0, length, DTYPE, ROWS, EV, PADDED_V)
            o = load_tile(o_ptr + head * length * EV, row0, length, DTYPE, ROWS, EV, PADDED_V)
            gq = q
            if GQ:
                gq = load_tile(gq_ptr + head * length * E, row0, length, DTYPE, ROWS, E, PADDED)
            lse, rest = load_lse(lse_ptr, head, row, length)
            tau = tl.load(tau_ptr + head * length + row, mask=row < length, other=0.0)
            mu = tl.load(mu_ptr + head * length + row, mask=row < length, other=0.0)
            p = probabilities(
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
                SCALE,
                CAUSAL,
                BOOLEAN,
                ACC,
                PRECISION,
            )
            factors = p
            weights = p
            if DROPS:
                factors = factors_of(seed_ptr, head, row0, key0, p, DROPOUT)
                weights = p * factors
            delta = deltas(g, o, ACC)
            apart, t, r = second_tile(q, g, gq, k, v, gk, gv, factors, delta, GQ, GK, GV, DROPS, SCALE, ACC, PRECISION)
            if gmask_ptr is not None:
                t += mask_tile(gmask_ptr, row0, key0, length, keys, mask_first, mask_row, mask_key, t)
            t = t - tau[:, None]
            if by_v_ptr is not None:
                by_v = plus_product(tl.trans(weights * t), g, by_v, PRECISION)
            if by_k_ptr is not None:
                by_k = plus_product(tl.trans(p * (apart * t + r - mu[:, None])), q, by_k, PRECISION)
                if GQ:
                    by_k = plus_product(tl.trans(p * apart), gq, by_k, PRECISION)
    if by_k_ptr is not None:
        by_k = by_k * tl.full(by_k.shape, SCALE, ACC)
        store_tile(by_k_ptr + group * keys * E, by_k, key0, keys, DTYPE, E)
    if by_v_ptr is not None:
        store_tile(by_v_ptr + group * keys * EV, by_v, key0, keys, DTYPE, EV)
