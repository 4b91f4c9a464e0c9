"""Scaled dot product attention: forward and backward, and R1 through it.

The baseline of R1 is PyTorch's MATH backend, the only one with a second derivative. The baseline of forward and
backward is the backend that PyTorch chooses. ``reference`` computes the plain formulas.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgan import backends, ops
from fastgan.bench.case import BASELINE, BY_NAME, Case, Make, Run, TooLarge, on_backend

HEADS, WIDTH = 4, 64
MATRICES = 14  # of scores, at most, that PyTorch holds in R1

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value)


def setup(batch: int, tokens: int, order: str, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    *operands, by_output = torch.randn(4, batch, HEADS, tokens, WIDTH, dtype=dtype, device=device).unbind()
    second = order == "r1"

    def variant(attend: Attend, backend: str | None = None) -> Run:
        leaves = [t.clone().requires_grad_() for t in operands]

        def run() -> Sequence[Tensor]:
            grads = torch.autograd.grad(attend(*leaves), leaves, by_output, create_graph=second)
            if not second:
                return grads
            return torch.autograd.grad([grad.square().sum() for grad in grads], leaves)

        return run if backend is None else on_backend(backend, run)

    variants: dict[str, Make] = {
        BASELINE: partial(variant, plain_attention if second else F.scaled_dot_product_attention),
        "reference": partial(variant, ops.scaled_dot_product_attention, "reference"),
        "fastgan": partial(variant, ops.scaled_dot_product_attention),
    }
    if device.type == "cuda":
        for backend in BY_NAME:
            if backends.why_not("scaled_dot_product_attention", backend, device.type, dtype) is None:
                variants[backend] = partial(variant, ops.scaled_dot_product_attention, backend)
    return variants


def _case(batch: int, tokens: int, order: str, device_types: tuple[str, ...]) -> Case:
    dtype = torch.float32
    values = batch * HEADS * tokens * WIDTH
    # Forward reads 3, writes 1. Backward reads 4, writes 3. Double backward reads 7, writes 3.
    moved = {"forward_backward": 11, "r1": 21}
    # Matrix products in the formulas (docs/second_order.md), without recomputation.
    products = {"forward_backward": 6, "r1": 16}
    return Case(
        name=f"attention/{batch}x{tokens}/{order}",
        op="scaled_dot_product_attention",
        dtype=dtype,
        device_types=device_types,
        bytes=moved[order] * values * dtype.itemsize,
        operations=2 * products[order] * values * tokens,
        tolerance={"forward_backward": 2e-4, "r1": 2e-3}[order],
        setup=partial(setup, batch, tokens, order),
        counted=("peak",),
        family=f"attention/{order}",
        sizes={"batch": batch, "tokens": tokens},
    )


def _memory_case(tokens: int) -> Case:
    """R1 with many tokens: the peak, and the time of one call."""
    return Case(
        name=f"memory/attention/4x{tokens}/r1",
        op="scaled_dot_product_attention",
        dtype=torch.float32,
        device_types=("cpu", "cuda"),
        bytes=None,
        operations=None,
        tolerance=2e-3,
        setup=partial(setup_if_it_fits, 4, tokens),
        suite="memory",
        counted=("peak",),
        family="memory/attention/r1",
        sizes={"batch": 4, "tokens": tokens},
    )


def setup_if_it_fits(batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    """Return R1 by PyTorch, if its matrices fit into memory, and by fastgan."""
    variants = setup(batch, tokens, "r1", device, dtype)
    needed = MATRICES * batch * HEADS * tokens**2 * dtype.itemsize

    def too_large() -> Run:
        raise TooLarge(f"matrices of {needed / 1e9:.1f} GB do not fit")

    return {
        BASELINE: variants[BASELINE] if needed < _free_bytes(device) else too_large,
        "fastgan": variants["fastgan"],
    }


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.8 if hasattr(os, "sysconf") else math.inf


CASES = [
    _case(batch, tokens, order, device_types)
    for batch, tokens, device_types in ((4, 256, ("cpu", "cuda")), (1, 1024, ("cpu", "cuda")), (4, 4096, ("cuda",)))
    for order in ("forward_backward", "r1")
]
CASES += [_memory_case(tokens) for tokens in (1024, 4096)]
