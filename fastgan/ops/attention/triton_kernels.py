"""Attention in Triton, to the second derivative; the formulas and their names are in blocks.py.

    forward          o and lse, a program a tile of rows: what was summed shrinks as larger scores come
    backward_rows    dQ, a program a tile of rows
    backward_keys    dK and dV, a program a tile of keys, which meets the rows of all heads that share them
    second_rows      tau and mu in a first walk over the keys, by g and by Q in a second
    second_keys      by K and by V

A tile of scores stays in registers and is made anew wherever it is needed: no two programs add to one sum, so there
are no atomics. Matrix products a tile: 2, 3, 4, 14 and 8. Those of operands are of their dtype; those with a tile of
scores are of TF32 where the operands are in half precision or PyTorch allows it. Sums are float32 (float64 for
float64).
"""

from __future__ import annotations

from collections.abc import Callable
from struct import pack, unpack
from typing import Any

import torch
import triton
from torch import Tensor

from fastgan.ops.attention.layout import Options
from fastgan.ops.attention.triton_first import backward_keys, backward_rows
from fastgan.ops.attention.triton_first import forward as forward_rows
from fastgan.ops.attention.triton_second import second_keys, second_rows
from fastgan.ops.library import accumulation_dtype, copy_back
from fastgan.ops.triton_language import DTYPES, addresses, device_of

_SIZES = dict.fromkeys(("heads", "groups", "length", "keys", "width", "wide"), "i32")
_STRIDES = dict.fromkeys(("by_b", "by_h", "by_i", "by_j"), "i64")
_NUMBERS = dict.fromkeys(("scale_high", "scale_low", "dropout_p", "factor_high", "factor_low"), "fp32")
_OPTIONS = {"seed_ptr": "*i64", "mask_ptr": "*A", **_SIZES, **_STRIDES, **_NUMBERS}
_READ = addresses("g", "q", "k", "v", "lse", "delta")
_SECOND = addresses("gq", "gk", "gv", "tau", "mu")
_PLAIN = {"seed_ptr": None, "mask_ptr": None, "by_b": 0, "by_h": 0, "by_i": 0, "by_j": 0, "PRECISION": "ieee"}
_NARROW = {**_PLAIN, "CAUSAL": False, "ROWS": 32, "KEYS": 32, "WIDTH": 64, "WIDE": 64}
_WIDE = {"CAUSAL": True, "ROWS": 16, "KEYS": 16, "WIDTH": 256, "WIDE": 256, "PRECISION": "tf32"}

# What compiles ahead of time: each kernel that is launched, its arguments ("*A": to the accumulation dtype)
# and the values that its constants take together, without DTYPE, the input's dtype.
AOT: list[tuple[Any, dict[str, str], list[dict[str, Any]]]] = [
    (forward_rows, addresses("q", "k", "v", "o", "lse") | _OPTIONS, [_NARROW, _WIDE]),
    (forward_rows, addresses("q", "k", "v", "o", "lse") | _OPTIONS | {"mask_ptr": "*u8"}, [_WIDE]),
    (backward_rows, _READ | addresses("dq") | _OPTIONS, [_NARROW, _WIDE]),
    (backward_keys, _READ | addresses("dk", "dv") | _OPTIONS, [_NARROW, {**_WIDE, "dk_ptr": None}]),
    (second_rows, _READ | _SECOND | addresses("by_g", "by_q") | _OPTIONS, [_NARROW, {**_WIDE, "gk_ptr": None}]),
    (second_keys, _READ | _SECOND | addresses("by_k", "by_v") | _OPTIONS, [_NARROW, {**_WIDE, "gv_ptr": None}]),
]


class _Call:
    """What all kernels of a call are launched with."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, options: Options
    ) -> None:
        self.acc = accumulation_dtype(q.dtype)
        self.operands = q.contiguous(), k.contiguous(), v.contiguous()
        self.mask = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
        strides = (
            (0,) * 4 if mask is None else (0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
        )
        (self.batch, heads, self.length, width), (_, self.groups, self.keys, wide) = q.shape, v.shape
        self.heads = heads
        kept = 1 - options.dropout_p
        numbers = *_as_two(options.scale), options.dropout_p, *_as_two(1 / kept if kept else 0.0)
        self.sizes = heads, self.groups, self.length, self.keys, width, wide, *strides, *numbers
        self.constants = {
            "CAUSAL": options.is_causal,
            "WIDTH": max(16, triton.next_power_of_2(width)),
            "WIDE": max(16, triton.next_power_of_2(wide)),
            "PRECISION": _precision(q.dtype),
            "DTYPE": DTYPES[q.dtype],
        }

    def empty_rows(self) -> Tensor:
        return torch.empty(self.batch, self.heads, self.length, dtype=self.acc, device=self.operands[0].device)

    def tile(self, most: int) -> dict[str, Any]:
        """Rows and keys of a tile of scores, by what registers and shared memory hold of the operands."""
        width = max(self.constants["WIDTH"], self.constants["WIDE"])
        size = max(16, min(most, most * 64 // width) // (2 if self.acc == torch.float64 else 1))
        return {"ROWS": size, "KEYS": size, "num_warps": 4}

    def rows(self, tile: dict[str, Any]) -> tuple[int]:
        return (self.batch * self.heads * triton.cdiv(self.length, tile["ROWS"]),)

    def columns(self, tile: dict[str, Any]) -> tuple[int]:
        return (self.batch * self.groups * triton.cdiv(self.keys, tile["KEYS"]),)


def _as_two(number: float) -> tuple[float, float]:
    """A number as the sum of two that are float32."""
    (high,) = unpack("f", pack("f", number))
    return high, number - high


def _precision(dtype: torch.dtype) -> str:
    """TF32 has the digits of float16, and more than bfloat16."""
    if dtype in (torch.float16, torch.bfloat16):
        return "tf32"
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _targets(*outputs: Tensor | None) -> list[Tensor | None]:
    """What the kernels write: the outputs, or contiguous stand-ins."""
    return [
        t if t is None or t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in outputs
    ]


def _into(run: Callable[..., None], *outputs: Tensor | None) -> None:
    targets = _targets(*outputs)
    run(*targets)
    for target, output in zip(targets, outputs, strict=True):
        copy_back(target, output)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, o: Tensor, lse: Tensor, options: Options
) -> None:
    call = _Call(q, k, v, mask, seed, options)
    tile = call.tile(64)

    def run(o: Tensor) -> None:
        with device_of(q):
            forward_rows[call.rows(tile)](
                *call.operands, call.mask, seed, o, lse, *call.sizes, **call.constants, **tile
            )

    _into(run, o)


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
    call = _Call(q, k, v, mask, seed, options)
    g = g.contiguous()
    read = g, *call.operands, call.mask, lse, _delta(g, o, call), seed
    tile = call.tile(64)

    def run(dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> None:
        with device_of(q):
            if dq is not None:
                backward_rows[call.rows(tile)](*read, dq, *call.sizes, **call.constants, **tile)
            if dk is not None or dv is not None:
                backward_keys[call.columns(tile)](*read, dk, dv, *call.sizes, **call.constants, **tile)

    _into(run, dq, dk, dv)


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
    call = _Call(q, k, v, mask, seed, options)
    g = g.contiguous()
    given = (None if t is None else t.contiguous() for t in (gq, gk, gv))
    read = *given, g, *call.operands, call.mask, lse, _delta(g, o, call), seed
    tau, mu = call.empty_rows(), call.empty_rows()
    tile = call.tile(32)

    def run(by_g: Tensor | None, by_q: Tensor | None, by_k: Tensor | None, by_v: Tensor | None) -> None:
        with device_of(q):
            second_rows[call.rows(tile)](*read, by_g, by_q, tau, mu, *call.sizes, **call.constants, **tile)
            if by_k is not None or by_v is not None:
                second_keys[call.columns(tile)](*read, tau, mu, by_k, by_v, *call.sizes, **call.constants, **tile)

    _into(run, by_g, by_q, by_k, by_v)


def _delta(g: Tensor, o: Tensor, call: _Call) -> Tensor:
    delta: Tensor = torch.linalg.vecdot(g.to(call.acc), o.to(call.acc))
    return delta.contiguous()
