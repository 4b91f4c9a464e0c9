"""Triton kernels for the result and the first derivatives of attention. triton_tiles.py describes them."""

import triton
import triton.language as tl

from fastgan.ops.attention.triton_tiles import (
    NEVER,
    deltas,
    factors_of,
    load_lse,
    load_tile,
    masked,
    plus_product,
    probabilities,
    scores_of,
    store_tile,
)


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    seed_ptr,
    o_ptr,
    lse_ptr,
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
    tiles = tl.cdiv(length, ROWS)
    row0 = tl.program_id(0) % tiles * ROWS
    head = (tl.program_id(0) // tiles).to(tl.int64)  # of all samples
    group = head // repeats
    mask_first = head // heads * mask_sample + head % heads * mask_head
    k_ptr += group * keys * E
    v_ptr += group * keys * EV
    q = load_tile(q_ptr + head * length * E, row0, length, DTYPE, ROWS, E, PADDED)
    largest = tl.full([ROWS], NEVER, ACC)
    sums = tl.zeros([ROWS], ACC)
    total = tl.zeros([ROWS, PADDED_V], ACC)
    last = tl.minimum(keys, row0 + ROWS) if CAUSAL else keys
    for key0 in range(0, last, KEYS):
        k = load_tile(k_ptr, key0, keys, DTYPE, KEYS, E, PADDED)
        v = load_tile(v_ptr, key0, keys, DTYPE, KEYS, EV, PADDED_V)
        scores = scores_of(q, k, ACC, PRECISION)
        scores = scores * tl.full(scores.shape, SCALE, ACC)
        scores = masked(scores, mask_ptr, row0, key0, length, keys, mask_first, mask_row, mask_key, CAUSAL, BOOLEAN)
        higher = tl.maximum(largest, tl.max(scores, 1))
        near = tl.where(higher == NEVER, 0.0, higher)
        p = tl.exp(scores - near[:, None])
        shrink = tl.exp(largest - near)
        sums = sums * shrink + tl.sum(p, 1)
        if seed_ptr is not None:
            p *= factors_of(seed_ptr, head, row0, key0, p, DROPOUT)
        total = plus_product(p, v, total * shrink[:, None], PRECISION)
        largest = higher
    nothing = sums == 0.0
    near = tl.where(nothing, 0.0, largest)
    log = tl.log(tl.where(nothing, 1.0, sums))
    lse = near + log
    row = row0 + tl.arange(0, ROWS)
    at = lse_ptr + (head * length + row) * 2
    tl.store(at, lse, mask=row < length)
    tl.store(at + 1, (near - lse) + log, mask=row < length)
    total = total / tl.where(nothing, 1.0, sums)[:, None]
    store_tile(o_ptr + head * length * EV, total, row0, length, DTYPE, EV)


@triton.jit
def grad_rows(
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    seed_ptr,
    o_ptr,
    lse_ptr,
    dq_ptr,
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
    tiles = tl.cdiv(length, ROWS)
    row0 = tl.program_id(0) % tiles * ROWS
    head = (tl.program_id(0) // tiles).to(tl.int64)
    group = head // repeats
    mask_first = head // heads * mask_sample + head % heads * mask_head
    k_ptr += group * keys * E
    v_ptr += group * keys * EV
    row = row0 + tl.arange(0, ROWS)
    q = load_tile(q_ptr + head * length * E, row0, length, DTYPE, ROWS, E, PADDED)
    g = load_tile(g_ptr + head * length * EV, row0, length, DTYPE, ROWS, EV, PADDED_V)
    o = load_tile(o_ptr + head * length * EV, row0, length, DTYPE, ROWS, EV, PADDED_V)
    lse, rest = load_lse(lse_ptr, head, row, length)
    delta = deltas(g, o, ACC)
    total = tl.zeros([ROWS, PADDED], ACC)
    last = tl.minimum(keys, row0 + ROWS) if CAUSAL else keys
    for key0 in range(0, last, KEYS):
        k = load_tile(k_ptr, key0, keys, DTYPE, KEYS, E, PADDED)
        v = load_tile(v_ptr, key0, keys, DTYPE, KEYS, EV, PADDED_V)
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
        dp = scores_of(g, v, ACC, PRECISION)
        if seed_ptr is not None:
            dp *= factors_of(seed_ptr, head, row0, key0, dp, DROPOUT)
        total = plus_product(p * (dp - delta[:, None]), k, total, PRECISION)
    total = total * tl.full(total.shape, SCALE, ACC)
    store_tile(dq_ptr + head * length * E, total, row0, length, DTYPE, E)


@triton.jit
def grad_keys(
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    seed_ptr,
    o_ptr,
    lse_ptr,
    dk_ptr,
    dv_ptr,
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
    tiles = tl.cdiv(keys, KEYS)
    key0 = tl.program_id(0) % tiles * KEYS
    group = (tl.program_id(0) // tiles).to(tl.int64)
    k = load_tile(k_ptr + group * keys * E, key0, keys, DTYPE, KEYS, E, PADDED)
    v = load_tile(v_ptr + group * keys * EV, key0, keys, DTYPE, KEYS, EV, PADDED_V)
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
            lse, rest = load_lse(lse_ptr, head, row, length)
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
            weights = p
            if seed_ptr is not None:
                factors = factors_of(seed_ptr, head, row0, key0, p, DROPOUT)
                weights = p * factors
            if dv_ptr is not None:
                by_v = plus_product(tl.trans(weights), g, by_v, PRECISION)
            if dk_ptr is not None:
                o = load_tile(o_ptr + head * length * EV, row0, length, DTYPE, ROWS, EV, PADDED_V)
                dp = scores_of(g, v, ACC, PRECISION)
                if seed_ptr is not None:
                    dp *= factors
                by_k = plus_product(tl.trans(p * (dp - deltas(g, o, ACC)[:, None])), q, by_k, PRECISION)
    if dk_ptr is not None:
        by_k = by_k * tl.full(by_k.shape, SCALE, ACC)
        store_tile(dk_ptr + group * keys * E, by_k, key0, keys, DTYPE, E)
    if dv_ptr is not None:
        store_tile(dv_ptr + group * keys * EV, by_v, key0, keys, DTYPE, EV)
