"""The Triton kernel for the gradients of an attention mask, of both orders. triton_tiles.py describes it."""

import triton
import triton.language as tl

from fastgan.ops.attention.triton_second import second_tile
from fastgan.ops.attention.triton_tiles import (
    deltas,
    factors_of,
    load_lse,
    load_tile,
    mask_tile,
    probabilities,
    scores_of,
)
from fastgan.ops.triton_language import rounded


@triton.jit
def grad_mask(
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
    tau_ptr,
    mu_ptr,
    out_ptr,
    length,
    keys,
    heads,
    repeats,
    mask_sample,
    mask_head,
    mask_row,
    mask_key,
    samples,
    mask_samples,
    mask_heads,
    SECOND: tl.constexpr,  # True: by_mask; False: dmask
    EVERY_ROW: tl.constexpr,  # the mask has one row for all
    EVERY_KEY: tl.constexpr,
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
    """Write a tile of the mask's gradient, summed over its broadcast dimensions. The gradient is contiguous."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    GQ: tl.constexpr = gq_ptr is not None
    GK: tl.constexpr = gk_ptr is not None
    GV: tl.constexpr = gv_ptr is not None
    DROPS: tl.constexpr = seed_ptr is not None
    tiles_of_keys = 1 if EVERY_KEY else tl.cdiv(keys, KEYS)
    tiles_of_rows = 1 if EVERY_ROW else tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    first_key = program % tiles_of_keys * KEYS
    first_row = program // tiles_of_keys % tiles_of_rows * ROWS
    of_mask = (program // (tiles_of_keys * tiles_of_rows)).to(tl.int64)  # sample and head
    first_sample = of_mask // mask_heads
    first_head = of_mask % mask_heads
    last_key = keys if EVERY_KEY else first_key + 1
    last_row = length if EVERY_ROW else first_row + 1
    total = tl.zeros([ROWS, KEYS], ACC)
    for i in range(samples // mask_samples):
        sample = first_sample + i * mask_samples
        for j in range(heads // mask_heads):
            of_sample = first_head + j * mask_heads
            head = sample * heads + of_sample
            group = head // repeats
            mask_first = sample * mask_sample + of_sample * mask_head
            for row0 in range(first_row, last_row, ROWS):
                row = row0 + tl.arange(0, ROWS)
                q = load_tile(q_ptr + head * length * E, row0, length, DTYPE, ROWS, E, PADDED)
                g = load_tile(g_ptr + head * length * EV, row0, length, DTYPE, ROWS, EV, PADDED_V)
                o = load_tile(o_ptr + head * length * EV, row0, length, DTYPE, ROWS, EV, PADDED_V)
                gq = q
                if GQ:
                    gq = load_tile(gq_ptr + head * length * E, row0, length, DTYPE, ROWS, E, PADDED)
                lse, rest = load_lse(lse_ptr, head, row, length)
                delta = deltas(g, o, ACC)
                for key0 in range(first_key, last_key, KEYS):
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
                    if SECOND:
                        apart, t, r = second_tile(
                            q, g, gq, k, v, gk, gv, factors, delta, GQ, GK, GV, DROPS, SCALE, ACC, PRECISION
                        )
                        if gmask_ptr is not None:
                            t += mask_tile(gmask_ptr, row0, key0, length, keys, mask_first, mask_row, mask_key, t)
                        tau = tl.load(tau_ptr + head * length + row, mask=row < length, other=0.0)
                        mu = tl.load(mu_ptr + head * length + row, mask=row < length, other=0.0)
                        total += p * (apart * (t - tau[:, None]) + r - mu[:, None])
                    else:
                        dp = scores_of(g, v, ACC, PRECISION)
                        if DROPS:
                            dp *= factors
                        total += p * (dp - delta[:, None])
    rows = 1 if EVERY_ROW else length
    columns = 1 if EVERY_KEY else keys
    if EVERY_ROW:
        row = tl.zeros([1], tl.int32)
        total = tl.sum(total, 0)[None, :]
    else:
        row = first_row + tl.arange(0, ROWS)
    if EVERY_KEY:
        key = tl.zeros([1], tl.int32)
        total = tl.sum(total, 1)[:, None]
    else:
        key = first_key + tl.arange(0, KEYS)
    at = (of_mask * rows + row[:, None]) * columns + key[None, :]
    inside = (row < rows)[:, None] & (key < columns)[None, :]
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=inside)
