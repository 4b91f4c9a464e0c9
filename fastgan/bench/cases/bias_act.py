"""A bias and an activation inside a gradient penalty: forward, backward and double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends, ops
from fastgan.bench.case import BASELINE, BY_NAME, Case, Make, Run, on_backend

SHAPE = (32, 64, 32, 32)  # a layer of a discriminator for 64 px
GAIN = sqrt(2)

Function = Callable[[Tensor, Tensor], Tensor]

# name -> PyTorch's function of (x, bias), and the gain
_ACTIVATIONS: dict[str, tuple[Function, float]] = {
    "leaky_relu": (lambda x, b: F.leaky_relu(x + b[:, None, None], 0.2) * GAIN, GAIN),
    "silu": (lambda x, b: F.silu(x + b[:, None, None]), 1.0),
}


def _penalized(
    function: Function, smooth: bool, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Run:
    torch.manual_seed(0)  # the same operands for each variant
    x, dy, h = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    bias = torch.randn(shape[1], dtype=dtype, device=device)
    for leaf in (x, dy, bias):
        leaf.requires_grad_()
    # The gradients that a penalty needs. A piecewise-linear function passes none to its input.
    by = (dy, x, bias) if smooth else (dy,)

    def run() -> Sequence[Tensor]:
        y = function(x, bias)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return [y.detach(), dx.detach(), *torch.autograd.grad(dx, by, h)]

    return run


def setup(activation: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> dict[str, Make]:
    plain, gain = _ACTIVATIONS[activation]
    smooth = activation == "silu"
    fused = partial(ops.bias_act, activation=activation, gain=gain)

    def variant(backend: str) -> Run:
        return on_backend(backend, _penalized(fused, smooth, shape, device, dtype))

    compiled: Make = lambda: _penalized(torch.compile(plain), smooth, shape, device, dtype)  # noqa: E731
    variants: dict[str, Make] = {
        BASELINE: partial(_penalized, plain, smooth, shape, device, dtype),
        "torch.compile": compiled,
        "reference": partial(variant, "reference"),
        "fastgan": partial(_penalized, fused, smooth, shape, device, dtype),
    }
    if device.type == "cuda":
        for backend in BY_NAME:
            if backends.why_not("bias_act", backend, device.type, dtype) is None:
                variants[backend] = partial(variant, backend)
    return variants


def _case(activation: str, moved: int, operations: int) -> Case:
    """Build a case; ``moved`` is in bits per element, ``operations`` per element."""
    size, dtype = prod(SHAPE), torch.float32
    return Case(
        name=f"bias_act/{activation}/double_backward",
        op="bias_act",
        dtype=dtype,
        device_types=("cpu", "cuda"),
        bytes=moved * size // 8,
        operations=operations * size,
        tolerance=2e-3,
        setup=partial(setup, activation),
    )


CASES = [
    # In bits: each of the three passes reads and writes a tensor, and one bit per element.
    _case("leaky_relu", 3 * (2 * 32 + 1), 8),
    # Forward reads x, backward dy and x, double backward h, dy and x. They write one, one and two results.
    _case("silu", (2 + 3 + 5) * 32, 85),
]
