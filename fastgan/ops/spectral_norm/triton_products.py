"""Tiles of the products s = W v and t = W^T u, for the Triton kernels of spectral norm.

A tile is some elements of s or t, each the sum over its share of W. triton_plan.py tells in which form W is read.
"""

import triton
import triton.language as tl

from fastgan.ops.spectral_norm import triton_plan as plans


def _field(name: str) -> tl.constexpr:
    return tl.constexpr(plans.FIELDS.index(name))


AT_WEIGHT, AT_OUTPUT, AT_U, AT_V, AT_SAVED, AT_GRAD = map(_field, ("weight", "output", "u", "v", "saved", "grad"))
AT_OUTER, AT_ROWS, AT_INNER = map(_field, ("outer", "rows", "inner"))
AT_CHUNK, AT_CHUNKS, AT_CHUNK_SUMS, AT_VECTOR = map(_field, ("chunk", "chunks", "chunk_sums", "vector"))
AT_FORM, AT_SPAN, AT_TILES, AT_RESULT, AT_SUMS = map(_field, ("s_form", "s_span", "s_tiles", "s", "s_sums"))
AT_OF_T = tl.constexpr(plans.FIELDS.index("t_form") - plans.FIELDS.index("s_form"))  # from a field of s to that of t
FIELDS = tl.constexpr(len(plans.FIELDS))

BLOCK_OF_W = tl.constexpr(plans.BLOCK)
SMALL_BLOCK = tl.constexpr(plans.SMALL_BLOCK)
GENERAL = tl.constexpr(plans.GENERAL)
ALONG = tl.constexpr(plans.ALONG)
ACROSS = tl.constexpr(plans.ACROSS)
RUNS = tl.constexpr(plans.RUNS)
VECTORS = tl.constexpr(plans.VECTORS)


@triton.jit
def pointer_of(layer, FIELD: tl.constexpr, DTYPE: tl.constexpr, VEC: tl.constexpr):
    # The alignment hint belongs to the cast, so code that assumes no alignment needs a cast of its own.
    pointer = tl.load(layer + FIELD).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if VEC > 1 else pointer


@triton.jit
def multiple(x, VEC: tl.constexpr):
    # x is a multiple of VEC. This form tells the compiler.
    return x // VEC * VEC


@triton.jit
def divide(x, by):
    """Return quotient and remainder, in 32 bits."""
    quotient = x // by.to(tl.int32)
    return quotient, x - quotient * by.to(tl.int32)


@triton.jit
def _dot(weight, x, i, ni, nj, rows, inner, FORM: tl.constexpr, OF_T: tl.constexpr, ACC: tl.constexpr):
    """Return the sum over j of W[i, j] x[j] for a block of i. W is transposed if OF_T."""
    BJ: tl.constexpr = (SMALL_BLOCK if FORM <= RUNS else BLOCK_OF_W) // i.shape[0]
    acc = tl.zeros([i.shape[0], BJ], ACC)
    for j0 in range(0, nj, BJ):
        j = j0 + tl.arange(0, BJ)
        x_j = tl.load(x + j, mask=j < nj, other=0.0).to(ACC)
        if FORM == ALONG:
            at = i[:, None] * nj + j[None, :]
        elif FORM == ACROSS:
            at = i[:, None] + j[None, :] * ni
        else:
            outer, k = divide((i if OF_T else j).to(tl.int32), inner)
            column = outer * (rows * inner) + k
            at = column[:, None] + (j * inner)[None, :] if OF_T else (i * inner)[:, None] + column[None, :]
        w = tl.load(weight + at, mask=(i < ni)[:, None] & (j < nj)[None, :], other=0.0)
        acc += w.to(ACC) * x_j[None, :]
    return tl.sum(acc, 1)


@triton.jit
def _dot_of_vectors(
    weight, x, i0, rows, columns, inner, BI: tl.constexpr, OF_T: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr
):
    """Return the same for i from i0 on, where each run of ``inner`` elements is whole groups of VEC in memory."""
    BJ: tl.constexpr = BLOCK_OF_W // BI
    BLOCK_R: tl.constexpr = BJ if OF_T else BI
    BLOCK_G: tl.constexpr = (BI if OF_T else BJ) // VEC
    inner = multiple(inner, VEC)
    lane = tl.arange(0, VEC)[None, None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_G, VEC], ACC)
    for j0 in range(0, rows if OF_T else columns, BJ):
        row = (j0 if OF_T else i0) + tl.arange(0, BLOCK_R)
        group = (i0 if OF_T else j0) // VEC + tl.arange(0, BLOCK_G)
        outer, k = divide(group.to(tl.int32), inner // VEC)
        column = outer * (rows * inner) + k * VEC
        at = (row * inner)[:, None, None] + column[None, :, None] + lane
        in_rows = (row < rows)[:, None, None]
        in_columns = (group * VEC < columns)[None, :, None]
        if OF_T:
            x_j = tl.load(x + row, mask=row < rows, other=0.0)[:, None, None]
        else:
            x_j = tl.load(x + (group * VEC)[None, :, None] + lane, mask=in_columns, other=0.0)
        acc += tl.load(weight + at, mask=in_rows & in_columns, other=0.0).to(ACC) * x_j.to(ACC)
    if OF_T:
        return tl.reshape(tl.sum(acc, 0), [BI])
    else:  # two returns would have to have one shape
        return tl.sum(tl.sum(acc, 2), 1)


@triton.jit
def tile_of_product(
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
    VEC: tl.constexpr = 1 if FORM <= RUNS else WIDE
    ALONG_MEMORY: tl.constexpr = FORM == ACROSS or (FORM == VECTORS and OF_T)
    BI: tl.constexpr = 32 if FORM == GENERAL else 8 * WIDE if ALONG_MEMORY else 4
    weight = pointer_of(layer, AT_WEIGHT, DTYPE, VEC)
    u = pointer_of(layer, AT_U, DTYPE, 1)
    rows = tl.load(layer + AT_ROWS)
    inner = tl.load(layer + AT_INNER)
    columns = tl.load(layer + AT_OUTER) * inner
    ni = columns if OF_T else rows
    nj = rows if OF_T else columns
    if FORM == ALONG:
        nj = multiple(nj, VEC)
    if FORM == ACROSS:
        ni = multiple(ni, VEC)
    span = tl.load(layer + (AT_OF_T if OF_T else 0) + AT_SPAN)
    begin = multiple(index * span, BI)
    total = tl.zeros([BI], ACC)
    for i0 in range(begin, tl.minimum(begin + span, ni), BI):
        i = i0 + tl.arange(0, BI)
        if FORM == VECTORS:
            y = _dot_of_vectors(weight, x, i0, rows, columns, inner, BI, OF_T, VEC, ACC) * scale
        else:
            y = _dot(weight, x, i, ni, nj, rows, inner, FORM, OF_T, ACC) * scale
        tl.store(result + i, y, mask=i < ni)
        if WEIGHTED:
            total += y * tl.load(u + i, mask=i < ni, other=0.0).to(ACC)
        else:
            total += y * y
    return tl.sum(total, 0)
