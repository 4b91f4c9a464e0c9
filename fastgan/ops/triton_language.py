"""Helpers that all Triton kernels use: dtypes, rounding and launching."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan.backends import TRITON_INTERPRETS

_INTERPRETED = tl.constexpr(TRITON_INTERPRETS)

DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def typed(pointer, DTYPE: tl.constexpr):
    # Ahead-of-time compilation declares every pointer with the accumulation dtype. In a launch, this cast does nothing.
    return pointer.to(tl.pointer_type(DTYPE))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        # Triton's interpreter truncates to bfloat16 where hardware rounds to the nearest.
        bits = x.to(tl.uint32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, bits, x)
    return x.to(DTYPE)


def addresses(*names: str) -> dict[str, str]:
    """Return the entries of a kernel in AOT for arguments that point to the accumulation dtype."""
    return {f"{name}_ptr": "*A" for name in names}


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
