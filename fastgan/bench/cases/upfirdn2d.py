"""Filtered resampling and the filtered leaky ReLU inside a penalty: forward, backward and double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends, ops
from fastgan.bench.case import BASELINE, BY_NAME, Case, Make, Run, on_backend
from fastgan.bench.filtered import TAPS, resample

SHAPE = (8, 64, 128, 128)  # a layer of StyleGAN2's discriminator for 128 px
FILTERED = (4, 32, 64, 64)  # a layer of StyleGAN3's generator
_RESAMPLE: dict[str, dict[str, Any]] = {
    "up": {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0},
    "down": {"down": 2, "padding": (1, 1, 1, 1)},
    "blur": {"padding": (2, 1, 2, 1)},
}
_Filter = Callable[[Tensor, Tensor], Tensor]  # of an image and taps
_AROUND: dict[str, Any] = {"up": 2, "down": 2, "padding": (5, 4, 5, 4)}


def _plain_filtered(x: Tensor, f: Tensor, up: int, down: int, padding: Sequence[int]) -> Tensor:
    y = F.leaky_relu(resample(x, f, up=up, padding=padding, gain=float(up * up)), 0.2) * 2**0.5
    return resample(y, f, down=down)


def _penalized(
    function: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Run:
    torch.manual_seed(0)  # the same operands for each variant
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    f = torch.tensor(TAPS, dtype=dtype, device=device) / sum(TAPS)
    h = torch.randn_like(x)
    dy = torch.randn_like(function(x, f)).requires_grad_()

    def run() -> Sequence[Tensor]:
        y = function(x, f)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return [y.detach(), dx.detach(), *torch.autograd.grad(dx, dy, h)]

    return run


def setup(
    op: str, options: dict[str, Any], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> dict[str, Make]:
    plain = partial(resample if op == "upfirdn2d" else _plain_filtered, **options)
    fused: _Filter
    if op == "upfirdn2d":
        fused = partial(ops.upfirdn2d, **options)
    else:
        fused = lambda x, f: ops.filtered_lrelu(x, f, f, **options)  # noqa: E731

    def variant(backend: str) -> Run:
        return on_backend(backend, _penalized(fused, shape, device, dtype))

    variants: dict[str, Make] = {
        BASELINE: partial(_penalized, plain, shape, device, dtype),
        "reference": partial(variant, "reference"),
        "fastgan": partial(_penalized, fused, shape, device, dtype),
    }
    if device.type == "cuda":
        for backend in BY_NAME:
            if backends.why_not("upfirdn2d", backend, device.type, dtype) is None:
                variants[backend] = partial(variant, backend)
    return variants


def _case(op: str, name: str, options: dict[str, Any], shape: tuple[int, ...], moved: float, operations: float) -> Case:
    """Build a case; ``moved`` and ``operations`` are numbers for each element of x, in one pass of three."""
    dtype = torch.float32
    return Case(
        name=f"{op}/{name}/double_backward",
        op="upfirdn2d",
        dtype=dtype,
        device_types=("cpu", "cuda"),
        bytes=int(3 * moved * prod(shape)) * dtype.itemsize,
        operations=int(3 * operations * prod(shape)),
        tolerance=2e-4,
        setup=partial(setup, op, options, shape),
    )


CASES = [
    # Each pass reads one tensor and writes the other. Two operations a tap, the vertical ones at the lower resolution.
    _case("upfirdn2d", "up", _RESAMPLE["up"], SHAPE, 1 + 4, 2 * (2 * 2 + 4 * 2)),
    _case("upfirdn2d", "down", _RESAMPLE["down"], SHAPE, 1 + 1 / 4, 2 * (4 / 2 + 4 / 4)),
    _case("upfirdn2d", "blur", _RESAMPLE["blur"], SHAPE, 1 + 1, 2 * (4 + 4)),
    _case("filtered_lrelu", "up_and_down", _AROUND, FILTERED, 1 + 1, 2 * (12 + 4 * 3)),
]
