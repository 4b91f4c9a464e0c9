"""Launchers of the Triton kernels for attention, which triton_tiles.py describes."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from fastgan.ops.attention.layout import Options
from fastgan.ops.attention.triton_first import attend, grad_keys, grad_rows
from fastgan.ops.attention.triton_mask import grad_mask
from fastgan.ops.attention.triton_second import grad_grad_keys, grad_grad_rows
from fastgan.ops.library import accumulation_dtype, copy_back
from fastgan.ops.triton_language import DTYPES, addresses, device_of

_WIDEST = 256  # head
_LEAST = 16  # smallest number of rows and columns of a tile that tensor cores accept
_TILE = 2**13  # bytes of a tile of an operand in the accumulation type
_SHARED = 10  # tiles that a program holds in shared memory at most, as compiled for NVIDIA
_LEAST_SHARED = 99 * 2**10

_FIRST = "g", "q", "k", "v", "o", "lse"
_SECOND = "gq", "gk", "gv", "gmask", *_FIRST
_SIZES = dict.fromkeys(
    ("length", "keys", "heads", "repeats", "mask_sample", "mask_head", "mask_row", "mask_key"), "i32"
)
_PLAIN = {"SCALE": 0.125, "CAUSAL": False, "BOOLEAN": False, "DROPOUT": 0.0, "PRECISION": "ieee"}
_SMALL = {"E": 64, "EV": 64, "PADDED": 64, "PADDED_V": 64, "ROWS": 32, "KEYS": 32}
_WIDE = {"E": 200, "EV": 256, "PADDED": 256, "PADDED_V": 256, "ROWS": 16, "KEYS": 16}


def _absent(*names: str) -> dict[str, None]:
    return {f"{name}_ptr": None for name in names}


def _with_mask(mask: str, *operands: str) -> dict[str, str]:
    """Return the entries of a kernel in AOT for its arguments."""
    return addresses(*operands) | {"mask_ptr": mask, "seed_ptr": "*i64"} | _SIZES


_FORMS: list[dict[str, Any]] = [
    _PLAIN | _SMALL | _absent("mask", "seed"),
    _PLAIN | _SMALL | {"DROPOUT": 0.1, "PRECISION": "tf32"},  # with an additive mask
    _PLAIN | _WIDE | {"CAUSAL": True} | _absent("mask", "seed"),
]
_BOOLEAN: dict[str, Any] = _PLAIN | _SMALL | {"BOOLEAN": True} | _absent("seed")

_FORMS_OF_SECOND = [_FORMS[0] | _absent("gmask"), _FORMS[1], _FORMS[2] | _absent("gmask")]
_FEW = _FORMS_OF_SECOND[0] | _absent("gk", "gv")
_FOR_MASK = {"SECOND": False, "EVERY_ROW": True, "EVERY_KEY": False}
_ON_SECOND = _absent("gq", "gk", "gv", "gmask", "seed", "tau", "mu")

# For ahead-of-time compilation: each launched kernel, its arguments ("*A" points to the accumulation dtype) and the
# combinations of its constants, without DTYPE, the dtype of the operands.
AOT: list[tuple[Any, dict[str, str], list[dict[str, Any]]]] = [
    (attend, _with_mask("*A", "q", "k", "v", "o", "lse"), _FORMS),
    (attend, _with_mask("*u8", "q", "k", "v", "o", "lse"), [_BOOLEAN]),
    (grad_rows, _with_mask("*A", *_FIRST, "dq"), _FORMS),
    (grad_rows, _with_mask("*u8", *_FIRST, "dq"), [_BOOLEAN]),
    (grad_keys, _with_mask("*A", *_FIRST, "dk", "dv"), [*_FORMS, _FORMS[0] | _absent("dk")]),
    (grad_keys, _with_mask("*u8", *_FIRST, "dk", "dv"), [_BOOLEAN]),
    (
        grad_grad_rows,
        _with_mask("*A", *_SECOND, "by_g", "by_q", "tau", "mu"),
        [*_FORMS_OF_SECOND, _FEW | _absent("by_q")],
    ),
    (grad_grad_rows, _with_mask("*u8", *_SECOND, "by_g", "by_q", "tau", "mu"), [_BOOLEAN | _absent("gmask")]),
    (
        grad_grad_keys,
        _with_mask("*A", *_SECOND, "by_k", "by_v", "tau", "mu"),
        [*_FORMS_OF_SECOND, _FEW | _absent("by_v")],
    ),
    (grad_grad_keys, _with_mask("*u8", *_SECOND, "by_k", "by_v", "tau", "mu"), [_BOOLEAN | _absent("gmask")]),
    (
        grad_mask,
        _with_mask("*A", *_SECOND, "tau", "mu", "out")
        | dict.fromkeys(("samples", "mask_samples", "mask_heads"), "i32"),
        [
            _PLAIN | _SMALL | _FOR_MASK | _ON_SECOND,
            _FORMS[1] | _FOR_MASK | {"SECOND": True, "EVERY_ROW": False, "EVERY_KEY": True},
        ],
    ),
]


def fits(q: Tensor, v: Tensor) -> bool:
    """Return whether heads of this width fit into a program's shared memory."""
    width = max(_padded(q.shape[-1]), _padded(v.shape[-1]))
    if width > _WIDEST:
        return False
    if not q.is_cuda or torch.version.hip is not None:
        return True
    room: int = getattr(torch.cuda.get_device_properties(q.device), "shared_memory_per_block_optin", _LEAST_SHARED)
    return _SHARED * _LEAST * width * accumulation_dtype(q.dtype).itemsize <= room


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, o: Tensor, lse: Tensor, options: Options
) -> None:
    """Write o (B, H, L, Ev) and lse (B, H, L, 2): rounded, and what rounding left out. 0 for a row without keys."""
    sizes, constants, mask = _call(q, k, v, mask, options, order=0)
    with _Contiguous([q, k, v], [o]) as (operands, results), device_of(q):
        attend[_grid(q, constants["ROWS"])](*operands, mask, seed, *results, lse, *sizes, **constants)


def backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dmask: Tensor | None,
    options: Options,
) -> None:
    sizes, constants, mask = _call(q, k, v, mask, options, order=1)
    with _Contiguous([g, q, k, v, o], [dq, dk, dv, dmask]) as (operands, (dq, dk, dv, dmask)), device_of(q):
        given = *operands[:-1], mask, seed, operands[-1], lse
        if dq is not None:
            grad_rows[_grid(q, constants["ROWS"])](*given, dq, *sizes, **constants)
        if dk is not None or dv is not None:
            grad_keys[_grid(k, constants["KEYS"])](*given, dk, dv, *sizes, **constants)
        if dmask is not None:
            grid, more, tile = _of_mask(dmask, q, k, constants)
            grad_mask[grid](*(None,) * 4, *given, None, None, dmask, *sizes, *more, **constants, **tile, SECOND=False)


def double_backward(
    gq: Tensor | None,
    gk: Tensor | None,
    gv: Tensor | None,
    gmask: Tensor | None,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    by_g: Tensor | None,
    by_q: Tensor | None,
    by_k: Tensor | None,
    by_v: Tensor | None,
    by_mask: Tensor | None,
    options: Options,
) -> None:
    """Run the double backward. gq, gk, gv and gmask are the gradients of the backward's results, None for zeros."""
    if gmask is not None and mask is not None:
        mask = mask.contiguous()  # both are read with the same strides
    sizes, constants, mask = _call(q, k, v, mask, options, order=2)
    tau, mu = (lse.new_empty(lse.shape[:3]) for _ in range(2))
    with (
        _Contiguous([gq, gk, gv, gmask, g, q, k, v, o], [by_g, by_q, by_k, by_v, by_mask]) as (operands, results),
        device_of(q),
    ):
        by_g, by_q, by_k, by_v, by_mask = results
        given = *operands[:-1], mask, seed, operands[-1], lse
        grad_grad_rows[_grid(q, constants["ROWS"])](*given, by_g, by_q, tau, mu, *sizes, **constants)
        if by_k is not None or by_v is not None:
            grad_grad_keys[_grid(k, constants["KEYS"])](*given, by_k, by_v, tau, mu, *sizes, **constants)
        if by_mask is not None:
            grid, more, tile = _of_mask(by_mask, q, k, constants)
            grad_mask[grid](*given, tau, mu, by_mask, *sizes, *more, **constants, **tile, SECOND=True)


class _Contiguous:
    """Operands as contiguous tensors, and contiguous results, which are copied to where they are wanted at the end."""

    def __init__(self, operands: list[Tensor | None], results: list[Tensor | None]) -> None:
        self._operands = [None if t is None else t.contiguous() for t in operands]
        self._wanted = results
        self._results = [
            t if t is None or t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for t in results
        ]

    def __enter__(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        return self._operands, self._results

    def __exit__(self, kind: object, *error: object) -> None:
        for wanted, result in zip(self._wanted, self._results, strict=True):
            if kind is None:
                copy_back(result, wanted)


def _call(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, order: int
) -> tuple[tuple[int, ...], dict[str, Any], Tensor | None]:
    """Return the sizes, the constants, and the mask in a form that Triton reads. order: of the derivative."""
    (batch, heads, length, width), (groups, keys), wide = q.shape, k.shape[1:3], v.shape[-1]
    strides: tuple[int, ...] = 0, 0, 0, 0
    boolean = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        strides = mask.expand(batch, heads, length, keys).stride()
        mask = mask.view(torch.uint8) if boolean else mask
    padded, padded_wide = _padded(width), _padded(wide)
    row = max(padded, padded_wide) * accumulation_dtype(q.dtype).itemsize
    # Products of float32 keep their operands in registers. A derivative has several, so a tile is small or has 8 warps.
    crowded = order > 0 and q.dtype == torch.float32
    # In half precision, twice the tile halves the instructions. AMD's 64 KB of shared memory might not hold it, nor the
    # registers of a thread what the double backward has.
    large = order < 2 and q.dtype.itemsize == 2 and torch.version.hip is None
    tile = 2 * _TILE if large else _TILE
    side = max(_LEAST, min(32 if crowded else 64, tile // row))
    constants = {
        "SCALE": options.scale,
        "CAUSAL": options.is_causal,
        "BOOLEAN": boolean,
        "DROPOUT": options.dropout_p,
        "PRECISION": _precision(q.dtype),
        "E": width,
        "EV": wide,
        "PADDED": padded,
        "PADDED_V": padded_wide,
        "ROWS": side,
        "KEYS": side,
        "DTYPE": DTYPES[q.dtype],
        "num_stages": 1,
        "num_warps": 8 if crowded and row > 128 else 4,
    }
    return (length, keys, heads, heads // groups, *strides), constants, mask


def _precision(dtype: torch.dtype) -> str:
    """Return the precision of products of float32 numbers.

    Rounded to TF32, a float32 number keeps as many digits as a float16 one, and its range.
    """
    if dtype == torch.float64 or torch.version.hip is not None:
        return "ieee"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def _grid(t: Tensor, tile: int) -> tuple[int]:
    """Return one program for each tile of tokens of each head or group of t (B, H, L, E)."""
    return (t.shape[0] * t.shape[1] * triton.cdiv(t.shape[2], tile),)


def _of_mask(
    gradient: Tensor, q: Tensor, k: Tensor, constants: dict[str, Any]
) -> tuple[tuple[int], tuple[int, int, int], dict[str, bool]]:
    """Return the grid, the sizes and the constants of grad_mask for the gradient of a mask."""
    samples, heads, rows, keys = gradient.shape
    tiles = (triton.cdiv(size, constants[side]) for size, side in ((rows, "ROWS"), (keys, "KEYS")))
    tile = {"EVERY_ROW": rows == 1, "EVERY_KEY": keys == 1}
    return (samples * heads * math.prod(tiles),), (q.shape[0], samples, heads), tile


def _padded(width: int) -> int:
    return max(_LEAST, int(triton.next_power_of_2(width)))
